"""From the command line to a configuration: defaults, then a YAML file, then dotted flags. Imports no torch."""

import argparse
import difflib
import functools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from recipe.config.checks import check_text, check_values, validate
from recipe.config.init_from import SHAPE, shape_of
from recipe.config.settings import BudgetChange, Config, MixtureSource, flat_fields, sections_of
from recipe.errors import RecipeError

_MOST_ARGUMENTS = 1000  # reading them takes a tenth of a second; there are fewer settings
# Settings that may hold a path, of the run and of commands.
_PATHS = (
    *("run.directory", "data.text_files", "data.token_files", "data.sources", "data.tokenizer", "data.cache_directory"),
    *("model.init_from", "evaluation.sets", "resume", "output", "task_directory"),
)

# Of what settings are lists: (setting, what one is, an example).
_PARTS: dict[type, tuple[str, str, str]] = {
    MixtureSource: ("data.sources", "source", "{dataset: user/name, weight: 0.7}"),
    BudgetChange: ("batch.schedule", "budget", "{from_tokens: 500000000, tokens_per_update: 1048576}"),
}


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults, then `--config FILE`, then `--section.field value` flags.

    Raises:
        RecipeError: an unknown key, a value of the wrong type, an unreadable file, or values that contradict each other.
    """
    config: Config = parse_run(run_parser(), Config, arguments)[0]
    return config


@functools.cache
def run_parser() -> Any:
    """The parser of a run. Making one takes 0.2 s, and a report reads many configurations."""
    return make_parser(Config, "accelerate launch recipe/train.py", "Train a GPT-2 whose batch is counted in tokens.")


def make_parser(config_class: type, program: str, description: str) -> Any:
    """A jsonargparse parser with `--config`, `--help` and one dotted flag for each field of `config_class`."""
    import jsonargparse
    import yaml

    from recipe.config.yaml_text import ReadSettings, load_yaml

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, (yaml.YAMLError,))
    # Of a class that it does not know, it would import whatever the value names.
    for kind in _PARTS:
        read = functools.partial(_read_part, kind)
        jsonargparse.typing.register_type(kind, asdict, read, fail_already_registered=False)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description=description,
        usage="%(prog)s [--config FILE] [--SECTION.FIELD VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,  # a later setting could change what a shortened flag means
    )
    text = "YAML file: a preset, or the config.yaml of an earlier run."
    parser.add_argument("--config", action=ReadSettings, help=text)
    parser.add_class_arguments(config_class)
    for section in sections_of(config_class):  # jsonargparse would read a whole section from any file or device
        action = parser._option_string_actions.pop(f"--{section}")
        parser._remove_action(action)
        action.help = argparse.SUPPRESS
    return parser


@functools.cache
def _part_parser(kind: type) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def _read_part(kind: type, settings: Any) -> Any:
    """One of `data.sources` or of `batch.schedule`, from what YAML or JSON has of it.

    Raises:
        RecipeError: it is no mapping, or not of its settings.
    """
    name, what, example = _PARTS[kind]
    if not isinstance(settings, dict):
        raise RecipeError(f"{name}: {settings!r} is no {what}: give a list of mappings, such as [{example}]")
    parser = _part_parser(kind)
    try:
        return kind(**vars(parser.parse_object(settings)))
    except argparse.ArgumentError as error:
        helps = {action.dest: action.help for action in parser._actions if action.dest != "help"}
        raise RecipeError(f"{name}: {_explain(str(error), helps).removeprefix('--')}") from None


def parse(parser: Any, config_class: type, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Parse `arguments` with a parser of `make_parser`, and check each value against its field.

    Returns: (instance of `config_class`, namespace of the other arguments).
    Raises:
        RecipeError: instead of argparse's usage text and exit.
    """
    types = dict(flat_fields(config_class))
    joined = _join_lists(arguments, [f"--{n}" for n, t in types.items() if "tuple" in str(t)])
    if len(joined) > _MOST_ARGUMENTS:
        raise RecipeError(f"{len(joined):,} arguments: give {_MOST_ARGUMENTS:,} at most, and put a glob in quotes")
    try:
        namespace = parser.parse_args(joined)
    except argparse.ArgumentError as error:
        raise RecipeError(_explain(str(error), {a.dest: a.help for a in parser._actions if a.dest in types})) from None
    except OverflowError:
        longest = max(joined, key=lambda argument: sum(map(str.isdigit, argument)))
        raise RecipeError(f"{longest[:60]}... has too many digits for a setting") from None
    try:
        for name in (name for name in _PATHS if name in types):
            namespace[name] = _expand_home(namespace[name])
        values = parser.instantiate(namespace)
    except (KeyError, TypeError):
        sections = [name for name in sections_of(config_class) if not hasattr(namespace[name], "keys")]
        raise RecipeError(f"--config: each section has to be a mapping of settings; look at {sections}") from None
    config = config_class(**{f.name: values.pop(f.name) for f in fields(config_class)})
    check_values(config)
    for name, value in values.items():
        check_text(name, value)
    return config, values


def parse_run(parser: Any, config_class: type[Config], arguments: Sequence[str]) -> tuple[Any, Any]:
    """`parse` for a run to plan or to train: its model has the shape of `model.init_from`, and its settings fit together.

    Raises:
        RecipeError: also for settings that contradict each other, and for an `init_from` that this recipe cannot train.
    """
    config, rest = parse(parser, config_class, arguments)
    if config.model.init_from is not None:
        config = replace(config, model=replace(config.model, **_initial_shape(config)))
        check_values(config)
    validate(config)
    return config, rest


def _initial_shape(config: Config) -> dict[str, Any]:
    """The shape of `model.init_from`; if that cannot be read any more, the shape of the run that goes on without it."""
    name = str(config.model.init_from)
    try:
        return shape_of(name)
    except RecipeError:
        if config.resume not in ("auto", "fresh"):
            return {}  # as it is stated: resuming compares it with the checkpoint's
        path = Path(config.run.directory, "config.yaml")
        if config.resume == "auto" and path.is_file() and (earlier := read_config(path).model).init_from == name:
            return {field: getattr(earlier, field) for field in SHAPE}
        raise


def write_config(config: Config, path: Path) -> None:
    """Write every value, so that `--config path` gives the same configuration again; of addresses what `Config.public` has."""
    import yaml

    path.write_text(yaml.safe_dump(asdict(config.public), sort_keys=False), encoding="utf-8")


def read_config(path: Path) -> Config:
    """The configuration that `write_config` wrote. What it names, such as text files, may be gone.

    Raises:
        RecipeError: it cannot be read, or is not the configuration of a run of this version.
    """
    try:
        config: Config = parse(run_parser(), Config, ["--config", str(path)])[0]
    except Exception as error:  # a damaged file gets any out of the libraries under this
        raise RecipeError(f"{path} is not the configuration of a run of this version: {error}") from None
    return config


def config_of_checkpoint(checkpoint: Path, settings: dict[str, Any]) -> Config:
    """The configuration that a checkpoint has in flat names.

    Raises:
        RecipeError: it is not of this version.
    """
    import yaml

    sections: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[field] = value
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "settings-of-the-checkpoint.yaml"
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        try:
            config: Config = parse(run_parser(), Config, ["--config", str(path)])[0]
        except RecipeError as error:
            raise RecipeError(f"{checkpoint} is of a run of another version of this recipe: {error}") from None
    return config


def _expand_home(value: Any) -> Any:
    """`~` at the start of a path is the home, also where no shell has seen it: in a YAML, in quotes, behind `=`."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **_expand_home(vars(value)))
    if isinstance(value, dict):
        return {name: _expand_home(path) for name, path in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def _join_lists(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """`--data.text_files a b` -> `--data.text_files=["a", "b"]`: a flag among `lists` takes what a shell glob expands to."""
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, is_given, value = argument.partition("=")
        if flag in lists:
            values = [value] if is_given else []
            while not is_given and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise RecipeError(f"{argument} needs a value")
            is_list = len(values) == 1 and re.fullmatch(r"\s*\[\s*[\"'{\]](.*\])?\s*", values[0], re.DOTALL)
            argument = f"{flag}={values[0] if is_list else json.dumps(values, ensure_ascii=False)}"
        joined.append(argument)
    return joined


def _explain(message: str, helps: dict[str, str]) -> str:
    """jsonargparse's message in one line; for an unknown setting, the nearest of those that have a text in `helps`."""
    message = " ".join(message.split())
    for pattern, text in (
        (r'^Parser key "([^"]+)": ', r"--\1: "),
        (r"Expected an? (.+)\. Got value: ", r"expected \1, got "),
        (r"Does not validate .* Subtypes: \[(.+)\] Errors: .* Given value: ", r"expected \1, got "),
        (r"typing\.|<class '|'>", ""),
        (r"expected tuple", "expected list"),
        (r"NoneType|None$", "null"),
    ):
        message = re.sub(pattern, text, message)
    unknown = (
        re.search(r"unrecognized arguments: --()([\w.+]+)", message)
        or re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        or re.search(r"[Oo]ption '()([\w.]+)' is not accepted", message)
    )
    if not unknown:
        return message
    key = f"{unknown[1]}.{unknown[2]}".lstrip(".")
    section, _, leaf = key.strip(".").rpartition(".")
    if not leaf or len(key) > 100:
        return message

    def likeness(name: str) -> float:
        of_section, _, of_leaf = name.rpartition(".")
        same_start = os.path.commonprefix([leaf, of_leaf])  # noqa: RUF071 (strings, not paths)
        # A setting that has a new name still says in its help what its old name said.
        is_meant = same_start == leaf or all(word in helps[name] for word in leaf.split("_"))
        score = difflib.SequenceMatcher(None, key, name).ratio() + len(same_start) / len(leaf)
        return score + 2 * (section == of_section and is_meant)

    return f"{key} is not a setting; did you mean {max(helps, key=likeness)}? --help lists all"
