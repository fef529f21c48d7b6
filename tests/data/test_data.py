"""Documents, lanes, packing: nothing lost, nothing read twice, every position exact."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import recipe.data.documents as documents_module
import recipe.data.streams as streams_module
from recipe.config.settings import (
    STANDARD_LIBRARY_VALIDATION_ONE_IN,
    BatchConfig,
    BudgetChange,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)
from recipe.data.blocks import (
    IGNORED_TARGET,
    UpdateReader,
    combine_hashes,
    hash_blocks,
    make_lanes,
    next_update,
    split_into_micro_batches,
    to_tensors,
)
from recipe.data.documents import Source
from recipe.data.lanes import Lane, Ranges, merge_ranges, number_of
from recipe.data.shards import Shards
from recipe.data.sources import open_source
from recipe.data.standard_library import standard_library_files
from recipe.data.streams import DocumentStream, LaneOrder
from recipe.data.tokenizer import load_tokenizer, train_tokenizer
from recipe.data.validation import pack_validation
from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan
from recipe.run.console import Console
from recipe.run.stop import Stopped
from tests.helpers import expect_error, write_texts
from tests.support.lanes import (
    CPU,
    END,
    LENGTH,
    check_conservation,
    check_conservation_of_files,
    check_states_of_updates,
    config_for,
    documents_of,
    encode_bytes,
    lane_of,
    read_epoch,
    run_on,
    texts_of,
)
from tests.support.runs import make_run, stand_in


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_no_token_is_dropped_and_each_document_ends_once(tmp_path: Path, lanes: int) -> None:
    check_conservation_of_files(tmp_path, lanes)


def write_jsonl(path: Path, texts: Sequence[str | None]) -> None:
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    with fsspec.open(str(path), "wt", compression="infer", encoding="utf-8") as file:
        file.write(lines)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_every_format_gives_the_same_documents(tmp_path: Path, ending: str, lanes: int) -> None:
    """One file: with more lanes than files it is memory-mapped and split by rows."""
    texts = write_texts(tmp_path / "txt")
    path = tmp_path / f"all.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        write_jsonl(path, texts)
    source = open_source(config_for(tmp_path, str(path), lanes=lanes))
    assert len(source) >= lanes
    check_conservation([lane_of(source, i, lanes) for i in range(lanes)], texts)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path: Path, compression: str) -> None:
    """Behind a whole line and a whole compressed block, where it looks like an end."""
    path = tmp_path / f"all.jsonl.{'gz' if compression == 'gzip' else 'zst'}"
    with fsspec.open(str(path), "wb", compression=compression) as file:
        file.write(b'{"text": "one"}\n' * 10)
        file.flush()
        size = path.stat().st_size
        file.write(b'{"text": "two"}\n' * 10)
    path.write_bytes(path.read_bytes()[:size])
    expect_error(
        ["cannot read", "ended before"], lambda: list(open_source(config_for(tmp_path, str(path))).training_documents())
    )


def test_parquet_is_split_by_row_group_without_a_copy(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": write_texts(tmp_path)}), tmp_path / "all.parquet", row_group_size=4)
    source = open_source(config_for(tmp_path, f"{tmp_path}/all.parquet", lanes=6))
    assert len(source) == 6
    assert not list((tmp_path / "run").rglob("*.arrow"))


def test_a_lane_reads_only_its_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    source = open_source(config_for(tmp_path, f"{tmp_path}/*.txt", lanes=3))
    opened: list[int] = []
    original = Shards.read

    def read(self: Shards, index: int, *arguments: Any) -> Any:
        opened.append(index)
        return original(self, index, *arguments)

    monkeypatch.setattr(Shards, "read", read)
    lane = lane_of(source, 1, 3)
    read_epoch(lane)
    assert set(opened) == set(range(1, 24, 3))


def test_order_depends_on_seed_lane_and_epoch_alone(tmp_path: Path) -> None:
    write_texts(tmp_path, largest=1500, count=12)
    source = open_source(config_for(tmp_path, f"{tmp_path}/*.txt", lanes=1))

    def epochs(seed: int, count: int) -> list[list[bytes]]:
        lane, stream = lane_of(source, seed=seed), np.empty(0, np.int32)
        while lane.state_dict()["streams"][0]["epoch"] < count:
            stream = np.concatenate([stream, lane.next_blocks(1)[0][:-1]])
        documents = documents_of(stream)
        return [documents[i * 12 : (i + 1) * 12] for i in range(count)]

    first, second = epochs(3, 2)
    assert (first, second) == tuple(epochs(3, 2))
    assert sorted(first) == sorted(second)
    assert first != second, "a new order each epoch"
    assert epochs(4, 1)[0] != first, "another order for another seed"


@pytest.mark.parametrize(
    ("shuffled", "windows"), [(1, [1] * 90), (6, [6] * 15), (20, [8, 16, 20, 20, 20]), (64, [8, 16, 32])]
)
def test_blocks_are_shuffled_inside_windows_that_grow_and_none_is_lost(
    tmp_path: Path, shuffled: int, windows: list[int]
) -> None:
    write_texts(tmp_path, largest=1500, count=12)
    source = open_source(config_for(tmp_path, f"{tmp_path}/*.txt"))
    packed, lane, other = (
        lane_of(source),
        lane_of(source, shuffled=shuffled),
        lane_of(source, shuffled=shuffled, seed=4),
    )
    orders = []
    for size in windows:
        expected, blocks = packed.next_blocks(size), lane.next_blocks(size)
        places = [int(np.flatnonzero((expected == block).all(axis=1))[0]) for block in blocks]
        assert sorted(places) == list(range(size))
        orders.append(places)
    if shuffled > 1:
        assert len(set(map(tuple, orders))) == len(orders), "another order in each window"
        assert not [places for places in orders if places == sorted(places)]
    one_by_one = lane_of(source, shuffled=shuffled)
    lane.load_state_dict(one_by_one.state_dict())
    for count in (1, 3, 2, 17, 5):  # wherever calls end
        expected = np.concatenate([one_by_one.next_blocks(1) for _ in range(count)])
        np.testing.assert_array_equal(lane.next_blocks(count), expected)
    assert (lane.next_blocks(8) != other.next_blocks(8)).any()


def test_the_next_window_is_read_along_and_not_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one call reads is what a call uses, wherever a window ends: no update waits for a whole window."""
    monkeypatch.setattr(streams_module, "FIRST_SHARE", 1)
    monkeypatch.setattr(streams_module, "ENCODED_DOCUMENTS", 16)
    source, encoded = source_of(["x" * (LENGTH - 1)] * 4000, tmp_path), []

    def encode(texts: list[str]) -> Sequence[np.ndarray]:
        encoded.append(len(texts))
        return encode_bytes(texts)

    lane = Lane([DocumentStream(source, encode, 0, LaneOrder(1, 3, 128))], LENGTH, END)
    read = []
    for _ in range(120):
        before = sum(encoded)
        lane.next_blocks(4)
        read.append(sum(encoded) - before)
    assert read[0] == 16, "the first window of 8, and what is encoded with it"
    assert max(read[1:]) <= 16
    assert sum(read) <= 4 * 120 + 128 + 16


def blocks_until_epoch(lane: Lane, epoch: int) -> int:
    count = 0
    while lane.state_dict()["streams"][0]["epoch"] < epoch:
        lane.next_blocks(1)
        count += 1
    return count


@pytest.mark.parametrize("memory_mapped", [False, True])
def test_state_is_exact_at_every_block_of_three_epochs_over_three_resumes(tmp_path: Path, memory_mapped: bool) -> None:
    """Inside documents, inside windows of blocks, across shards and epochs; the state goes through JSON."""
    texts = write_texts(tmp_path, count=9, largest=900)
    pattern = f"{tmp_path}/*.txt"
    if memory_mapped:
        write_jsonl(tmp_path / "all.jsonl", texts)
        pattern = f"{tmp_path}/all.jsonl"
    source = open_source(config_for(tmp_path, pattern, lanes=2))
    total = blocks_until_epoch(lane_of(source, 0, 2, shuffled=11), 3)
    assert total > 30
    lane = lane_of(source, 0, 2, shuffled=11)
    expected, states = [], []
    for _ in range(total):
        states.append(json.dumps(lane.state_dict()))
        expected.append(lane.next_blocks(1)[0])
    assert max(len(state) for state in states) < 600, "a few integers"
    assert any(json.loads(state)["block"] and json.loads(state)["token"] for state in states)
    for stop in range(total):
        state = states[stop]
        position = stop
        for resumed_for in (1, 2, 3):  # three resumes in a row
            again = lane_of(source, 0, 2, shuffled=11)
            again.load_state_dict(json.loads(state))
            for _ in range(min(resumed_for, total - position)):
                np.testing.assert_array_equal(again.next_blocks(1)[0], expected[position])
                position += 1
            state = json.dumps(again.state_dict())


def test_a_reader_that_is_never_read_is_stopped(tmp_path: Path) -> None:
    write_texts(tmp_path)
    config = config_for(tmp_path, f"{tmp_path}/*.txt", lanes=4, tokenizer=None)
    source = open_source(config)
    run = run_on(config, 8)
    reader = UpdateReader(run, make_lanes(run, [source], load_tokenizer(config, [source])))
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-reader"]


class BrokenLane:
    """Its text cannot be read, or what reads it has a bug."""

    streams = ()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {}

    def next_blocks(self, count: int) -> np.ndarray:
        raise self.error


def test_an_error_while_reading_stops_the_training_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_on(config_for(tmp_path), 1)
    unreadable: Any = BrokenLane(RecipeError("cannot read on", exit_code=4))
    with pytest.raises(Stopped):
        UpdateReader(run, [unreadable]).next_update()
    assert (run.stop.is_agreed, run.stop.exit_code) == (True, 4)
    assert capsys.readouterr().err == "error: cannot read on\n"


def test_lanes_of_local_files_take_turns_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    config = config_for(tmp_path, f"{tmp_path}/*.txt", lanes=4, tokenizer=None)
    source = open_source(config)
    run = run_on(config, 8)
    lanes = make_lanes(run, [source], load_tokenizer(config, [source]))
    readers = []
    for lane in lanes:

        def read(count: int, lane: Any = lane, next_blocks: Any = lane.next_blocks) -> np.ndarray:
            readers.append((lane.index, threading.current_thread()))
            return next_blocks(count)

        monkeypatch.setattr(lane, "next_blocks", read)
    next_update(lanes, run.plan.update.blocks_per_lane, run.device)
    assert readers == [(index, threading.current_thread()) for index in range(4)]


def test_an_update_that_is_waited_for_says_how_far_reading_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    config = config_for(tmp_path, f"{tmp_path}/*.txt", lanes=4, tokenizer=None)
    source = open_source(config)
    run = replace(run_on(config, 8), console=Console(True, 1))
    lanes = make_lanes(run, [source], load_tokenizer(config, [source]))
    read = lanes[2].next_blocks

    def read_slowly(count: int) -> np.ndarray:
        time.sleep(1.5)
        return read(count)

    monkeypatch.setattr("recipe.data.blocks.REPORT_SECONDS", 0.3)
    monkeypatch.setattr(lanes[2], "next_blocks", read_slowly)
    reader = UpdateReader(run, lanes)
    reader.next_update()
    reader.close()
    assert "reading text: 2 of 4 lanes have what the update needs" in capsys.readouterr().out


def test_a_bug_while_reading_reaches_the_training(tmp_path: Path) -> None:
    faulty: Any = BrokenLane(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        UpdateReader(run_on(config_for(tmp_path), 1), [faulty]).next_update()


def test_what_fails_before_the_first_block_reaches_the_training(tmp_path: Path) -> None:
    """The thread enters the context of the run's device first; this one is on no machine."""
    run = run_on(config_for(tmp_path), 1)
    run.accelerator.device = torch.device("cuda", 127)
    never_read: Any = BrokenLane(ZeroDivisionError("a block was asked for"))
    reader = UpdateReader(run, [never_read])
    reader._thread.join(timeout=30)
    assert not reader._ready.empty(), "the thread has left nothing, and the training would wait for ever"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):  # torch's words, in several builds
        reader.next_update()


def test_states_that_come_with_an_update_are_not_ahead_of_it(tmp_path: Path) -> None:
    check_states_of_updates(tmp_path)


# Updates of 2, then of 3, then of 1 block of each of 4 lanes; what is left out begins and ends anywhere.
UNEVEN = (BudgetChange(3 * 8 * LENGTH, 12 * LENGTH), BudgetChange(70 * LENGTH, 4 * LENGTH))
LEFT_OUT: dict[Ranges, int] = {
    (): 20,
    ((2, 4), (7, 8), (9, 14)): 3,
    ((0, 1), (15, 40)): 1,
    ((5, 6), (6, 7)): 3,
}  # and shuffled


def test_updates_of_any_size_take_the_next_blocks_that_are_not_left_out(tmp_path: Path) -> None:
    """Also a reader that begins in the middle, from the state that came with an update."""
    write_texts(tmp_path)
    plain = config_for(tmp_path, f"{tmp_path}/*.txt", lanes=4, tokenizer=None)
    batch = BatchConfig(tokens_per_update=8 * LENGTH, lanes=4, schedule=UNEVEN)
    plain = replace(plain, batch=batch, schedule=ScheduleConfig(total_tokens=90 * LENGTH, warmup_tokens=0))
    source = open_source(plain)
    tokenizer = load_tokenizer(plain, [source])
    for skipped, shuffled in LEFT_OUT.items():
        run = make_run(replace(plain, data=replace(plain.data, shuffle_blocks=shuffled)), stand_in())
        every = [lane.next_blocks(70) for lane in make_lanes(run, [source], tokenizer)]
        kept = iter([n for n in range(70) if not any(start <= n < stop for start, stop in skipped)])
        assert run.plan.planned_updates == 12
        expected = []
        for size in [2] * 3 + [3] * 4 + [1] * 5:
            numbers = [next(kept) for _ in range(size)]
            expected.append(np.concatenate([blocks[numbers] for blocks in every]))
        states: list[Any] = []
        for done in (0, 3, 5):
            lanes = make_lanes(run, [source], tokenizer)
            for number, lane in enumerate(lanes):
                lane.skipped = skipped
                if done:
                    lane.load_state_dict(states[done][number])
            reader = UpdateReader(run, lanes, done)
            for update, blocks in enumerate(expected[done:], start=done + 1):
                found = reader.next_update()
                assert (found.update, found.skipped_blocks) == (update, skipped)
                np.testing.assert_array_equal(found.blocks, blocks)
                states.append(found.lane_states)
            reader.close()


def test_stretches_of_blocks_are_merged_and_counted_past() -> None:
    assert merge_ranges([[9, 12], (3, 5), (4, 7), [7, 8], (10, 11)]) == ((3, 8), (9, 12))
    skipped = merge_ranges([(3, 8), (9, 12)])
    assert [number_of(block, skipped) for block in range(6)] == [0, 1, 2, 8, 12, 13]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_ranks_share_the_same_blocks(tmp_path: Path, ranks: int) -> None:
    """Each rank opens its own lanes; together they hold what one rank would."""
    write_texts(tmp_path)
    config = config_for(tmp_path, f"{tmp_path}/*.txt", lanes=8, tokenizer=None)
    source = open_source(config)
    tokenizer = load_tokenizer(config, [source])
    whole = next_update(make_lanes(run_on(config, 16), [source], tokenizer), 2, CPU)
    runs = [run_on(config, 16, rank, ranks) for rank in range(ranks)]
    shares = [next_update(make_lanes(run, [source], tokenizer), 2, CPU) for run in runs]
    np.testing.assert_array_equal(np.concatenate([share.blocks for share in shares]), whole.blocks)
    assert combine_hashes(np.concatenate([share.sha256 for share in reversed(shares)])) == combine_hashes(whole.sha256)


def test_a_changed_token_changes_the_hash() -> None:
    blocks = np.arange(66, dtype=np.int32).reshape(2, 33)
    changed = blocks.copy()
    changed[1, 7] += 1
    assert combine_hashes(hash_blocks(blocks)) != combine_hashes(hash_blocks(changed))


def source_of(texts: Sequence[str], tmp_path: Path, lanes: int = 1, **data: Any) -> Source:
    write_jsonl(tmp_path / "texts.jsonl", texts)
    return open_source(config_for(tmp_path, f"{tmp_path}/texts.jsonl", lanes=lanes, **data))


def test_a_document_longer_than_many_blocks(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(LENGTH * 40 + 5))
    check_conservation([lane_of(source_of([text, "short"], tmp_path))], [text, "short"])


def test_a_corpus_of_one_document_repeats_it(tmp_path: Path) -> None:
    lane = lane_of(source_of(["once upon a time"], tmp_path))
    stream = np.concatenate([lane.next_blocks(1)[0][:-1] for _ in range(10)])
    assert set(documents_of(stream)) == {b"once upon a time"}


def test_an_empty_document_is_its_end_of_text(tmp_path: Path) -> None:
    texts = ["", "a" * 50, "", "", "b" * 20]
    check_conservation([lane_of(source_of(texts, tmp_path))], texts)


def test_a_null_is_an_empty_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "nulls.jsonl", [None, "a" * 50])
    source = open_source(config_for(tmp_path, f"{tmp_path}/nulls.jsonl"))
    check_conservation([lane_of(source)], ["", "a" * 50])


def test_a_path_with_pattern_characters_is_a_path(tmp_path: Path) -> None:
    directory = tmp_path / "a[1] *"
    directory.mkdir()
    write_jsonl(directory / "b?.jsonl", ["some text", "more text"])
    source = open_source(config_for(tmp_path, f"{tmp_path}/a[[]1] */*.jsonl", lanes=2))
    check_conservation([lane_of(source, i, 2) for i in range(2)], ["some text", "more text"])


def test_files_of_very_different_sizes_are_split_by_rows(tmp_path: Path) -> None:
    """A lane of one small file would repeat it as often as the other lane reads a document."""
    texts = write_texts(tmp_path / "txt")
    write_jsonl(tmp_path / "a.jsonl", ["tiny"])
    write_jsonl(tmp_path / "b.jsonl", texts)
    source = open_source(config_for(tmp_path, f"{tmp_path}/*.jsonl", lanes=2))
    lanes = [lane_of(source, i, 2) for i in range(2)]
    sizes = [len("".join(texts_of(lane))) for lane in lanes]
    assert max(sizes) < 2 * min(sizes)
    check_conservation(lanes, [*texts, "tiny"])


def test_fewer_documents_than_lanes_is_an_error(tmp_path: Path) -> None:
    words = ["3 documents, fewer than batch.lanes = 4", "--batch.lanes to 3"]
    expect_error(words, lambda: source_of(["a", "b", "c"], tmp_path, lanes=4))
    words = ["3 documents, fewer than batch.lanes = 64", "--batch.lanes to 3"]
    expect_error(words, lambda: source_of(["a", "b", "c"], tmp_path, lanes=64))


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    expect_error(["no training text in lane 0"], lambda: lane_of(source_of(["", ""], tmp_path)).next_blocks(1))


def test_a_missing_column_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    source = source_of(["a", "b"], tmp_path, text_column="content")
    expect_error(["no column 'content'", "['text', 'id']"], lambda: lane_of(source).next_blocks(1))


def test_a_column_of_numbers_is_an_error(tmp_path: Path) -> None:
    source = source_of(["a", "b"], tmp_path, text_column="id")
    expect_error(
        ["row 1 of ", "texts.jsonl has a number in column 'id', not text (0)"], lambda: lane_of(source).next_blocks(1)
    )


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"this is no parquet")
    config = config_for(tmp_path, f"{tmp_path}/broken.parquet")
    expect_error(["broken.parquet (18 bytes) is no Parquet file"], lambda: lane_of(open_source(config)).next_blocks(1))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_reading_that_fails_now_and_then_gives_each_document_once(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a connection does: before the first row, or after any."""
    texts = write_texts(tmp_path)
    write_jsonl(tmp_path / "all.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "all.parquet", row_group_size=5)
    source = open_source(config_for(tmp_path, f"{tmp_path}/*.{ending}", lanes=2))
    chance, original = random.Random(3), Shards.read
    patient = replace(source, retry_seconds=60)
    expected = [read_epoch(lane_of(source, i, 2)) for i in range(2)]

    def read(self: Shards, *arguments: Any) -> Iterator[Any]:
        if chance.random() < 0.3:
            raise ConnectionResetError("peer is gone")
        for row in original(self, *arguments):
            yield row
            if chance.random() < 0.1:
                raise TimeoutError("503 Service Unavailable")

    monkeypatch.setattr(documents_module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(Shards, "read", read)
    for lane in range(2):
        np.testing.assert_array_equal(read_epoch(lane_of(patient, lane, 2)), expected[lane])
    impatient = replace(source, retry_seconds=0)
    with pytest.raises(RecipeError, match=r"cannot read shard \d+ of .*: (peer is gone|503)") as caught:
        read_epoch(lane_of(impatient, 0, 2))
    assert caught.value.exit_code == 4


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "txt", count=60)
    source = source_of(texts, tmp_path, lanes=4, validation_one_in=5)
    held_out = list(source.validation_documents())
    assert 3 <= len(held_out) <= 25
    trained = {text for i in range(4) for text in documents_of(read_epoch(lane_of(source, i, 4)))}
    assert trained == {text.encode() for text in texts} - {str(text).encode() for text in held_out}


def test_standard_library_split(tmp_path: Path) -> None:
    _, files = standard_library_files()
    assert len(files) > 400
    assert not [f for f in files if "test" in f.parts or "site-packages" in f.parts]
    config = replace(config_for(tmp_path), data=DataConfig(dataset="python-standard-library"))
    source = open_source(replace(config, batch=BatchConfig(lanes=16)))
    assert source.validation is not None
    held_out = len(source.validation)
    assert len(source) + held_out == len(files)
    assert 0.3 < held_out / (len(files) / STANDARD_LIBRARY_VALIDATION_ONE_IN) < 3


def test_validation_counts_every_token_and_byte_of_whole_documents() -> None:
    texts = ["some text to train on", "naïve café", "x" * 300]
    tokenizer = train_tokenizer(texts, 300)
    validation = pack_validation(iter(texts), tokenizer, 16, float("inf"))
    assert validation is not None
    assert validation.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert validation.text_bytes == sum(len(text.encode()) for text in texts)
    assert (validation.blocks[:, 1:] != -1).sum() == validation.tokens
    plan = UpdatePlan(len(validation.blocks) * 16, 16, 1, 1, 100)
    ((inputs, targets),) = split_into_micro_batches(to_tensors(validation.blocks, CPU), plan, 0)
    assert (targets != IGNORED_TARGET).sum() == validation.tokens
    assert inputs.min() >= 0
    first = pack_validation(iter(texts), tokenizer, 16, 2)
    assert first is not None
    assert first.text_bytes == len(texts[0])
    assert pack_validation(iter([]), tokenizer, 16, 10) is None


def test_a_trained_tokenizer_is_cached_and_does_not_depend_on_chance(tmp_path: Path) -> None:
    write_texts(tmp_path)
    config = config_for(tmp_path, f"{tmp_path}/*.txt", tokenizer=None)
    source = open_source(config)
    first = load_tokenizer(config, [source])
    (saved,) = config.cache_directory.glob("tokenizer-*")
    stamp = (saved / "tokenizer.json").stat().st_mtime_ns
    again = load_tokenizer(config, [source])
    assert (saved / "tokenizer.json").stat().st_mtime_ns == stamp, "taken from the cache"
    elsewhere = replace(config, run=RunConfig(directory=str(tmp_path / "other")))
    trained_again = load_tokenizer(elsewhere, [source])
    assert first.get_vocab() == again.get_vocab() == trained_again.get_vocab()
    assert len(first) == 400
    larger = replace(config, model=ModelConfig(vocab_size=500))
    assert len(load_tokenizer(larger, [source])) == 500, "other settings, another tokenizer"
    (saved / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"cannot load the tokenizer trained before \(delete {saved}\): "):
        load_tokenizer(config, [source])
