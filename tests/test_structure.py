"""The shape of the code: imports run downwards, the loop is a page, nothing takes ten arguments, a plan needs no torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

from tests.helpers import ROOT, run

# From the lowest up. A folder or file imports from lower floors, and from itself; not from its own floor.
FLOORS = (
    *(
        {"streams", "text"},
        {"errors", "format", "retry"},
        {"config"},
        {"plan"},
        {"run"},
        {"hub", "data"},
        {"model", "report"},
        {"step", "evaluation"},
    ),
    *({"checkpoint", "finish"}, {"train", "commands", "__main__"}),
)
LIGHT = ("config", "plan", "run", "hub", "report", "commands.plan", "commands.report")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "recipe").rglob("*.py"))
}


def imports(node: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported anywhere in `node`, but for those that only types need."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom):
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in (n if n in MODULES else str(node.module) for n in inside) if name in MODULES)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_imports_run_downwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upwards = []
    for module, tree in MODULES.items():
        for imported in imports(tree):
            here, there = (f"{name}.".split(".")[1] for name in (module, imported))
            if here and here != there and floor[there] >= floor[here]:
                upwards.append(f"{module} -> {imported}")
    assert upwards == []


def test_no_modules_import_each_other() -> None:
    """Also within a folder, and over any number of steps."""
    TopologicalSorter({module: set(imports(tree)) - {module} for module, tree in MODULES.items()}).prepare()


def test_the_loop_is_a_page() -> None:
    source = (ROOT / "recipe/train.py").read_text(encoding="utf-8")
    (train,) = [function for function in functions(MODULES["recipe.train"]) if function.name == "train"]
    assert train.end_lineno is not None
    assert len(source.splitlines()) <= 120
    assert train.end_lineno - train.lineno < 89
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(train)) <= 10


def test_nothing_takes_more_than_five_arguments() -> None:
    """But for `self`, torch's `ctx`, and the fields of a dataclass."""
    long = []
    for module, tree in MODULES.items():
        for function in functions(tree):
            given = function.args
            names = [
                a.arg
                for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)
                if a.arg not in ("self", "cls", "ctx")
            ]
            if len(names) > 5:
                long.append(f"{module}.{function.name}({', '.join(names)})")
    assert long == []


def test_no_test_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        assert not [name for name in names if name.startswith("tests.") and ".test_" in name], path


def test_what_answers_at_once_imports_no_torch() -> None:
    names = [name for name in MODULES if f"{name}.".startswith(tuple(f"recipe.{light}." for light in LIGHT))]
    assert len(names) > 20
    heavy = ("torch", "transformers", "accelerate", "datasets")
    script = f"import sys, {', '.join(names)}; print([name for name in {heavy} if name in sys.modules])"
    done = run([sys.executable, "-c", script])
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
