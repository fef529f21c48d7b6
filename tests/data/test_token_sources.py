"""Token ids as sources of a run: the same text gives the same blocks, by whatever way it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from recipe.config.settings import BatchConfig, Config
from recipe.data.blocks import combine_hashes, make_lanes, next_update
from recipe.data.columns import VOCABULARY_KEY
from recipe.data.documents import Source
from recipe.data.find import find_files_of
from recipe.data.sources import check_passes, describe, open_source
from recipe.data.standard_library import standard_library_files
from recipe.data.tokenizer import load_tokenizer
from recipe.evaluation.in_run import read_validation_sets
from tests.helpers import SCRIPT, TINY, expect_error, read_ledger, run_ranks, train
from tests.support.lanes import CPU, config_for, run_on
from tests.support.token_layouts import END, LAYOUTS, after, before
from tests.support.tokenizers import save_byte_tokenizer

FILES, LANES = 8, 4
WORDS = "to be or not to be that is the question whether tis nobler in the mind to suffer".split()  # noqa: SIM905
# Some are empty; no file has twice as much as another
TEXTS = [
    [
        " ".join(WORDS[(file + place) % len(WORDS)] for place in range(3 * ((document + file) % 7)))
        for document in range(14)
    ]
    for file in range(FILES)
]
Ids = Sequence[Sequence[int]]


def put_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.stem.endswith("5"):  # one with a footer among the streams
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=5)


def text_rows(path: Path, texts: Sequence[str]) -> None:
    put_table(path, pa.table({"text": texts}))


def text_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def id_lines(path: Path, ids: Ids) -> None:
    path.write_text("".join(json.dumps({"tokens": [*document]}) + "\n" for document in ids), encoding="utf-8")


def id_rows(kind: pa.DataType) -> Callable[[Path, Ids], None]:
    def write(path: Path, ids: Ids) -> None:
        put_table(
            path, pa.table({"input_ids": pa.array([[*document] for document in ids], kind), "text": ["x"] * len(ids)})
        )

    return write


def plain(ids: Ids) -> Ids:
    return ids


def with_ends(ids: Ids) -> Ids:
    return [[*document, END] for document in ids]


def around(ids: Ids) -> Ids:
    return [[END, *document, END] for document in ids]


ROWS: dict[str, tuple[str, Callable[[Path, Ids], None], Callable[[Ids], Ids]]] = {
    "parquet": ("parquet", id_rows(pa.list_(pa.uint16())), plain),
    "parquet with ends": ("parquet", id_rows(pa.large_list(pa.int64())), with_ends),
    "arrow": ("arrow", id_rows(pa.list_(pa.int32())), around),
    "jsonl": ("jsonl", id_lines, with_ends),
}
FLAT = ["raw", "llm.c", "llm.c, llama", "datatrove, bare", "numpy", "megatron"]


def ids_of(file: int) -> Ids:
    return [[*text.encode()] for text in TEXTS[file]]


def as_bytes(document: Any) -> bytes:
    return bytes(document.astype(np.uint8))


def config_of(tmp_path: Path, lanes: int = LANES, **data: Any) -> Config:
    tokenizer = tmp_path / "tokenizer"
    if not tokenizer.exists():
        save_byte_tokenizer(tokenizer)
    return config_for(tmp_path, lanes=lanes, **{"tokenizer": str(tokenizer), "sequence_length": 64, **data})


def hashes_of(config: Config, source: Source | None = None, updates: int = 8) -> list[str]:
    """blocks_sha256 of updates over several epochs."""
    sources = [source or open_source(config)]
    lanes = make_lanes(run_on(config, 2 * config.batch.lanes), sources, load_tokenizer(config, sources))
    return [combine_hashes(next_update(lanes, 2, CPU).sha256) for _ in range(updates)]


@pytest.fixture
def expected(tmp_path: Path) -> list[str]:
    (tmp_path / "text").mkdir()
    for file, texts in enumerate(TEXTS):
        text_lines(tmp_path / f"text/{file}.jsonl", texts)
    return hashes_of(config_of(tmp_path, text_files=(f"{tmp_path}/text/*.jsonl",)))


@pytest.mark.parametrize("way", [*ROWS])
def test_rows_of_ids_give_the_blocks_of_their_text(way: str, tmp_path: Path, expected: list[str]) -> None:
    ending, write, shape = ROWS[way]
    for file in range(FILES):
        write(tmp_path / f"{file}.{ending}", shape(ids_of(file)))
    config = config_of(tmp_path, token_files=(f"{tmp_path}/*.{ending}",))
    source = open_source(config)
    assert source.holds_ids
    assert len(source) >= FILES
    if ending == "arrow":  # its batches are shards
        assert sorted(map(as_bytes, source.training_documents())) == sorted(
            text.encode() for texts in TEXTS for text in texts
        )
    else:
        assert hashes_of(config, source) == expected


@pytest.mark.parametrize("layout", FLAT)
def test_flat_files_give_the_blocks_of_their_text(layout: str, tmp_path: Path, expected: list[str]) -> None:
    write, dtype = LAYOUTS[layout]
    paths: list[str] = []
    for file in range(FILES):
        (tmp_path / f"flat/{file}").mkdir(parents=True)
        paths += write(tmp_path / f"flat/{file}", ids_of(file))
    config = config_of(tmp_path, token_files=tuple(paths), token_dtype=dtype)
    assert hashes_of(config) == expected


def test_one_file_that_is_cut_is_read_whole(tmp_path: Path) -> None:
    """Of compressed rows, and of too few row groups, a copy is cut."""
    ids = [document for file in range(FILES) for document in ids_of(file)]
    documents = sorted(map(bytes, ids))
    id_rows(pa.list_(pa.uint16()))(tmp_path / "one.parquet", ids)
    id_lines(tmp_path / "one.jsonl", around(ids))
    for name in ("one.parquet", "one.jsonl"):
        source = open_source(config_of(tmp_path, token_files=(str(tmp_path / name),)))
        assert len(source) >= LANES
        assert sorted(map(as_bytes, source.training_documents())) == documents, name
        parts = [document for shard in range(len(source)) for document, _ in source.read_shard(shard)]
        assert sorted(map(as_bytes, parts)) == documents, name


def test_packed_rows_are_one_stream(tmp_path: Path) -> None:
    """Nothing is stripped or added, whatever their length; an end-of-text token may be anywhere."""
    stream = after(ids_of(3)) + before(ids_of(4))
    rows = [stream[start : start + 17] for start in range(0, len(stream), 17)]
    pq.write_table(pa.table({"tokens": rows}), tmp_path / "packed.parquet")
    config = config_of(tmp_path, 1, token_files=(f"{tmp_path}/packed.parquet",), rows_are="packed", shuffle_blocks=1)
    sources = [open_source(config)]
    (lane,) = make_lanes(run_on(config, 1), sources, load_tokenizer(config, sources))
    blocks = lane.next_blocks(3 * len(stream) // 64)
    np.testing.assert_array_equal(blocks[:, :-1].ravel(), np.resize(stream, blocks[:, :-1].size))


def test_a_stream_without_ends_is_cut_in_pieces(tmp_path: Path) -> None:
    tokens = np.arange(40_000) % 251
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    config = config_of(tmp_path, token_files=(f"{tmp_path}/train.bin",), token_dtype="uint16")
    source = open_source(config)
    assert source.holds_pieces
    assert 16 * LANES <= len(source) <= 17 * LANES
    assert "pieces of a stream" in describe(source, find_files_of(config), LANES, 80_000)
    assert "40,000 tokens: 2.00 passes" in describe(source, find_files_of(config), LANES, 80_000)
    pieces = [piece for shard in range(len(source)) for piece, _ in source.read_shard(shard)]
    np.testing.assert_array_equal(np.concatenate(pieces), tokens)
    sources = [source]
    (lane, *_) = make_lanes(run_on(config, LANES), sources, load_tokenizer(config, sources))
    assert END not in lane.next_blocks(40)


def test_files_that_are_called_val_are_held_out(tmp_path: Path) -> None:
    for file in range(FILES):
        LAYOUTS["raw"][0](tmp_path, ids_of(file))
        (tmp_path / "train.bin").rename(tmp_path / ("val.bin" if file == 5 else f"train_{file}.bin"))
    config = config_of(tmp_path, token_files=(f"{tmp_path}/*.bin",), token_dtype="uint16", validation_one_in=3)
    source = open_source(config)
    held_out = [bytes(document) for document in ids_of(5)]
    assert [as_bytes(document) for document in source.validation_documents()] == held_out
    trained = [as_bytes(document) for document in source.training_documents()]
    assert len(trained) == 7 * len(TEXTS[0]), "none of it by hash"
    packed = read_validation_sets(config, [source], load_tokenizer(config, [source]))["held_out"]
    assert packed.text_bytes == sum(map(len, held_out))
    assert packed.tokens == packed.text_bytes + len(held_out)
    assert packed.is_exact


def test_documents_are_held_out_by_the_hash_of_their_tokens(tmp_path: Path) -> None:
    for file in range(FILES):
        id_rows(pa.list_(pa.uint16()))(tmp_path / f"{file}.parquet", ids_of(file))
    by_rows = open_source(config_of(tmp_path, token_files=(f"{tmp_path}/*.parquet",), validation_one_in=3))
    for file in range(FILES):
        (tmp_path / str(file)).mkdir()
        LAYOUTS["llm.c, llama"][0](tmp_path / str(file), ids_of(file))
    flat = open_source(config_of(tmp_path, token_files=(f"{tmp_path}/*/*.bin",), validation_one_in=3))
    held_out = [as_bytes(document) for document in flat.validation_documents()]
    assert held_out == [as_bytes(document) for document in by_rows.validation_documents()]
    assert 8 < len(held_out) < 60
    assert not {*held_out} & {as_bytes(document) for document in flat.training_documents()}


FAULTS: dict[str, tuple[pa.Table, dict[str, Any], list[str]]] = {
    "no such column": (
        pa.table({"ids2": [[1]], "text": ["a"]}),
        {},
        ["set --data.token_column to one of ['ids2', 'text']"],
    ),
    "named column missing": (
        pa.table({"a": [[1]]}),
        {"token_column": "b"},
        ["no column 'b'", "--data.token_column", "['a']"],
    ),
    "text": (pa.table({"input_ids": ["a"]}), {}, ["'input_ids'", "holds string, not lists of integers"]),
    "floats": (pa.table({"input_ids": [[1.0]], "x": [[1]]}), {}, ["holds list<", "double", "to one of ['x']"]),
    "vocabulary": (
        pa.table({"input_ids": [[1], [2, 300]]}),
        {},
        ["row 2 of", "300", "has 257 tokens", "--data.tokenizer"],
    ),
    "negative": (pa.table({"input_ids": [[1], [-1]]}), {}, ["row 2 of", "token id -1"]),
    "a null among them": (pa.table({"input_ids": [[1, None]]}), {}, ["row 1 of", "null among the token ids"]),
    "another tokenizer": (
        pa.table({"input_ids": [[1]]}).replace_schema_metadata({VOCABULARY_KEY: "abc"}),
        {},
        ["prepared with another tokenizer", "set --data.tokenizer"],
    ),
    "no tokenizer": (pa.table({"input_ids": [[1]]}), {"tokenizer": None}, ["set --data.tokenizer to it"]),
}


@pytest.mark.parametrize("fault", [*FAULTS])
def test_what_is_wrong_with_rows_of_ids_is_one_line(fault: str, tmp_path: Path) -> None:
    table, data, words = FAULTS[fault]
    pq.write_table(table, tmp_path / "a.parquet")
    config = config_of(tmp_path, 1, token_files=(f"{tmp_path}/a.parquet",), **data)
    expect_error(words, lambda: list(open_source(config).training_documents()))


def test_lines_of_json_have_to_hold_integers(tmp_path: Path) -> None:
    for value, word in (("[1, true]", "true"), ("[1.5]", "1.5"), ('"text"', '"text"'), ("[[1]]", "[[1]]")):
        (tmp_path / "a.jsonl").write_text(f'{{"ids": [1]}}\n{{"ids": {value}}}\n', encoding="utf-8")
        config = config_of(tmp_path, 1, token_files=(f"{tmp_path}/a.jsonl",))
        expect_error(["row 2 of", "no list of integers", word], lambda: list(open_source(config).training_documents()))  # noqa: B023
        skipping = replace(config, data=replace(config.data, on_bad_row="skip"))
        assert [np.asarray(ids).tolist() for ids in open_source(skipping).training_documents()] == [[1]]


def test_the_tokenizer_that_metadata_names_has_to_be_the_one_in_use(tmp_path: Path) -> None:
    LAYOUTS["datatrove"][0](tmp_path, ids_of(0))
    config = config_of(tmp_path, 1, token_files=(f"{tmp_path}/*.ds*",))
    expect_error(
        ["made with the tokenizer 'gpt2'", str(tmp_path / "tokenizer"), "--data.tokenizer"], lambda: open_source(config)
    )
    (tmp_path / "tokenizer").rename(tmp_path / "gpt2")
    moved = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "gpt2")))
    assert len(list(open_source(moved).training_documents())) == len(TEXTS[0])


def test_more_passes_than_a_source_may_have_are_refused_where_its_size_is_known(tmp_path: Path) -> None:
    LAYOUTS["llm.c"][0](tmp_path, ids_of(3))
    source = open_source(config_of(tmp_path, 1, token_files=(f"{tmp_path}/*.bin",)))
    tokens = source.training.tokens
    assert tokens == sum(map(len, ids_of(3))) + len(TEXTS[3])
    source.label, source.max_passes = "code", 2
    check_passes(source, 2 * tokens)
    expect_error(
        ["code has", f"{tokens:,} tokens", "max_passes = 2", "smaller weight"],
        lambda: check_passes(source, 2 * tokens + 1),
    )


@pytest.mark.slow
def test_a_run_trains_on_ids_and_goes_on_with_two_ranks(tmp_path: Path) -> None:
    """From the command line; nanoGPT's file has one value of two bytes for each token, and another for validation."""
    root, files = standard_library_files()
    text = b"".join((root / file).read_bytes() for file in files[:30])[:200_000]
    for name, part in (("train", text[:180_000]), ("val", text[180_000:])):
        np.frombuffer(part, np.uint8).astype("<u2").tofile(tmp_path / f"{name}.bin")
    tokenizer = ["--data.tokenizer", save_byte_tokenizer(tmp_path / "tokenizer"), "--data.token_dtype", "uint16"]
    command = [*TINY, *tokenizer, "--data.token_files", f"{tmp_path}/*.bin", "--run.directory"]
    first = train(*command, str(tmp_path / "run"), "--run.max_updates", "6")
    assert first.returncode == 0, first.stderr
    assert "180,000 tokens: 0.34 passes, pieces of a stream" in first.stdout
    run_ranks(2, [SCRIPT, *command, str(tmp_path / "run")])
    whole = train(*command, str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    ledgers = [read_ledger(tmp_path / run) for run in ("run", "whole")]
    assert [line["world_size"] for line in ledgers[0]] == [1] * 6 + [2] * 34
    hashes, of_whole = ([line["blocks_sha256"] for line in ledger] for ledger in ledgers)
    assert hashes == of_whole
    after = ledgers[0][-1]["validation/held_out/loss"]
    assert after < np.log(257) - 1
    assert ledgers[0][-1]["validation/held_out/bits_per_byte"] == pytest.approx(after / np.log(2), rel=0.01)


def test_files_of_ids_that_are_given_as_text_are_told_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), tmp_path / "a.parquet")
    for more in ({}, {"text_column": "input_ids"}):
        config = config_of(tmp_path, 1, text_files=(f"{tmp_path}/a.parquet",), **more)
        expect_error(["token ids are read by --data.token_files"], lambda: open_source(config))  # noqa: B023


def test_fewer_documents_than_lanes_is_one_line(tmp_path: Path) -> None:
    LAYOUTS["llm.c"][0](tmp_path, ids_of(3))
    config = config_of(tmp_path, 1, token_files=(f"{tmp_path}/*.bin",))
    many = replace(config, batch=BatchConfig(lanes=50))
    expect_error([f"has {len(TEXTS[3])} documents, fewer than batch.lanes = 50"], lambda: open_source(many))
