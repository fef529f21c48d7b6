"""A run in words, for the page and the card: the words are in templates/, here are their formats and what they look up."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipe.config.settings import (
    HELD_OUT,
    STANDARD_LIBRARY_VALIDATION_ONE_IN,
    Config,
    SourceConfig,
)
from recipe.config.text_files import is_remote, public_name
from recipe.format import duration, event_name, event_text, percent, short_count, size_text, value_text
from recipe.report.record import Record, smoothing_window, some_of_each_kind
from recipe.report.rising_budget import rising_budget
from recipe.text import one_line, printable

NOT_THE_RUN = ("run.directory", "resume", "log", "hub", "data.cache_directory")


@cache
def environment(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The templates of page and card, which `finalize` all that they show: names and samples hold any text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: (name or "").endswith(".html.jinja"),
        finalize=finalize,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = {"number": "{:,.0f}".format, "percent": percent, "duration": duration, "size": size_text}
    templates.filters |= {name: _if_known(form) for name, form in (formats | {"short_count": short_count}).items()}
    templates.filters |= {
        "text": _if_known(lambda value, pattern: pattern.format(value)),
    }
    plain: list[Callable[..., Any]] = [event_name, event_text, fenced, quoted, markdown, smoothing_window]
    plain += [some_of_each_kind, repeatable_config, name_of_source, parity_rows, short_name, branch_text, rising_budget]
    templates.filters |= {function.__name__: function for function in plain}
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    templates.globals |= {
        "HELD_OUT": HELD_OUT,
        "STANDARD_LIBRARY_VALIDATION_ONE_IN": STANDARD_LIBRARY_VALIDATION_ONE_IN,
        "hub_dataset": hub_dataset,
        "initial_weights": initial_weights,
    }
    return templates


def _if_known(form: Callable[..., str]) -> Callable[..., str]:
    """`form`, which has no text for None and NaN."""
    return lambda value, *more: "" if value is None or value != value else form(value, *more)


def html(value: Any) -> Any:
    """What the page shows, before it is escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown(value: Any) -> str:
    """Text that Markdown shows as it is, in one line; what is marked as safe is Markdown already."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"\s*\n\s*", " ", printable(str(value))).replace("&", "&amp;").replace("<", "&lt;")
    return Markup(re.sub(r"([\\|*`\[\]~$#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text))


def fenced(text: str) -> Markup:
    """A Markdown code block, whatever the text holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}text\n{printable(text)}\n{fence}")


def quoted(word: str) -> Markup:
    """A word of a shell's command in a Markdown code block."""
    return Markup(shlex.quote(one_line(word)))


def parity_rows(check: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table of the ways in which the parity check computed the gradient, the configured one first."""
    rows: list[tuple[str, ...]] = [("scaling", "micro-batch", "accumulation steps", "relative difference")]
    for way, difference in [(check["reference"], None), *check["differences"]]:
        parts = re.fullmatch(r"(\w+), micro-batch (\d+) x (\d+) steps", way)
        shown = "the run's own way" if difference is None else f"{difference:.1e}"
        rows.append((*(parts.groups() if parts else (way, "", "")), shown))
    return rows


def rows_of(record: Record, validation_sets: Sequence[str]) -> Any:
    """The lists and tables of rows.jinja, as attributes.

    The summary names `validation_sets`, so that runs side by side have the same rows.
    """
    return environment().get_template("rows.jinja").make_module({"record": record, "validation_sets": validation_sets})


def branch_text(event: dict[str, Any]) -> str:
    """Where a run has branched from another, and with what."""
    checkpoint = Path(event["checkpoint"])
    of_run = f" of {checkpoint.parent.parent.name}" if checkpoint.parent.name == "checkpoints" else ""
    changes = [f"{name} {value_text(values[-1:][0])}" for name, values in event["changes"].items() if values]
    return f"{checkpoint.name}{of_run} at {event['tokens']:,} tokens, with {', '.join(changes) or 'nothing changed'}"


def hub_dataset(source: SourceConfig) -> str | None:
    """The id of the Hub dataset that a source is; None if it is something else."""
    is_other = source.files or source.is_standard_library
    return None if is_other or not is_hub_id(source.repository) else source.repository


def name_of_source(source: SourceConfig) -> str:
    """A dataset, or files: their addresses, or their names without directories, which are the author's own."""
    if source.is_standard_library:
        return "the .py files of Python's standard library, without its tests"
    if not source.files:
        return short_name(source.repository) or ""
    what = (
        f"{'' if any(map(is_remote, source.files)) else 'local '}files{' of token ids' if source.token_files else ''}"
    )
    names = [public_name(path) if is_remote(path) else Path(path).name for path in source.files[:5]]
    return f"{what}: {', '.join(names)}{', ...' if len(source.files) > 5 else ''}"


def is_hub_id(name: str) -> bool:
    """Whether this can be a name on the Hub, and is nothing on this machine."""
    return re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) is not None and not Path(name).exists()


def initial_weights(config: Config) -> str | None:
    """What the run started from; None for random weights."""
    return short_name(config.model.init_from)


def short_name(name: str | None) -> str | None:
    """A name on the Hub; of a directory of the author's the last part."""
    return name if name is None or is_hub_id(name) else Path(name).name


def repeatable_config(config: Config) -> str:
    """config.yaml without the settings that say where a run is written, who hears of it, and what the author's home is called.

    `--config` repeats the run.
    """
    sections = _from_home(asdict(config.public))
    for name in NOT_THE_RUN:
        section, _, field = name.rpartition(".")
        (sections[section] if section else sections).pop(field)
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _from_home(value: Any) -> Any:
    """A value of settings in which `~` stands for the home."""
    if isinstance(value, dict):
        return {name: _from_home(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_from_home, value))
    home = str(Path.home())
    return f"~{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(f"{home}/") else value
