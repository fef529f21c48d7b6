"""From the command line to a configuration: defaults, then a YAML file, then dotted flags. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from recipe.config.checks import validate
from recipe.config.settings import Config, flat_fields, value_of
from recipe.errors import RecipeError


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults, then `--config FILE`, then `--section.field value` flags.

    Raises:
        RecipeError: an unknown key, a value of the wrong type, an unreadable file, or values that contradict each other.
    """
    parser = make_parser(Config, "accelerate launch recipe/train.py", "Train a GPT-2 whose batch is counted in tokens.")
    config, _ = parse(parser, Config, arguments)
    validate(config)
    return config


def make_parser(config_class: type, program: str, description: str) -> Any:
    """A jsonargparse parser with `--config`, `--help` and one dotted flag for each field of `config_class`."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description=description,
        usage="%(prog)s [--config FILE] [--SECTION.FIELD VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,  # a later setting could change what a shortened flag means
    )
    parser.add_argument("--config", action="config", help="YAML file: a preset, or the config.yaml of an earlier run.")
    parser.add_class_arguments(config_class)
    sections = {f.name for f in fields(config_class)}
    for action in parser._actions:  # a whole section from a file of its own is more than anybody needs to read about
        if action.dest in sections and "config" in type(action).__name__.lower():
            action.help = argparse.SUPPRESS
    return parser


def parse(parser: Any, config_class: type, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Parse `arguments` with a parser of `make_parser`.

    Returns: (instance of `config_class`, namespace of the other arguments).
    Raises:
        RecipeError: instead of argparse's usage text and exit.
    """
    try:
        namespace = parser.parse_args(_join_lists(arguments))
    except argparse.ArgumentError as error:
        raise RecipeError(_explain(str(error), [name for name, _ in flat_fields(config_class)])) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"--config: not a text file ({error.reason} at byte {error.start})") from None
    try:
        values = parser.instantiate(namespace)
    except TypeError:
        sections = [f.name for f in fields(config_class) if not hasattr(namespace[f.name], "keys")]
        raise RecipeError(f"--config: each section has to be a mapping of settings; look at {sections}") from None
    return config_class(**{f.name: values.pop(f.name) for f in fields(config_class)}), values


def write_config(config: Config, path: Path) -> None:
    """Write every value, so that `--config path` gives the same configuration again."""
    import yaml

    path.write_text(yaml.safe_dump(as_dictionary(config), sort_keys=False), encoding="utf-8")


def as_dictionary(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries, with tuples as lists, for YAML, JSON and trackers."""
    values: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if hasattr(value, "__dataclass_fields__"):
            value = as_dictionary(value)
        values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def flat_dictionary(config: Config) -> dict[str, str | int | float | bool]:
    """Dotted names to plain values, as trackers take them; lists and null as text."""
    values = {}
    for name, _ in flat_fields(Config):
        value = value_of(config, name)
        values[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return values


_LISTS = ("--data.text_files", "--evaluation.prompts", "--log.trackers", "--tasks")


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """`--data.text_files a b` -> `--data.text_files=["a", "b"]`: a list flag takes what a shell glob expands to."""
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in _LISTS:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise RecipeError(f"{argument} needs a value")
            is_list = len(values) == 1 and values[0].startswith(('["', "['", "[]"))
            argument = f"{argument}={values[0] if is_list else json.dumps(values, ensure_ascii=False)}"
        joined.append(argument)
    return joined


def _explain(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in one line, with the nearest known setting where one is unknown."""
    message = " ".join(message.split())
    message = re.sub(r'^Parser key "([^"]+)": ', r"--\1: ", message)
    message = re.sub(r"Expected an? (?:typing\.|<class ')?([^>]+?)'?>?\. Got value: ", r"expected \1, got ", message)
    message = re.sub(
        r"^Problems parsing config: (.*?)(?: in \"<unicode string>\")?,", r"--config is not valid YAML: \1,", message
    )
    unknown = (
        re.search(r"unrecognized arguments: --()([\w.+]+)", message)
        or re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        or re.search(r"[Oo]ption '()([\w.]+)' is not accepted", message)
    )
    if not unknown:
        return message
    key = f"{unknown[1]}.{unknown[2]}".lstrip(".")
    leaf = key.rpartition(".")[2]

    def likeness(name: str) -> float:
        same_start = os.path.commonprefix([leaf, name.rpartition(".")[2]])  # noqa: RUF071 (strings, not paths)
        return difflib.SequenceMatcher(None, key, name).ratio() + len(same_start) / len(leaf)

    return f"{key} is not a setting; did you mean {max(known, key=likeness)}? --help lists all"
