"""`data.sources`: given on the command line, in YAML and as a run writes it down; what is wrong in it is one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.config.command_line import load_config, read_config, write_config
from recipe.config.settings import Config, MixtureSource
from recipe.errors import RecipeError

TWO = [
    {"dataset": "user/name:part", "weight": 0.7},
    {"text_files": ["a.jsonl"], "weight": 3, "name": "own", "max_passes": 2},
]
# A value, and words that the line about it has. {} stands for the settings of a source.
WRONG: dict[str, tuple[Any, list[str]]] = {
    "a word": ("broken", ["'broken' is no source" , "[{dataset: user/name, weight: 0.7}]"]),
    "a number": (3, ["data.sources", "3"]),
    "null": (None, ["data.sources", "null"]),
    "a mapping": (TWO[0], ["data.sources", "user/name:part"]),
    "a list of words": (["broken"], ["broken", "is no source"]),
    "a list of lists": ([[]], ["[]", "is no source"]),
    "a list of null": ([None], ["data.sources", "is no source"]),
    "a source without anything": ([{}], ["data.sources[0].dataset", "text_files or token_files"]),
    "a class": ([{"class_path": "planted.Planted"}], ["data.sources: class_path is not a setting"]),
    "a class with arguments": ([{"class_path": "planted.Planted", "init_args": {}}], ["is not a setting"]),
    "the name of a class": ("planted.Planted", ["'planted.Planted'"]),
    "a list with the name of a class": (["planted.Planted"], ["planted.Planted", "is no source"]),
    "an unknown key": ([{"dataset": "a/b", "wieght": 1}], ["data.sources: wieght is not a setting", "did you mean weight?"]),
    "a source of sources": ([{"sources": []}], ["data.sources: sources is not a setting"]),
    "a setting of all sources": ([{"dataset": "a/b", "tokenizer": "gpt2"}], ["data.sources: tokenizer is not a setting"]),
    "files that are no list": ([{"text_files": "a.jsonl"}], ["data.sources: text_files: expected list, got a.jsonl"]),
    "no files": ([{"text_files": ["none.jsonl"]}], ["data.sources[0].text_files: no file matches 'none.jsonl'"]),
    "text and tokens": (
        [{"text_files": ["a.jsonl"], "token_files": ["a.jsonl"]}],
        ["data.sources[0]: give text_files or token_files, not both"],
    ),
    "a weight that is no number": ([{"dataset": "a/b", "weight": "much"}], ["data.sources: weight: expected float, got much"]),
    "no weight": ([TWO[0], {"dataset": "a/b", "weight": 0}], ["data.sources[1].weight = 0.0: must be greater than 0"]),
    "a negative weight": ([{"dataset": "a/b", "weight": -1}], ["data.sources[0].weight = -1.0: must be greater than 0"]),
    "a weight that is not a number": ([{"dataset": "a/b", "weight": float("nan")}], ["data.sources[0].weight = nan"]),
    "an infinite weight": ([{"dataset": "a/b", "weight": float("inf")}], ["data.sources[0].weight = inf"]),
    "null as a weight": ([{"dataset": "a/b", "weight": None}], ["data.sources[0].weight = null"]),
    "no passes": ([{"dataset": "a/b", "max_passes": 0}], ["data.sources[0].max_passes = 0: must be at least 1"]),
    "half a pass": ([{"dataset": "a/b", "max_passes": 1.5}], ["data.sources: max_passes: expected int, null, got 1.5"]),
    "a name twice": ([{"dataset": "a/b"}, {"dataset": "c/b"}], ["data.sources[1].name = 'b'", "b, held_out", "are taken"]),
    "the name of all": ([{"dataset": "a/b", "name": "held_out"}], ["data.sources[0].name = 'held_out'"]),
    "the name of a set": ([{"dataset": "a/mine"}], ["data.sources[0].name = 'mine'", "mine are taken"]),
    "a name with a slash": ([{"dataset": "a/b", "name": "b/c"}], ["data.sources[0].name = 'b/c'", "letters, digits"]),
    "no name": ([{"dataset": "a/b", "name": ""}], ["data.sources[0].name = ''"]),
    "an unknown encoding": ([{"dataset": "a/b", "encoding": "no"}], ["data.sources[0].encoding = 'no' is no encoding"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a file of text, and a module that is not to be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('imported').touch()\nclass Planted: pass\n")


def with_yaml(sources: Any) -> list[str]:
    Path("given.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    return ["--config", "given.yaml"]


def flow(sources: Any) -> str:
    return yaml.safe_dump(sources, default_flow_style=True, width=1000)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("form", ["yaml", "flag"])
def test_a_wrong_source_is_one_line_and_nothing_is_imported(case: str, form: str) -> None:
    sources, words = WRONG[case]
    given = (
        with_yaml(sources)
        if form == "yaml"
        else ["--data.sources", sources if isinstance(sources, str) else flow(sources)]
    )
    if form == "yaml" and isinstance(sources, str):
        words = ["--data.sources: expected list, got", sources]
    with pytest.raises(RecipeError) as refused:
        load_config([*given, "--evaluation.sets.mine", "a.jsonl"])
    message = str(refused.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message
    assert "import" not in message
    assert "planted" not in sys.modules
    assert not os.path.exists("imported")


def test_one_way_to_say_where_text_is(tmp_path: Path) -> None:
    for name in ("text_files", "token_files"):
        with pytest.raises(
            RecipeError, match=r"data\.sources takes the place of data\.text_files and data\.token_files"
        ):
            load_config(["--data.sources", json.dumps(TWO), f"--data.{name}", "a.jsonl"])


def test_every_form_gives_the_same_sources() -> None:
    first, second = load_config(with_yaml(TWO)).data.sources
    assert first == MixtureSource(dataset="user/name:part", weight=0.7)
    assert second == MixtureSource(text_files=("a.jsonl",), weight=3.0, name="own", max_passes=2)
    assert (first.label, second.label) == ("name-part", "own")
    lines = "[{dataset: user/name:part, weight: 0.7},\n {text_files: [a.jsonl], weight: 3, name: own, max_passes: 2}]"
    for value in (json.dumps(TWO), flow(TWO), lines, f" [ {lines[1:]}"):
        for given in (
            ["--data.sources", value],
            [f"--data.sources={value}"],
            [*with_yaml(TWO[:1]), "--data.sources", value],
        ):
            assert load_config(given).data.sources == (first, second)
    assert load_config([*with_yaml(TWO), "--data.sources", "[]"]).data.sources == ()


def test_a_configuration_with_sources_is_read_as_it_was_written() -> None:
    home = Path("~/b.txt").expanduser()
    sources = [
        {"text_files": ["https://me:secret@host/b.jsonl?key=secret"]},
        {"token_files": ["a.jsonl"], "token_column": "ids"},
    ]
    config = load_config(["--data.sources", json.dumps(sources)])
    write_config(config, Path("written.yaml"))
    assert "secret" not in Path("written.yaml").read_text()
    assert read_config(Path("written.yaml")) == config.public != config
    with pytest.raises(RecipeError, match=str(home)):
        load_config(["--data.sources", '[{"text_files": ["~/b.txt"]}]'])


def test_a_mixture_of_one_is_what_the_other_settings_say() -> None:
    """So that nothing but the columns of the ledger tells a mixture of one source from none."""
    plain = Config().data.mixture
    assert plain == (MixtureSource(dataset=Config().data.dataset),)
