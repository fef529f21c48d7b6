"""A run in words, for the page and the card: the words are in templates/, here are their formats and what they look up."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipe.config.settings import HELD_OUT, STANDARD_LIBRARY, STANDARD_LIBRARY_VALIDATION_ONE_IN, Config
from recipe.config.text_files import is_remote, public_name
from recipe.format import duration, event_name, event_text, percent, short_count, size_text
from recipe.report.record import Record, smoothing_window, some_of_each_kind

NOT_THE_RUN = ("run.directory", "resume", "log", "hub", "data.cache_directory")


@cache
def environment() -> Environment:
    """The templates of page and card. Only the page escapes what it shows: samples hold any text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: (name or "").endswith(".html.jinja"),
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
        "cell": markdown_cell,
    }
    plain = (event_name, event_text, fenced, smoothing_window, some_of_each_kind, repeatable_config, names_of_files)
    templates.filters |= {function.__name__: function for function in plain}
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    templates.globals |= {
        "HELD_OUT": HELD_OUT,
        "STANDARD_LIBRARY": STANDARD_LIBRARY,
        "STANDARD_LIBRARY_VALIDATION_ONE_IN": STANDARD_LIBRARY_VALIDATION_ONE_IN,
        "hub_dataset": hub_dataset,
        "initial_weights": initial_weights,
    }
    return templates


def _if_known(form: Callable[..., str]) -> Callable[..., str]:
    """`form`, which has no text for None and NaN."""
    return lambda value, *more: "" if value is None or value != value else form(value, *more)


def markdown_cell(value: str) -> str:
    """Text that a Markdown table shows as it is, in one line."""
    text = re.sub(r"([\\|*`\[\]])", r"\\\1", value.replace("\n", " "))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def fenced(text: str) -> str:
    """A Markdown code block, whatever the text holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def rows_of(record: Record, validation_sets: Sequence[str]) -> Any:
    """The lists and tables of rows.jinja, as attributes.

    The summary names `validation_sets`, so that runs side by side have the same rows.
    """
    return environment().get_template("rows.jinja").make_module({"record": record, "validation_sets": validation_sets})


def hub_dataset(config: Config) -> str | None:
    """The id of the Hub dataset that a run read; None if it read something else."""
    is_other = config.data.text_files or config.data.dataset == STANDARD_LIBRARY
    return None if is_other or not is_hub_id(config.data.repository) else config.data.repository


def names_of_files(text_files: Sequence[str]) -> str:
    """What text files are called: addresses, and names without their directories, which are the author's own."""
    where = "" if any(map(is_remote, text_files)) else "local "
    names = [public_name(path) if is_remote(path) else Path(path).name for path in text_files[:5]]
    return f"{where}files: {', '.join(names)}{', ...' if len(text_files) > 5 else ''}"


def is_hub_id(name: str) -> bool:
    """Whether this can be a name on the Hub, and is nothing on this machine."""
    return re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) is not None and not Path(name).exists()


def initial_weights(config: Config) -> str | None:
    """What the run started from: a name on the Hub, or the last part of a directory; None for random weights."""
    name = config.model.init_from
    return name if name is None or is_hub_id(name) else Path(name).name


def repeatable_config(config: Config) -> str:
    """config.yaml without the settings that say where a run is written and who hears of it: `--config` repeats the run."""
    sections = asdict(config.public)
    for name in NOT_THE_RUN:
        section, _, field = name.rpartition(".")
        (sections[section] if section else sections).pop(field)
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
