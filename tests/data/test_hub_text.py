"""Text of the Hub and of other servers: how little is asked for, by whom, and what a start does when a server fails."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

import recipe.data.documents as documents_module
import recipe.data.find as find_module
import recipe.data.remote_files as remote_files
from recipe.checkpoint.resume import ResumePoint
from recipe.checkpoint.same_text import open_text
from recipe.config.settings import Config, EvaluationConfig
from recipe.data.blocks import next_update
from recipe.data.find import find_files_of
from recipe.data.parquet import TAIL_BYTES
from recipe.data.record import unpack_record
from recipe.data.sources import describe, open_source
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.evaluation.in_run import read_validation_sets
from tests.helpers import expect_error
from tests.support.checkpoints import state_of
from tests.support.http_server import HUB_COMMIT, HUB_DATASET, HttpServer, for_ever
from tests.support.lanes import CPU, config_for, lane_of
from tests.support.runs import make_run
from tests.support.tokenizers import save_byte_tokenizer

GROUPS, ROWS = 6, 40
TEXTS = [f"{number} " + "some words of a text " * 20 for number in range(GROUPS * ROWS)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """A Hub with one dataset of one Parquet file, of which the text is a small part."""
    import datasets

    served = tmp_path / "served"
    served.mkdir()
    table = pa.table(
        {"id": [f"{n:064x}" * 20 for n in range(len(TEXTS))], "text": TEXTS, "more": [b"x" * 500] * len(TEXTS)}
    )
    pq.write_table(table, served / "a.parquet", row_group_size=ROWS, compression="none", use_dictionary=False)
    HfFileSystem.clear_instance_cache()
    with HttpServer(served) as server:
        endpoint = server.address("").rstrip("/")
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module, name, value in (
            *((constants, "ENDPOINT", endpoint), (constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)),
            *((constants, "HF_HUB_OFFLINE", False), (datasets.config, "HF_ENDPOINT", endpoint)),
            *((datasets.config, "HF_HUB_OFFLINE", False), (datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")),
            *((remote_files, "PAUSES_SECONDS", (0.001, 0.002)), (documents_module, "FIRST_PAUSE_SECONDS", 0.01)),
            *((find_module, "_FIRST_PAUSE_SECONDS", 0.01),),
        ):
            monkeypatch.setattr(module, name, value)
        yield server


def config_of(tmp_path: Path, lanes: int = 2, **data: object) -> Config:
    config = config_for(tmp_path, lanes=lanes)
    settings: dict[str, Any] = {"dataset": HUB_DATASET, "text_files": (), "retry_seconds": 20.0, **data}
    return replace(config, data=replace(config.data, **settings))


def test_a_dataset_is_pinned_to_its_commit_and_said_to_be_open(server: HttpServer, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    files = find_files_of(config)
    source = open_source(config, files=files)
    line = describe(source, files, 2, 10**6)
    assert line.startswith(f"{HUB_DATASET} at {HUB_COMMIT[:12]}, 1 files, {GROUPS} shards for 2 lanes, ")
    assert re.search(r"kB of text: [\d,.]+ passes.*up to [\d.]+ kB of row groups in memory", line), line
    assert sorted(source.training_documents()) == sorted(TEXTS)


def test_of_a_row_group_nothing_but_its_text_is_asked_for_once(server: HttpServer, tmp_path: Path) -> None:
    source = open_source(config_of(tmp_path))
    opened, ranges = server.requests.count("a.parquet"), len(server.ranges)
    assert list(source.training_documents()) == TEXTS
    read = server.ranges[ranges:]
    assert len(read) == GROUPS, "the footer is known"
    text = sum(len(text) + 4 for text in TEXTS)
    assert text <= sum(end - start for start, end in read) < 1.1 * text
    assert opened <= 3, "the end, perhaps the rest of the footer"
    assert sum(end - start for start, end in server.ranges[:ranges]) < 2 * TAIL_BYTES


def test_a_dataset_of_token_ids_is_found_by_its_column(server: HttpServer, tmp_path: Path) -> None:
    """Without a setting; and nothing but the ids of a row group is asked for."""
    ids = [[*text.encode()] for text in TEXTS]
    table = pa.table({"id": ["x" * 900] * len(ids), "input_ids": pa.array(ids, pa.list_(pa.uint16()))})
    pq.write_table(table, tmp_path / "served/a.parquet", row_group_size=ROWS, compression="none", use_dictionary=False)
    source = open_source(config_of(tmp_path, tokenizer=save_byte_tokenizer(tmp_path / "tokenizer")))
    assert source.holds_ids
    assert source.training.tokens == sum(map(len, ids))
    before = len(server.ranges)
    assert [np.asarray(document).tolist() for document in source.training_documents()] == ids
    asked = sum(end - start for start, end in server.ranges[before:])
    assert asked < 4.2 * sum(map(len, ids)), "Parquet has no integers of two bytes"
    named = config_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"), token_column="id")
    expect_error(["holds string, not lists of integers", "one of ['input_ids']"], lambda: open_source(named))


def test_other_ranks_ask_for_nothing_but_their_text(server: HttpServer, tmp_path: Path) -> None:
    told = pickle.dumps(open_source(config_of(tmp_path)))
    asked = len(server.paths), len(server.api)
    lane = lane_of(pickle.loads(told), 1, 2)
    lane.next_blocks(3)
    assert (len(server.paths) - asked[0], len(server.api) - asked[1]) == (1, 0)


def test_the_next_row_group_is_fetched_before_it_is_needed(server: HttpServer, tmp_path: Path) -> None:
    source = open_source(config_of(tmp_path))
    rows = source.read_shard(0, None, [3])
    before = len(server.ranges)
    for row in range(ROWS):
        next(rows)
        if row == ROWS // 2:
            assert len(server.ranges) == before + 1
    source.training.reader._ahead[source.training.parts[3].file.address, 3].result()
    assert len(server.ranges) == before + 2
    assert [text for text, _ in source.read_shard(3)] == TEXTS[3 * ROWS : 4 * ROWS]
    assert len(server.ranges) == before + 2, "and not twice"


def test_lanes_are_read_side_by_side(server: HttpServer, tmp_path: Path) -> None:
    """The server answers when as many requests as lanes have come; one after the other they would wait for ever."""
    source = open_source(config_of(tmp_path, lanes=4))
    gathering = server.gather(4)
    blocks = next_update([lane_of(source, index, 4) for index in range(4)], 2, CPU)
    assert blocks.blocks.shape[0] == 8
    assert not gathering.broken


@pytest.mark.parametrize("fault", ["500", "429"])
def test_a_start_is_tried_again(fault: str, server: HttpServer, tmp_path: Path) -> None:
    server.plan("api", [fault] * 4)
    said: list[str] = []
    files = find_files_of(config_of(tmp_path), say=said.append)
    assert len(files) == 1
    assert said
    assert all(line.startswith("trying again: ") and fault in line for line in said)


def test_a_start_that_cannot_be_is_one_line(server: HttpServer, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read data\.dataset = .nobody/nothing.*--data\.text_files"):
        find_files_of(config_of(tmp_path, dataset="nobody/nothing"))
    with pytest.raises(RecipeError, match=r"data\.split = .dev.: .* has train"):
        find_files_of(config_of(tmp_path, split="dev"))
    (server.directory / "a.parquet").rename(server.directory / "a.csv")
    HfFileSystem.clear_instance_cache()  # of listings
    with pytest.raises(RecipeError, match=r"not of one of the formats .*a\.csv.*--data\.revision refs/convert/parquet"):
        find_files_of(config_of(tmp_path))
    server.plan("api", for_ever("500"))
    with pytest.raises(RecipeError, match=r"cannot read .*500"):
        find_files_of(config_of(tmp_path, retry_seconds=0.2))


def test_a_resumed_run_reads_the_commit_it_has_read(server: HttpServer, tmp_path: Path) -> None:
    run = make_run(config_of(tmp_path))
    open_text(run, ResumePoint())
    ((name, _, commit, _),) = unpack_record(run.text_record)
    assert (name, commit) == (HUB_DATASET, HUB_COMMIT)
    earlier = replace(state_of(1), text=run.text_record, config={"data.dataset": HUB_DATASET})
    server.commit = "f" * 40
    open_text(run, ResumePoint(Path("step-1"), earlier))
    ((_, _, commit, _),) = unpack_record(run.text_record)
    assert commit == HUB_COMMIT
    again = replace(run, config=config_of(tmp_path, revision="main"))
    with pytest.raises(RecipeError, match=f"is at commit {'f' * 40} now and was at {HUB_COMMIT}"):
        open_text(again, ResumePoint(Path("step-1"), earlier))


def test_the_validation_set_is_asked_for_once(server: HttpServer, tmp_path: Path) -> None:
    """Also where what is kept of it is not whole."""
    config = replace(config_of(tmp_path, validation_one_in=4), evaluation=EvaluationConfig(tokens=2000))
    tokenizer = train_tokenizer(TEXTS[:20], 300)
    source = open_source(config)
    first = read_validation_sets(config, [source], tokenizer)["held_out"]
    asked = len(server.ranges)
    again = read_validation_sets(config, [source], tokenizer)["held_out"]
    assert len(server.ranges) == asked
    (kept,) = config.cache_directory.glob("validation/*.npz")
    kept.write_bytes(kept.read_bytes()[:200])
    third = read_validation_sets(config, [source], tokenizer)["held_out"]
    assert len(server.ranges) > asked
    for found in (again, third):
        np.testing.assert_array_equal(found.blocks, first.blocks)
        assert replace(found, blocks=first.blocks) == first
    read_validation_sets(config, [source], train_tokenizer(["other words entirely"], 300))
    assert len(list(config.cache_directory.glob("validation/*.npz"))) == 2, "another tokenizer, another set"


def test_row_groups_that_do_not_fit_into_memory_are_refused(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks on one machine it is all lanes, on two machines half of them."""
    files = find_files_of(config_of(tmp_path))
    largest = open_source(config_of(tmp_path), files=files).training.reader.largest_bytes
    assert largest > 2 * ROWS * 400
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.5 * largest))
    with pytest.raises(
        RecipeError, match=r"2 lanes hold up to .* kB each.*this machine has .* left; set --batch\.lanes"
    ):
        open_source(config_of(tmp_path), files=files)
    monkeypatch.setenv("WORLD_SIZE", "2")
    open_source(config_of(tmp_path), files=files)
