"""The largest budget that loses nothing from a checkpoint on, by experiment: `python -m recipe branch CHECKPOINT ...`."""

from __future__ import annotations  # without it, --help prints each Annotated type in full

import itertools
import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from recipe.config.command_line import config_of_checkpoint, make_parser, parse, write_config
from recipe.config.settings import AtLeast, AtMost, BudgetChange, Config, Positive, RunConfig, TokensOrNull
from recipe.errors import RecipeError
from recipe.format import json_value
from recipe.plan.run_plan import make_plan
from recipe.report.branches import Branch, compare, largest_without_loss, table, verdict
from recipe.run.ledger import read_updates
from recipe.run.stop import listened_signals

STATE = "training/state.json"  # of a checkpoint
TRAIN = Path(__file__).resolve().parent.parent / "train.py"
NEVER = 10**15  # tokens


@dataclass(frozen=True)
class BranchConfig:
    """Branches of one checkpoint with other budgets."""

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Budgets, as multiples of the one at the checkpoint."""
    tokens: TokensOrNull = None
    """Target tokens that each branch trains on, rounded up to whole updates of all budgets. It has to be given."""
    seeds: Annotated[int, AtLeast(1), AtMost(100)] = 2
    """Branches of each budget, on other text: the first reads what follows the checkpoint, the second what follows that, ..."""
    tolerance: Positive = 0.01
    """Nats of the smoothed training loss that a larger budget may lose."""
    learning_rate_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    """What a budget does to the learning rate: schedule.learning_rate_rule of the branches. AdamW's beta2 keeps its memory in
    tokens."""
    output: str | None = None
    """Directory of the branches, in which TOKENS-tokens/xMULTIPLE-seedN is a run. Null: branches/step-N in that of the run."""
    launch: str | None = None
    """What starts a training, before its settings, as one text: 'python -m recipe launch --config_file
    accelerate_configs/cpu_2.yaml recipe/train.py'. Null: this Python, in one process."""


def main() -> None:
    """The command."""
    parser = make_parser(BranchConfig, "python -m recipe branch", "Compare budgets from a checkpoint on, by training.")
    parser.add_argument("checkpoint", help="A checkpoint of a run: RUN/checkpoints/step-N.")
    parser.add_argument("--json", action="store_true", help="Print the comparison as JSON.")
    settings, rest = parse(parser, BranchConfig, sys.argv[1:])
    checkpoint = Path(rest["checkpoint"])
    state = _read_state(checkpoint)
    directory = Path(settings.output or checkpoint.absolute().parent.parent / "branches" / checkpoint.name)
    configs = branch_configs(settings, checkpoint, state, directory)
    for branch, config in configs:
        if not _is_complete(branch):
            _train(settings, branch, config)
    budgets = compare([branch for branch, _ in configs], state["tokens"])
    if rest["json"]:
        found = largest_without_loss(budgets, settings.tolerance)
        values = {
            "checkpoint": str(checkpoint),
            "update": state["update"],
            "tokens": state["tokens"],
            **asdict(settings),
        }
        values |= {"largest_tokens_per_update": found.tokens_per_update, "is_largest_tried": found is budgets[-1]}
        print(json.dumps(json_value({**values, "budgets": list(map(asdict, budgets))}), indent=1))
    else:
        print(f"{table(budgets)}\n\n{verdict(budgets, settings.tolerance)}")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """The training state, as far as it is needed before the branches check all of it.

    Raises:
        RecipeError: there is none.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not all(type(state[name]) is int for name in ("update", "tokens")) or type(state["config"]) is not dict:
            raise ValueError("a value is not of its kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"{checkpoint} is no checkpoint with a training state: {STATE}: {error}") from None
    return state


def branch_configs(
    settings: BranchConfig, checkpoint: Path, state: dict[str, Any], directory: Path
) -> list[tuple[Branch, Config]]:
    """Each branch with the settings of its run, seed by seed.

    Raises:
        RecipeError: budgets that do not divide, or tokens that the run does not have.
    """
    parent = config_of_checkpoint(checkpoint, state["config"])
    past = tuple(change for change in parent.batch.schedule if change.from_tokens < state["tokens"])
    parent = replace(parent, batch=replace(parent.batch, schedule=past))
    if past and settings.learning_rate_rule != parent.schedule.learning_rate_rule:
        raise RecipeError(
            f"learning_rate_rule = {settings.learning_rate_rule}: the run has changed its budget before by the rule "
            f"{parent.schedule.learning_rate_rule}, and its branches have to keep it"
        )
    plan = make_plan(parent, 1)
    budgets = _budgets(settings, parent, plan.update_at(state["update"]).tokens_per_update)
    tokens = _tokens(settings, list(budgets.values()), plan.total_tokens - state["tokens"])
    parent = replace(
        parent,
        data=replace(parent.data, cache_directory=str(directory / "cache")),
        schedule=replace(parent.schedule, learning_rate_rule=settings.learning_rate_rule),
        evaluation=replace(parent.evaluation, every_tokens=NEVER, sample_tokens=None),
        checkpoint=replace(parent.checkpoint, keep=1, keep_every_tokens=None),
        hub=replace(parent.hub, repo_id=None),
        log=replace(parent.log, trackers=()),
        resume=str(checkpoint),
    )
    found = []
    for seed, (multiple, size) in itertools.product(range(1, settings.seeds + 1), budgets.items()):
        place = directory / f"{tokens}-tokens" / f"x{multiple:g}-seed{seed}"
        branch = Branch(multiple, size, seed, place, last_update=state["update"] + tokens // size)
        run = RunConfig(str(place), branch.last_update, parent.run.seed, branch=True, skip_tokens=(seed - 1) * tokens)
        batch = replace(parent.batch, schedule=(*past, BudgetChange(state["tokens"], size)))
        found.append((branch, replace(parent, run=run, batch=batch)))
    return found


def _budgets(settings: BranchConfig, parent: Config, at_checkpoint: int) -> dict[float, int]:
    """Multiple -> tokens per update, the smallest first."""
    smallest = parent.batch.lanes * parent.data.sequence_length
    budgets = {}
    for multiple in sorted(set(settings.multiples)):
        size = round(multiple * at_checkpoint)
        if multiple <= 0 or size % smallest or size != multiple * at_checkpoint or not size:
            raise RecipeError(
                f"multiples: {multiple:g} x {at_checkpoint:,} tokens is no whole number of blocks of each of the "
                f"{parent.batch.lanes} lanes: give multiples of {smallest / at_checkpoint:g} ({smallest:,} tokens)"
            )
        budgets[multiple] = size
    if len(budgets) < 2:
        raise RecipeError("multiples: give two or more different ones, such as --multiples 1 2 4")
    return budgets


def _tokens(settings: BranchConfig, budgets: Sequence[int], left: int) -> int:
    """Tokens of a branch: whole updates of every budget."""
    common = math.lcm(*budgets)
    wanted = settings.tokens
    if wanted is None:
        raise RecipeError(f"tokens is not given: set it, such as --tokens {min(8 * common, max(left, common))}")
    tokens = -(-wanted // common) * common
    if tokens > left:
        most = left // common * common
        advice = f"give at most {most:,}" if most else "give smaller multiples"
        raise RecipeError(
            f"tokens = {wanted:,}, in whole updates of all budgets {tokens:,}: the run's schedule has {left:,} left behind the "
            f"checkpoint: {advice}, or an earlier checkpoint"
        )
    return tokens


def _is_complete(branch: Branch) -> bool:
    lines = read_updates(branch.directory) if (branch.directory / "summary.json").is_file() else []
    return bool(lines) and lines[-1]["update"] == branch.last_update


def _train(settings: BranchConfig, branch: Branch, config: Config) -> None:
    """Train one branch to its end; what it prints goes to a file, signals go to it.

    Raises:
        RecipeError: it did not reach its end; the exit code is its own.
    """
    root = branch.directory.parent
    root.mkdir(parents=True, exist_ok=True)
    path, log = root / f"{branch.directory.name}.yaml", root / f"{branch.directory.name}.log"
    write_config(config, path)
    start = shlex.split(settings.launch) if settings.launch else [sys.executable, str(TRAIN)]
    print(
        f"{branch.multiple:g} x, seed {branch.seed}: updates of {branch.tokens_per_update:,} tokens up to "
        f"{branch.last_update:,}; {log}",
        file=sys.stderr,
        flush=True,
    )
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([*start, "--config", str(path)], stdout=output)

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        earlier = {number: signal.signal(number, pass_on) for number in listened_signals()}
        try:
            code = process.wait()
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
    if code or not _is_complete(branch):
        raise RecipeError(
            f"the branch in {branch.directory} has not come to its end (exit code {code}); its output is in {log}, and the "
            "same command goes on",
            exit_code=code if code > 0 else 1,
        )
