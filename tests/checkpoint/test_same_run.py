"""Which settings may differ from those of the checkpoint that a run goes on from; of a mixture, those of each source."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoint.files import take_snapshot, write_checkpoint
from recipe.checkpoint.resume import find_resume_point
from recipe.config.settings import (
    BatchConfig,
    BudgetChange,
    Config,
    DataConfig,
    MixtureSource,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    flat_settings,
)
from recipe.errors import RecipeError
from tests.support.checkpoints import state_of, trained

SOURCES = MixtureSource(text_files=("a/x.jsonl",)), MixtureSource(dataset="user/b", weight=2.0)


def configured(directory: Path, batch: BatchConfig = BatchConfig(), **data: Any) -> Config:  # noqa: B008 (frozen)
    return Config(run=RunConfig(directory=str(directory)), batch=batch, data=DataConfig(**data))


def with_source(number: int, **values: Any) -> dict[str, Any]:
    sources = list(SOURCES)
    sources[number] = replace(sources[number], **values)
    return {"sources": tuple(sources)}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a checkpoint of a run with these settings, and a record of its text or none."""
    model, optimizer, tokenizer = trained()
    snapshot, gpt2 = take_snapshot(model, optimizer), model.gpt2

    def write(config: dict[str, Any], text: str = "recorded", tokens: int = 500) -> Path:
        directory = tmp_path_factory.mktemp("run")
        state = replace(state_of(5), config=config, text=text, tokens=tokens)
        write_checkpoint(directory / "checkpoints", snapshot, state, gpt2.config, tokenizer)
        return directory

    return write


def changes(directory: Path, config: Config) -> dict[str, list[Any]]:
    return find_resume_point(replace(config, run=RunConfig(directory=str(directory)))).changes


def test_a_setting_that_a_checkpoint_does_not_know_was_its_default(write: Any) -> None:
    """A newer version has settings that change nothing unless they are set; also those of each source."""
    config = configured(Path("runs/default"), sources=SOURCES)
    earlier = flat_settings(config)
    for name in (
        "data.token_dtype",
        "data.rows_are",
        "data.token_files",
        "precision",
        "model.dropout",
        "evaluation.sets",
    ):
        del earlier[name]
    for source in earlier["data.sources"]:
        del source["rows_are"], source["token_files"]
    directory = write(earlier)
    assert set(changes(directory, config)) <= {"run.directory"}
    for other, words in (
        (replace(config, model=replace(config.model, dropout=0.1)), r"model\.dropout was 0\.0 and is 0\.1"),
        (configured(directory, rows_are="packed", sources=SOURCES), r"data\.rows_are was 'documents' and is 'packed'"),
        (
            configured(directory, **with_source(1, rows_are="packed")),
            r"data\.sources\[1\]\.rows_are was 'documents' and",
        ),
    ):
        with pytest.raises(RecipeError, match=words):
            changes(directory, other)
    del earlier["data.sources"]
    assert not changes(write(earlier), configured(Path("x"))).keys() - {"run.directory"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_source(1, weight=3.0), r"data\.sources\[1\]\.weight was 2\.0 and is 3\.0; use another --run\.directory"),
        (with_source(1, dataset="other/b"), r"data\.sources\[1\]\.dataset was 'user/b' and is 'other/b'"),
        (with_source(0, name="y"), r"data\.sources\[0\]\.name was 'x' and is 'y'"),
        (with_source(0, text_files=("a/y.jsonl",)), r"data\.sources\[0\]\.name was 'x' and is 'y'"),
        (with_source(1, text_files=("b.jsonl",)), r"data\.sources\[1\]\.text_files was \[\] and is \['b\.jsonl'\]"),
        ({"sources": SOURCES[::-1]}, r"data\.sources\[0\]\.dataset was None and is 'user/b'"),
        ({"sources": SOURCES[:1]}, r"data\.sources was \[.* and is \["),
        (
            {"sources": SOURCES, "batch": BatchConfig(schedule=(BudgetChange(9, 524_288),))},
            r"batch\.schedule was \[\] and is \[",
        ),
        ({}, r"data\.sources was \[.* and is \[\]"),
    ],
)
def test_another_mixture_is_refused_with_the_difference(values: dict[str, Any], words: str, write: Any) -> None:
    config = configured(Path("runs/default"), sources=SOURCES)
    directory = write(flat_settings(config))
    with pytest.raises(RecipeError, match=words):
        changes(directory, configured(directory, **values))


@pytest.mark.parametrize(
    ("tokens", "values", "words"),
    [
        (8000, {"total_tokens": 20_000}, ""),
        (8000, {"total_tokens": 12_000, "decay_tokens": 4000}, ""),
        (8000, {"total_tokens": 100_000, "decay_tokens": 92_000}, ""),
        (8001, {"decay_tokens": 2000}, ""),  # a fifth, as it was
        (8000, {"shape": "linear"}, "schedule.shape was 'wsd' and is 'linear'"),
        (8001, {"total_tokens": 20_000}, "can change no more: its decay began at 8,000 tokens, and {} is at 8,001"),
        (8001, {"decay_tokens": 1000}, "can change no more"),
        (
            8000,
            {"total_tokens": 9000},
            "a run of 9,000 tokens would have begun to decay at 7,200, and {} is at 8,000 already: "
            "set --schedule.total_tokens 10000 or more",
        ),
        (8000, {"decay_tokens": 2100}, "would have begun to decay at 7,900"),
        (8000, {"decay_tokens": 3000, "total_tokens": 10_500}, "--schedule.total_tokens 11000 or more"),
    ],
)
def test_the_length_of_a_stable_run_may_change_until_its_decay_begins(
    tokens: int, values: dict[str, Any], words: str, write: Any
) -> None:
    schedule = ScheduleConfig(total_tokens=10_000, warmup_tokens=1000, shape="wsd")
    batch, data, model = (
        BatchConfig(tokens_per_update=100, lanes=1),
        DataConfig(sequence_length=100),
        ModelConfig(n_layer=1),
    )
    config = Config(batch=batch, data=data, model=model, schedule=schedule)
    directory = write(flat_settings(config), tokens=tokens)
    other = replace(config, schedule=replace(schedule, **values))
    if not words:
        assert set(changes(directory, other)) - {"run.directory"} == {f"schedule.{name}" for name in values}
        return
    with pytest.raises(RecipeError, match=re.escape(words.format(directory / "checkpoints/step-000005"))):
        changes(directory, other)


def test_files_of_a_source_may_move_if_their_text_is_recorded(write: Any) -> None:
    """Their text is compared then, and the names of columns stay; how often a source may be read is not the order of data."""
    config = configured(Path("runs/default"), sources=SOURCES)
    moved = configured(Path("x"), **with_source(0, text_files=("b/y.jsonl",), name="x", max_passes=7))
    found = changes(write(flat_settings(config)), moved)
    del found["run.directory"]
    assert found == {
        "data.sources[0].text_files": [["a/x.jsonl"], ["b/y.jsonl"]],
        "data.sources[0].max_passes": [None, 7],
    }
    with pytest.raises(RecipeError, match=r"data\.sources\[0\]\.text_files was"):
        changes(write(flat_settings(config), text=""), moved)
