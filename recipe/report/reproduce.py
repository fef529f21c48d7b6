"""The command that makes a run again, and what its settings have that others' have not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.config.command_line import make_parser, parse
from recipe.config.settings import Config, flat_fields, value_of
from recipe.format import value_text
from recipe.report.record import Record

# Settings that say where a run is written and who hears of it, not what it is.
_NOT_THE_RUN = ("run.directory", "resume", "log", "hub", "data.cache_directory")


def flat(config: Config) -> dict[str, Any]:
    """Dotted names to values."""
    return {name: value_of(config, name) for name, _ in flat_fields(Config)}


def reproducing_command(config: Config) -> str:
    """`./run.sh` with the preset that is nearest to `config`, and every setting that differs from it."""
    mine = {name: value for name, value in flat(config).items() if not _matches(name, _NOT_THE_RUN)}
    parser = make_parser(Config, "run.sh", "")
    presets = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
    best = ("configs/NAME.yaml", mine)
    for number, preset in enumerate(presets):
        theirs = flat(parse(parser, Config, ["--config", str(preset)])[0])
        differences = {name: value for name, value in mine.items() if theirs[name] != value}
        if not number or len(differences) < len(best[1]):
            best = (f"configs/{preset.name}", differences)
    flags = [f"--{name} {_flag_value(value)}" for name, value in best[1].items()]
    return " \\\n    ".join([f"./run.sh {best[0]}", *flags])


def _matches(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _flag_value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(shlex.quote(str(item)) for item in value) if value else "'[]'"
    if value is None or isinstance(value, bool | dict):
        return shlex.quote(json.dumps(value))
    return shlex.quote(str(value))


def settings_that_differ(records: Sequence[Record]) -> dict[str, list[str]]:
    """Dotted name -> its value in each run, for the settings that are not the same in all of them."""
    all_settings = [flat(record.config) for record in records]
    return {
        name: [value_text(json.loads(json.dumps(settings[name]))) for settings in all_settings]
        for name in all_settings[0]
        if not _matches(name, _NOT_THE_RUN) and any(s[name] != all_settings[0][name] for s in all_settings[1:])
    }


def changed_on_the_way(record: Record) -> list[str]:
    """Settings that enter the learning rate or the arithmetic and were changed by a resume."""
    names = [name for event in record.events_called("resume") for name in event.get("changes") or {}]
    return sorted({name for name in names if _matches(name, ("schedule", "precision"))})
