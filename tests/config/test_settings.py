"""Settings: their bounds, their flags, and the file that holds them all."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from recipe.commands.evaluate import EvaluateConfig
from recipe.commands.plan import PlanConfig
from recipe.config.checks import check_values
from recipe.config.command_line import load_config, make_parser, parse, read_config, write_config
from recipe.config.settings import (
    AtLeast,
    Below,
    Config,
    EvaluationConfig,
    RunConfig,
    flat_fields,
    flat_settings,
)
from recipe.errors import RecipeError
from recipe.evaluation.sample import GenerateConfig
from tests.helpers import TINY, write_texts

CLASSES = (Config, PlanConfig, EvaluateConfig, GenerateConfig)


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_number_has_a_bound_and_nothing_beyond_it_is_taken(config_class: type) -> None:
    parser, of_a_run = make_parser(config_class, "test", ""), flat_fields(Config)
    for name, annotation in flat_fields(config_class):
        if config_class is not Config and (name, annotation) in of_a_run:
            continue  # parsing takes a while
        is_number = re.search(r"\b(int|float)\b", str(annotation)) is not None
        directions = {bound.holds(1, 2) for bound in getattr(annotation, "__metadata__", ())}
        assert directions == ({True, False} if is_number else set()), f"{name} is {annotation}: bounds above and below"
        for bound in getattr(annotation, "__metadata__", ()):
            beside = (bound.limit, bound.limit - 1, 2 * bound.limit + 1)
            beyond = next(v for v in beside if not bound.holds(v, bound.limit))
            with pytest.raises(RecipeError) as refused:
                parse(parser, config_class, [f"--{name}={beyond}"])
            assert str(refused.value).startswith(f"{name} = ")
            assert f"must be {bound.words} {bound.limit:,}" in str(refused.value)


@dataclass(frozen=True)
class Section:
    share: Annotated[float | None, AtLeast(0), Below(1, "of one")] = 0.5


@dataclass(frozen=True)
class Whole:
    section: Section = field(default_factory=Section)
    word: str = "x"


def test_bounds_hold_for_any_dataclass_with_sections() -> None:
    check_values(Whole())
    check_values(Whole(Section(None)))
    with pytest.raises(RecipeError, match=r"^section\.share = 1\.0: must be below 1, of one$"):
        check_values(Whole(Section(1.0)))
    with pytest.raises(RecipeError, match=r"^word = null: it needs a value \(str\)$"):
        check_values(Whole(word=None))  # type: ignore[arg-type]


def test_every_list_takes_words_one_after_the_other() -> None:
    config = load_config(
        ["--log.trackers", "tensorboard", "trackio", "--evaluation.prompts", "a b", "", "--run.seed", "3"]
    )
    assert (config.log.trackers, config.evaluation.prompts) == (("tensorboard", "trackio"), ("a b", ""))
    for given in (
        ["--evaluation.prompts", "\x7f\u2028\U0001f600\n a: *b"],
        ["--evaluation.prompts=\x7f\u2028\U0001f600\n a: *b"],
    ):
        assert load_config(given).evaluation.prompts == ("\x7f\u2028\U0001f600\n a: *b",), "character for character"
    parser = make_parser(EvaluateConfig, "test", "")
    evaluation, _ = parse(parser, EvaluateConfig, ["--tasks", "a", "b", "--tokens", "5"])
    assert (evaluation.tasks, evaluation.tokens) == (("a", "b"), 5)


def test_a_tilde_is_the_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a YAML and in flags; in the run and in commands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "checkpoint").mkdir()
    write_texts(tmp_path, count=1)
    (tmp_path / "run.yaml").write_text(
        "run: {directory: ~/run}\ndata: {text_files: [~/*.txt, ~/000.txt], cache_directory: ~/cache, tokenizer: ~/tokenizer}\n"
        "evaluation: {sets: {mine: ~/0*.txt}}\n"
    )
    config = load_config(["--config", str(tmp_path / "run.yaml"), "--resume=~/checkpoint"])
    assert config.run.directory == f"{tmp_path}/run"
    assert config.data.text_files == (f"{tmp_path}/*.txt", f"{tmp_path}/000.txt")
    assert (config.data.cache_directory, config.data.tokenizer) == (f"{tmp_path}/cache", f"{tmp_path}/tokenizer")
    assert config.evaluation.sets == {"mine": f"{tmp_path}/0*.txt"}
    assert config.resume == f"{tmp_path}/checkpoint"
    with pytest.raises(RecipeError, match=f"model.init_from.*{tmp_path}/model"):
        load_config(["--model.init_from=~/model"])
    parser = make_parser(EvaluateConfig, "evaluate", "")
    given = ["--output=~/a.json", "--task_directory=~/tasks", "--data.text_files", "~/a.txt"]
    command = parse(parser, EvaluateConfig, given)[0]
    assert (command.output, command.task_directory) == (f"{tmp_path}/a.json", f"{tmp_path}/tasks")
    assert command.data.text_files == (f"{tmp_path}/a.txt",)


def test_a_written_configuration_is_read_as_the_same(tmp_path: Path) -> None:
    """Also where what it names is gone: here a file of a validation set."""
    config = load_config([*TINY, "--evaluation.prompts", "a", "b", "--batch.micro_batch_size", "auto"])
    config = replace(config, evaluation=replace(config.evaluation, sets={"code": "no/such/file.txt"}))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert load_config(["--config", str(tmp_path / "config.yaml"), "--evaluation.sets", "{}"]) == replace(
        config, evaluation=replace(config.evaluation, sets={})
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("run: [", "not valid YAML"),
        ("just a sentence", ""),
        ("run: {seed: null}", "run.seed = null"),
        ("performance: {products: auto}", "performance.products is not a setting; did you mean performance.matmul"),
    ],
    ids=["no file", "no YAML", "no settings", "no value", "an earlier version"],
)
def test_a_file_that_is_no_configuration_of_a_run_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"is not the configuration of a run of this version: ") as refused:
        read_config(path)
    assert str(refused.value).startswith(str(path))
    assert words in str(refused.value)


def test_flat_settings_are_what_json_gives_back() -> None:
    config = Config(run=RunConfig(seed=7), evaluation=EvaluationConfig(prompts=("a", "b"), sets={"code": "x"}))
    flat = flat_settings(config)
    assert [*flat] == [name for name, _ in flat_fields(Config)]
    assert (flat["run.seed"], flat["evaluation.prompts"], flat["evaluation.sets"]) == (7, ["a", "b"], {"code": "x"})
    assert json.loads(json.dumps(flat)) == flat == yaml.safe_load(yaml.safe_dump(flat))


@pytest.mark.parametrize("config_class", CLASSES)
def test_help_has_a_text_for_every_setting_and_no_names_of_bounds(config_class: type) -> None:
    parser = make_parser(config_class, "test", "")
    helps: dict[str, Any] = {action.dest: action.help for action in parser._actions}
    for name, _ in flat_fields(config_class):
        assert helps[name], name
    assert not any(word in parser.format_help() for word in ("Annotated", "Bound", "AtLeast"))
