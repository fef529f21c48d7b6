"""`python -m recipe`: the list of commands, and each of them started from it."""

from __future__ import annotations

import os
import re
import sys

import pytest

from recipe.errors import BROKEN_PIPE_EXIT_CODE
from tests.helpers import ROOT, run, start

RECIPE = [sys.executable, "-m", "recipe"]


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    done = run([sys.executable, "-X", "importtime", "-m", "recipe", "--help"])
    assert done.returncode == 0
    listed = re.findall(r"^  (\w+) +[A-Z].*\.$", done.stdout, re.MULTILINE)
    modules = [p.stem for p in (ROOT / "recipe/commands").glob("*.py") if p.stem != "__init__"]
    assert sorted(listed) == sorted([*modules, "train"])
    assert not re.search(r"\b(torch|transformers|jsonargparse)\b", done.stderr)
    assert "\x1b" not in done.stdout, "no colours in a pipe"


@pytest.mark.slow
def test_help_of_a_command_names_types_as_a_person_does() -> None:
    for command in ("train", "plan", "evaluate", "generate", "report", "card", "push"):
        done = run([*RECIPE, command, "--help"])
        assert done.returncode == 0, command
        assert "(type: " in done.stdout, command
        assert not re.search("Annotated|Bound|AtLeast", done.stdout), command


def test_a_command_gets_the_arguments_behind_its_name() -> None:
    done = run([*RECIPE, "plan", "--config", "benchmarks/plain.yaml"])
    assert done.returncode == 0, done.stderr
    assert re.search("tokens per update +4,096\n", done.stdout)


def test_the_console_script_is_the_same() -> None:
    """Its entry point, as pip's script calls it."""
    module, function = re.findall(
        r'^recipe = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )[0]
    done = run([sys.executable, "-c", f"from {module} import {function}; {function}()", "pln"])
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: pln is not a command: .*\n", done.stderr)


@pytest.mark.parametrize("arguments", [["plan", "--config", "configs/quickstart.yaml"], ["--help"], ["plan", "--help"]])
def test_a_reader_that_has_gone_is_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer), start([*RECIPE, *arguments], stdout=writer) as process:
        assert process.communicate()[1] == ""
    assert process.returncode in (0, BROKEN_PIPE_EXIT_CODE)  # argparse takes no notice if a help is long


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    mistaken = [["pln"], ["plan", "--config", "nowhere.yaml"], ["train", "--model.n_layer", "two"]]
    mistaken += [[command, "somewhere", "--sed", "1"] for command in ("evaluate", "generate", "report", "card", "push")]
    for arguments in mistaken:
        done = run([*RECIPE, *arguments])
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr
