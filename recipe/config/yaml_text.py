"""The text of settings, a YAML file or a value on the command line, read within limits. Imports no torch."""

import argparse
import json
import os
import stat
from contextlib import suppress
from typing import Any

import jsonargparse
import yaml

from recipe.errors import RecipeError

_LARGEST_FILE_BYTES = 4_000_000  # the paths of some 60,000 files
_MOST_DIGITS = 300  # a float ends at 308
_load = jsonargparse.get_loader("yaml")


class ReadSettings(argparse.Action):
    """Settings from a file come on top of those before them. jsonargparse's own action waits for pipes and reads devices."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.update(parser.parse_object(read_settings(values), defaults=False))


def read_settings(name: str) -> dict[str, Any]:
    """The sections in the YAML file of this name.

    Raises:
        RecipeError: it is no regular file, too large, no text, or nothing that `load_yaml` takes; or it has no sections.
    """
    try:
        # O_NONBLOCK: opening a pipe waits until somebody writes into it.
        with open(name, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(_LARGEST_FILE_BYTES + 1) if is_file else b""
    except (OSError, ValueError) as error:
        raise RecipeError(f"--config {name!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not is_file or len(content) > _LARGEST_FILE_BYTES:
        raise RecipeError(f"--config {name!r} is no regular file of {_LARGEST_FILE_BYTES:,} bytes at most")
    try:
        sections = load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"--config {name!r} is not a text file: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", str(error))
        place = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"--config {name!r} is not valid YAML: {problem}{place}") from None
    if not isinstance(sections, dict):
        raise RecipeError(f"--config {name!r} has no sections of settings, such as run: and batch:")
    if "config" in sections:
        raise RecipeError(f"--config {name!r}: config is not a setting; give --config twice for two files")
    return sections


def load_yaml(text: str) -> Any:
    """What jsonargparse makes of `text`; refused is what can only be a mistake, or is made to exhaust the reader.

    Raises:
        yaml.YAMLError: no YAML; an alias, which makes millions of values of ten lines; a key that is no text or stands twice;
            a number of more digits than any setting has.
    """

    def fault(node: yaml.Node, problem: str) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    try:
        if text.startswith('["'):  # a list of the command line is JSON; YAML has fewer characters, and folds lines
            with suppress(json.JSONDecodeError):
                return json.loads(text)
        nodes: list[Any] = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
        seen = set()
        for node in nodes:  # which grows
            if id(node) in seen:
                raise fault(node, "an alias (*name) is not taken: write the value again")
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                nodes += node.value
            elif isinstance(node, yaml.ScalarNode) and len(node.value) > _MOST_DIGITS and not node.tag.endswith(":str"):
                raise fault(node, f"a number of more than {_MOST_DIGITS} digits")
            elif isinstance(node, yaml.MappingNode):
                keys = set()
                for key, value in node.value:
                    if not key.tag.endswith(":str"):
                        raise fault(key, "a key is no text: put it in quotes")
                    if key.value in keys:
                        raise fault(key, f"the key {key.value} stands twice")
                    keys.add(key.value)
                    nodes.append(value)
        return _load(text)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None
