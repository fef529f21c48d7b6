"""Which settings may differ from those of the checkpoint that a run goes on from, or branches from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.config.settings import Config, DataConfig, MixtureSource, flat_settings
from recipe.errors import RecipeError
from recipe.plan.run_plan import make_plan
from recipe.plan.schedule import decay_start

# What may change between the parts of a run: none of it enters the update. Everything else is the run.
MAY_CHANGE_ON_RESUME = (
    *("run.directory", "run.max_updates", "run.parity_check", "run.branch", "run.meet_seconds"),
    *("batch.micro_batch_size", "batch.scaling"),
    *("data.cache_directory", "data.retry_seconds", "data.on_bad_row", "data.max_passes"),
    *("schedule.total_tokens", "schedule.tokens_per_parameter", "schedule.decay_tokens"),
    *("performance", "stability", "evaluation", "checkpoint", "hub", "log", "precision", "resume"),
)

# What may change in a branch beside these. Its update is another one, and recorded as such.
MAY_CHANGE_IN_BRANCH = (
    *("optimizer.learning_rate", "optimizer.beta1", "optimizer.beta2", "optimizer.epsilon", "optimizer.weight_decay"),
    *("optimizer.max_grad_norm", "schedule", "batch.schedule", "data.weight", "run.skip_tokens"),
)

_BUDGET = "batch.tokens_per_update"  # that a run begins with

# Where the text is, if there is a record of it, and from files it stays files: `open_text` compares the text itself.
TEXT_MAY_MOVE = ("data.text_files", "data.token_files", "data.revision")


def check_same_run(
    earlier: dict[str, Any] | None,
    config: Config,
    what: str,
    may_change: tuple[str, ...] = (),
    branches_at: int | None = None,
) -> dict[str, list[Any]]:
    """Changes from `earlier` to `config` that may be; a change of the run itself is refused.

    A setting that the version of `earlier` did not have, was its default. A branch begins at `branches_at` tokens.
    """
    if earlier is None:
        return {}
    old, now = flat_settings(Config()) | earlier, flat_settings(config)
    if len(old["data.sources"]) == len(now["data.sources"]):
        old, now = _with_sources(old), _with_sources(now)
    changes = {name: [old[name], value] for name, value in now.items() if old[name] != value}
    in_branch = () if branches_at is None else MAY_CHANGE_IN_BRANCH
    fatal = _others(changes, (*MAY_CHANGE_ON_RESUME, *may_change, *in_branch))
    if fatal:
        what_changed = ", ".join(f"{name} was {shown(old)} and is {shown(new)}" for name, (old, new) in fatal.items())
        advice = _on_a_resume(fatal) if branches_at is None else _in_a_branch(fatal, branches_at)
        raise RecipeError(f"{what}: {what_changed}; {advice}")
    return changes


def changed_updates(changes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of the changes of a branch that enter the update."""
    return _others(changes, MAY_CHANGE_ON_RESUME) | {
        name: values for name, values in changes.items() if name.startswith(("schedule.", "precision"))
    }


def _others(changes: dict[str, list[Any]], allowed: tuple[str, ...]) -> dict[str, list[Any]]:
    """Changes of other settings than the allowed ones; of files also that there are none any more, or now."""

    def is_other(name: str) -> bool:
        was, is_now = changes[name]
        starts_or_ends = name.endswith("_files") and bool(was) != bool(is_now)  # files take the place of a dataset
        return starts_or_ends or not re.sub(r"^data\.sources\[\d+\]", "data", name).startswith(allowed)

    return {name: values for name, values in changes.items() if is_other(name)}


def _on_a_resume(fatal: dict[str, list[Any]]) -> str:
    advice = "use another --run.directory, or --resume fresh to move it aside"
    if _others(fatal, (*MAY_CHANGE_IN_BRANCH, _BUDGET)):
        return advice
    return f"{advice}, or branch: --resume PATH of a checkpoint, --run.branch true and a --run.directory of its own"


def _in_a_branch(fatal: dict[str, list[Any]], tokens: int) -> str:
    if list(fatal) == [_BUDGET]:
        change = f"{{from_tokens: {tokens}, tokens_per_update: {fatal[_BUDGET][1]}}}"
        return f"that is what the run began with; a branch gives its own from here on: --batch.schedule '[{change}]'"
    return "a branch has model, seed, lanes, blocks, text and kind of optimizer of the run that it leaves"


def check_length(checkpoint: Path, tokens: int, config: Config, changes: dict[str, list[Any]]) -> None:
    """With `wsd` the length may change while the rate is constant: the run is then that of its new length, to the bit.

    Raises:
        RecipeError: the decay has begun before the checkpoint, as the run was or as it would be.
    """
    schedule, names = config.schedule, ("total_tokens", "tokens_per_parameter", "decay_tokens")
    was = {name: changes[f"schedule.{name}"][0] for name in names if f"schedule.{name}" in changes}
    if schedule.shape != "wsd" or not was:
        return
    earlier = replace(config, schedule=replace(schedule, **was))
    totals = [make_plan(other, world_size=1).total_tokens for other in (earlier, config)]
    old, new = (decay_start(total, c.schedule) for total, c in zip(totals, (earlier, config), strict=True))
    if (totals[0], old) == (totals[1], new):
        return
    if tokens > old:
        raise RecipeError(
            f"the length of this run can change no more: its decay began at {old:,} tokens, and {checkpoint} is at {tokens:,}; "
            f"go on from a checkpoint before that by --resume PATH, or with the length that it has, {totals[0]:,} tokens"
        )
    if tokens > new:
        shortest = tokens + schedule.decay_tokens if schedule.decay_tokens else -(-tokens * 5 // 4)
        raise RecipeError(
            f"a run of {totals[1]:,} tokens would have begun to decay at {new:,}, and {checkpoint} is at {tokens:,} already: "
            f"set --schedule.total_tokens {shortest} or more, or --schedule.decay_tokens to less"
        )


def _with_sources(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings in which each one of a mixture's sources has a name: `data.sources[0].weight`."""
    (defaults,) = flat_settings(Config(data=DataConfig(sources=(MixtureSource(),))))["data.sources"]
    settings, sources = dict(settings), [defaults | source for source in settings["data.sources"]]
    for number, source in enumerate(sources):
        label = MixtureSource(**{name: source[name] for name in defaults}).label  # a moved file may not rename columns
        settings |= {f"data.sources[{number}].{name}": value for name, value in (source | {"name": label}).items()}
    del settings["data.sources"]
    return settings


def weights_of(settings: dict[str, Any]) -> list[float]:
    """Of the sources of a mixture, in flat settings."""
    return [source["weight"] for source in settings.get("data.sources", [])]


def shown(value: Any) -> str:
    """A value of a setting; of a list of many files the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
