"""Any command line at all: a plan whose numbers hold, or a refusal in one line; soon, and without a trace."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.commands.plan import PlanConfig, Table, as_text, plan_tables
from recipe.config.command_line import make_parser, parse_run
from recipe.config.settings import flat_fields
from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan
from recipe.plan.run_plan import make_plan
from tests.helpers import ROOT, SCRIPT, TINY, assert_one_line, read_ledger, run, skip_if_quick, write_texts

CPU_SECONDS = 5  # a hundred times what an example takes: no clock is compared, but nothing may go on for ever
FIELDS = dict(flat_fields(PlanConfig))

# ---- What people, and people who mean harm, give for a setting ---------------------------------------------------------

HUGE = [2**31, 2**32, 2**40 - 87, 2**40, 2**40 + 1, 2**63, 10**15, 10**18, 10**30, 10**400]
whole = st.one_of(st.integers(-2, 70), st.integers(0, 40).map(lambda n: 2**n), st.sampled_from(HUGE))
number = st.one_of(whole, st.floats(), st.floats(0, 1), st.sampled_from([1e-320, 1e308, -0.0]))
ODD_TEXTS = [
    *(
        "",
        " ",
        "-",
        "--",
        "~",
        "null",
        "true",
        "[",
        "{",
        "[[",
        "{a: {b: [",
        "*a",
        "&a [*a]",
        "&a [b, b]",
        "!!int x",
        "<<: x",
    ),
    *(
        "a" * 5000,
        "/tmp/" + "a/" * 3000,
        "[" * 3000,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e400",
        ".nan",
        "1_0",
        "a\nb: c",
        "a: b",
    ),
    *(
        "\0",
        "a\0b",
        "\udcff",
        "\ud800",
        "\x1b[31m",
        "\N{BYTE ORDER MARK}",
        "../x",
        "no/such/*.txt",
        "hf://x/y@z",
        "a/b:c:d",
    ),
    *(
        "!!python/object/apply:os.mkdir [pwned]",
        "/dev/zero",
        "/proc/self/mem",
        "${run.seed}",
        "auto",
        "fresh",
        "cpu",
        "h100",
    ),
]
text = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(), max_size=6))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(text, number), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that divide, from one block to the limits."""
    length, lanes = draw(st.integers(2, 130)), draw(st.one_of(st.integers(1, 70), st.integers(1, 2**16)))
    blocks = lanes * draw(st.one_of(st.integers(1, 9), st.integers(1, 10**5)))
    heads = draw(st.integers(1, 9))
    ranks = draw(st.one_of(st.integers(1, min(lanes, 9)), st.integers(1, lanes)))
    return {
        "data.sequence_length": length,
        "batch.tokens_per_update": blocks * length,
        "batch.lanes": lanes,
        "batch.micro_batch_size": draw(st.one_of(st.integers(1, 9), st.integers(1, 2**40), st.just("auto"))),
        "model.n_head": heads,
        "model.n_embd": heads * draw(st.integers(1, 70)),
        "model.n_layer": draw(st.one_of(st.integers(1, 9), st.integers(1, 2**16))),
        "performance.activation_checkpointing": draw(st.one_of(st.none(), st.integers(1, 20))),
        "batch.schedule": [
            {"from_tokens": start, "tokens_per_update": lanes * length * draw(st.integers(1, 9))}
            for start in sorted(draw(st.sets(st.integers(1, 10**6), max_size=2)))
        ],
        "schedule.warmup_tokens": 0,
        "world_size": ranks,
        "device": draw(st.sampled_from([None, "h100", "cpu"])),
    }


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], str | bytes | None]:
    """(arguments, content of the file that FILE stands for)."""
    values = {**draw(budgets())} if draw(st.integers(0, 3)) else {}
    fitting = draw(st.booleans())
    for name in draw(st.lists(st.sampled_from([*FIELDS]), max_size=2)):
        if not fitting:
            values[name] = draw(anything)
        elif choices := [choice for choice in get_args(FIELDS[name]) if isinstance(choice, str)]:
            values[name] = draw(st.sampled_from(choices))
        elif "int" in str(FIELDS[name]) or "float" in str(FIELDS[name]):
            values[name] = draw(number)
        else:
            values[name] = draw(text)
    in_file = draw(st.sets(st.sampled_from([*values]))) if values else set()
    arguments: list[str] = []
    sections: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        if name in in_file:
            (sections.setdefault(section, {}) if section else sections)[leaf] = value
        else:
            word = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
            word = word.removesuffix("\n").removesuffix("\n...")
            arguments += [f"--{name}={word}"] if draw(st.booleans()) else [f"--{name}", word]
    if draw(st.integers(0, 4)) == 0:
        arguments += draw(st.lists(st.one_of(text, text.map("--{}".format)), max_size=2))
    content: Any = None
    if sections:
        content = yaml.safe_dump(sections, allow_unicode=draw(st.booleans()))
    elif draw(st.integers(0, 5)) == 0:
        content = draw(st.one_of(text, st.binary(max_size=9), anything.map(yaml.safe_dump)))
    return (["--config", "FILE", *arguments] if content is not None else arguments), content


# ---- What holds for each ------------------------------------------------------------------------------------------------


@cache
def parser() -> Any:
    return make_parser(PlanConfig, "plan", "")


WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "subprocess.Popen")
watched: list[str] = []  # what was written; for as long as it is being watched
is_watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: note what would leave a trace."""
    if is_watching:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            watched.append(f"open {arguments[0]!r}")
        elif event in WRITING:
            watched.append(f"{event} {arguments!r}")


@pytest.fixture(scope="module", autouse=True)
def _watch() -> None:
    """What is imported late, and what libraries write when they are first used, is no trace of the settings."""
    sys.addaudithook(watch)  # for good: there is no way to remove it
    plan_tables(parse_run(parser(), PlanConfig, ["--device", "cpu"])[0])


@contextmanager
def limits() -> Iterator[None]:
    """Interrupt what takes `CPU_SECONDS`, and refuse what writes."""
    global is_watching

    def interrupt(*_: Any) -> None:
        raise AssertionError(f"not answered after {CPU_SECONDS} seconds of processor time")

    earlier = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    watched.clear()
    is_watching = sys.dont_write_bytecode = True
    try:
        yield
    finally:
        is_watching = sys.dont_write_bytecode = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)
    assert watched == []


def answer(arguments: list[str]) -> tuple[PlanConfig, dict[str, Table]] | RecipeError:
    """What `python -m recipe plan` finds."""
    try:
        config, _ = parse_run(parser(), PlanConfig, arguments)
        return config, plan_tables(config)
    except RecipeError as error:
        return error


def assert_budget_holds(update: UpdatePlan) -> None:
    assert update.tokens_per_update == update.blocks_per_update * update.sequence_length
    assert update.blocks_per_update == update.lanes * update.blocks_per_lane
    assert 1 <= update.smallest_share <= update.largest_share <= update.smallest_share + update.blocks_per_lane
    steps, size = update.gradient_accumulation_steps, update.micro_batch_size
    assert (steps - 1) * size < update.largest_share <= steps * size
    if update.world_size * steps > 1000:
        return
    ranks = range(update.world_size)
    assert {len(update.blocks_of_rank(rank)) for rank in ranks} == {update.smallest_share, update.largest_share}
    micro_batches = [blocks for rank in ranks for blocks in update.micro_batches(rank)]
    assert sum(map(len, micro_batches)) == update.blocks_per_update
    assert max(map(len, micro_batches)) == update.largest_micro_batch
    assert sum(not blocks for blocks in micro_batches) == update.masked_micro_batches


def test_any_command_line_is_a_plan_or_one_line(tmp_path: Path) -> None:
    file, outcomes = tmp_path / "settings.yaml", Counter[str]()

    @settings(derandomize=True, database=None, max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
    @given(command_lines())
    def check(line: tuple[list[str], str | bytes | None]) -> None:
        arguments = [str(file) if word == "FILE" else word for word in line[0]]
        if line[1] is not None:
            file.write_bytes(line[1] if isinstance(line[1], bytes) else line[1].encode(errors="surrogateescape"))
        with limits():
            found = answer(arguments)
        outcomes[type(found).__name__] += 1
        if isinstance(found, RecipeError):
            assert found.exit_code == 2
            assert 10 < len(str(found)) < 1000
            assert not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", str(found))
            return
        config, tables = found
        assert all(map(as_text, tables.values()))
        numbers = [n for table in tables.values() for column in table.values() for n in column]
        assert all(n.value is None or (math.isfinite(n.value) and n.value >= 0) for n in numbers)
        for phase in make_plan(config, config.world_size or 1, 3).phases:
            assert_budget_holds(phase.update)

    check()
    assert min(outcomes["tuple"], outcomes["RecipeError"]) > 10, outcomes


@pytest.mark.parametrize("command", ["report", "push"])
@pytest.mark.parametrize("flags", [[], ["no-run", "--output"], ["no-run", "--repo_id"]], ids=" ".join)
def test_any_word_for_a_command_is_one_line(command: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No word here is a run. Those of `generate` and `evaluate` would import torch."""
    main = import_module(f"recipe.commands.{command}").main
    for word in ODD_TEXTS:
        monkeypatch.setattr(sys, "argv", [command, *flags, word])
        with limits(), pytest.raises(RecipeError):
            main()


@st.composite
def tiny_runs(draw: st.DrawFn) -> list[str]:
    """Settings of which each is valid, though not all of them together."""
    length, lanes = draw(st.sampled_from([2, 16, 64])), draw(st.integers(1, 9))
    values: dict[str, Any] = {
        "data.sequence_length": length,
        "batch.lanes": lanes,
        "batch.tokens_per_update": lanes * length * draw(st.integers(1, 3)),
        "batch.micro_batch_size": draw(st.sampled_from([1, 2, 7, 2**40, "auto"])),
        "schedule.warmup_tokens": draw(st.sampled_from([0, 1, 1000])),
        "evaluation.tokens": draw(st.sampled_from([1, 500])),
    }
    choices: dict[str, Any] = {
        "run.seed": [0, 2**32 - 1],
        "batch.scaling": ["manual"],
        "data.shuffle_blocks": [1, 2**16],
        "data.validation_one_in": [1, 2, 2**40],
        "data.text_column": ["none", "null"],
        "data.split": [""],
        "model.dropout": [0.5],
        "model.n_positions": [64, 100],
        "model.vocab_size": [257, 258, 1000],
        "model.initializer_range": [1e-320, 1000],
        "model.layer_norm_epsilon": [1e-30, 1000],
        "optimizer.name": ["sgd"],
        "optimizer.learning_rate": [1e-320, 1000],
        "optimizer.weight_decay": [0, 1000],
        "optimizer.max_grad_norm": ["null", 1e-30, 10**12],
        "performance.activation_checkpointing": [1, 2, 2**40],
        "performance.deterministic": ["true"],
        "schedule.tokens_per_parameter": [1e-9, 10**6],
        "schedule.total_tokens": ["null", 10**15],
        "stability.on_spike": ["stop", "rollback"],
        "evaluation.every_tokens": [1],
        "evaluation.prompts": ["", "\n\t\x07\N{GRINNING FACE}\N{LINE SEPARATOR}", "a" * 5000],
        "evaluation.sample_tokens": [1, 2**24],
        "checkpoint.every_tokens": [1, "null"],
        "checkpoint.every_minutes": [1e-9, "null"],
        "checkpoint.keep": [1, 2**40],
        "precision": ["auto", "bf16"],
        "resume": ["fresh"],
    }
    for name in draw(st.lists(st.sampled_from([*choices]), max_size=6, unique=True)):
        values[name] = draw(st.sampled_from(choices[name]))
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_what_is_accepted_trains_or_ends_in_one_line(tmp_path: Path) -> None:
    """And writes into the run's directory alone."""
    skip_if_quick()
    write_texts(tmp_path / "texts")
    outcomes = Counter[int]()

    @settings(derandomize=True, database=None, max_examples=15, deadline=None, suppress_health_check=[*HealthCheck])
    @given(tiny_runs())
    def check(arguments: list[str]) -> None:
        here = tmp_path / str(outcomes.total())
        here.mkdir()
        fixed = ["--run.max_updates", "1", "--run.directory", "run", "--data.text_files", f"{tmp_path}/texts/*.txt"]
        command = [sys.executable, str(ROOT / SCRIPT), *TINY, *arguments, *fixed]
        done = run(command, cwd=here)
        outcomes[done.returncode] += 1
        if done.returncode:
            assert_one_line(done, [])
        else:
            assert len(read_ledger(here / "run")) == 1
        assert {path.name for path in here.iterdir()} <= {"run"}

    check()
    assert outcomes[0] >= 5, outcomes
