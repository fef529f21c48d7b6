"""A prepared directory as a dataset repository: pushed in one commit, and read from there like the directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.config.settings import Config, PushConfig
from recipe.data.prepare import Wanted, prepare
from recipe.data.sources import open_source
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.hub.client import check_repository, push_dataset
from recipe.report.dataset_card import dataset_card
from tests.helpers import write_texts
from tests.support.hub_server import Fault, HubServer
from tests.support.lanes import config_for

SETTINGS = PushConfig("user/data")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    texts = write_texts(tmp_path / "texts", count=40)
    train_tokenizer(texts, 400).save_pretrained(tmp_path / "tokenizer")
    config = config_for(tmp_path, f"{tmp_path}/texts/*.txt", lanes=4, tokenizer=str(tmp_path / "tokenizer"))
    return replace(config, data=replace(config.data, validation_one_in=5))


def push(config: Config, directory: Path, form: Any = "parquet") -> dict[str, Any]:
    manifest = prepare(Wanted(config, directory, form), 1, lambda line: None)
    push_dataset(directory, SETTINGS, {"README.md": dataset_card("user/data", manifest)}, print)
    return manifest


def documents(config: Config) -> list[list[list[int]]]:
    source = open_source(config)
    shards = [[ids.tolist() for ids, _ in source.read_shard(shard)] for shard in range(len(source))]  # type: ignore[union-attr]
    return [[ids.tolist() for ids in source.validation_documents()], *shards]  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_is_pushed_is_read_from_the_hub_as_from_the_directory(
    online: HubServer, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    HfFileSystem.clear_instance_cache()
    manifest = push(config, tmp_path / "out")
    repository = online.repositories["user/data"]
    assert repository.private
    assert len(repository.messages) == 2, "made, and pushed"
    pushed = online.pushed("main", "user/data")
    assert {*pushed} == {*manifest["files"], "manifest.json", "README.md"}
    card = pushed["README.md"].decode()
    assert f"| train | {manifest['training']['documents']} | {manifest['training']['tokens']:,} |" in card
    assert str(tmp_path) not in card

    def tokens(**data: Any) -> Config:
        return replace(config, data=replace(config.data, text_files=(), **data))

    here = documents(tokens(token_files=(f"{tmp_path}/out/*.parquet",)))
    assert documents(tokens(token_files=("hf://datasets/user/data/*.parquet",))) == here
    train = documents(tokens(dataset="user/data", validation_one_in=None))
    assert train[1:] == here[1:], "split train has no held-out documents"
    assert not train[0]
    validation = documents(tokens(dataset="user/data", split="validation", validation_one_in=None))
    assert [ids for shard in validation[1:] for ids in shard] == here[0]


def test_another_push_takes_the_files_of_the_one_before_away(online: HubServer, config: Config, tmp_path: Path) -> None:
    push(config, tmp_path / "out")
    few = replace(
        config, data=replace(config.data, text_files=(f"{tmp_path}/texts/000.txt", f"{tmp_path}/texts/001.txt"))
    )
    few = replace(few, batch=replace(few.batch, lanes=1))
    manifest = push(replace(few, data=replace(few.data, validation_one_in=None)), tmp_path / "few", "llmc")
    pushed = online.pushed("main", "user/data")
    assert {*pushed} == {"train-00000-of-00002.bin", "train-00001-of-00002.bin", "manifest.json", "README.md"}
    assert json.loads(pushed["manifest.json"]) == manifest


def test_a_repository_that_cannot_be_written_is_refused_before_anything_is_prepared(
    online: HubServer, config: Config, tmp_path: Path
) -> None:
    online.faults = [Fault("elsewhere/.*/auth-check", 403)]
    with pytest.raises(RecipeError, match="repo_id = 'elsewhere/data' cannot be pushed to: HTTP 403"):
        check_repository(PushConfig("elsewhere/data"), "repo_id", "files", "dataset")
    assert check_repository(SETTINGS, "repo_id", "the files", "dataset") == (
        f"the files are pushed to {online.url}/datasets/user/data"
    )
