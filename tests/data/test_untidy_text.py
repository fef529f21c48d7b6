"""Text as people have it is read exactly, or named as what it is: what was trained wrongly without a word."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.checkpoint.files import read_state
from recipe.data.documents import Source
from recipe.data.files import LocalFile
from recipe.data.formats import BadRow
from recipe.data.shards import cut
from recipe.data.sources import open_source
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.run.directory import list_checkpoints
from tests.helpers import SCRIPT, TINY, end_of, read_events, read_ledger, start_ranks, write_texts
from tests.support.lanes import config_for, documents_of, lane_of, read_epoch

TEXTS = [f'text number {number}, with "quotes" and a \\ backslash' for number in range(60)]


def rows_of(texts: Sequence[Any], **columns: Any) -> bytes:
    return b"".join(json.dumps({"text": text, **columns}).encode() + b"\n" for text in texts)


def source_of(path: Path, lanes: int = 1, **data: Any) -> Source:
    return open_source(config_for(path.parent, str(path), lanes=lanes, **data))


def read_by_lanes(source: Source, lanes: int) -> list[str]:
    """What the lanes read in their first epoch, sorted."""
    read = []
    for lane in (lane_of(source, index, lanes) for index in range(lanes)):
        own = sum(
            not isinstance(text, BadRow) for shard in lane.streams[0].shards for text, _ in source.training.read(shard)
        )
        read += [document.decode() for document in documents_of(read_epoch(lane))[:own]]
    return sorted(read)


ODD_VALUES = [2024, True, 1.5, ["a", "list"], {"an": "object"}]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("value", ODD_VALUES, ids=str)
def test_a_text_of_another_type_is_named_and_damages_no_other(tmp_path: Path, value: Any, lanes: int) -> None:
    """`datasets` made JSON source of every other text of the file."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows_of([*TEXTS[:40], value, *TEXTS[40:]]))
    with pytest.raises(
        RecipeError, match=r"row .* of .*a\.jsonl has (a|an) \w+ in column 'text', not text .*--data\.on_bad_row skip"
    ) as error:
        list(source_of(path, lanes).training_documents())
    assert error.value.exit_code == 2
    source = source_of(path, lanes, on_bad_row="skip")
    assert read_by_lanes(source, lanes) == sorted(TEXTS)
    assert source.bad_rows >= 1


def test_texts_that_look_like_dates_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows_of(TEXTS))
    dates = [f"2024-01-{day:02d}T00:00:00" for day in range(1, 29)]
    (tmp_path / "b.jsonl").write_bytes(rows_of(dates))
    assert list(source_of(tmp_path / "*.jsonl").training_documents()) == [*TEXTS, *dates]


@pytest.mark.parametrize("lanes", [1, 4])
def test_other_columns_may_hold_anything(tmp_path: Path, lanes: int) -> None:
    metas: list[Any] = [None, 1, "two", {"deep": [1, {"er": None}]}, [], 1e400, 10**400]
    lines = [
        json.dumps({"id": None if i < 30 else str(i), "meta": metas[i % len(metas)], "text": text})
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), "utf-8")  # blank lines, and no line feed at the end
    assert read_by_lanes(source_of(tmp_path / "a.jsonl", lanes), lanes) == sorted(TEXTS)
    for number, more in enumerate(
        [{"map": pa.array([[("a", 1)]] * 30, pa.map_(pa.string(), pa.int64()))}, {"extra": pa.array([{"x": 1}] * 30)}]
    ):
        texts = TEXTS[30 * number : 30 * number + 30]
        kinds = pa.string(), pa.large_string()
        pq.write_table(
            pa.table({**more, "text": pa.array(texts, kinds[number])}), tmp_path / f"{number}.parquet", row_group_size=7
        )
    assert read_by_lanes(source_of(tmp_path / "*.parquet", lanes), lanes) == sorted(TEXTS)


def test_parquet_that_is_empty_or_none(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "1.parquet", row_group_size=10)
    assert read_by_lanes(source_of(tmp_path / "*.parquet", 3), 3) == sorted(TEXTS)
    (tmp_path / "2.parquet").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"2\.parquet \(0 bytes\) is no Parquet file"):
        source_of(tmp_path / "*.parquet", 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', r"a byte that is not UTF-8 \(0xe9, byte 13 of the row\)"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": "not closed}', "is no JSON"),
        (b'["a", "b"]', "is an array, not an object"),
        (b'{"Text": "a"}', r"has no column 'text': set --data\.text_column to one of \['Text'\]"),
        (b"[" * 100_000, "is no JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
@pytest.mark.parametrize("lanes", [1, 8])
def test_a_row_of_json_lines_that_holds_no_text_is_named(tmp_path: Path, line: bytes, reason: str, lanes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows_of(TEXTS[:20]) + line + b"\n" + rows_of(TEXTS[20:]))
    where = r"row 21 of .*a\.jsonl" if lanes == 1 else r"the row at byte [\d,]+ of .*a\.jsonl|row 21"
    with pytest.raises(RecipeError, match=f"({where}) .*{reason}"):
        list(source_of(path, lanes).training_documents())
    source = source_of(path, lanes, on_bad_row="skip")
    assert list(source.training_documents()) == TEXTS
    assert read_by_lanes(source, lanes) == sorted(TEXTS)


def test_parquet_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"better"], pa.binary()).view(pa.string())
    table = pa.table({"text": pa.concat_arrays([pa.array(["first"]), texts])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(RecipeError, match=r"row 3 of .*a\.parquet has bytes that are not UTF-8 in column 'text'"):
        list(source_of(tmp_path / "a.parquet").training_documents())
    assert list(source_of(tmp_path / "a.parquet", on_bad_row="skip").training_documents()) == [
        "first",
        "good",
        "better",
    ]


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_file_is_compressed_if_its_bytes_say_so(tmp_path: Path, lanes: int) -> None:
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(rows_of(TEXTS)))
        assert read_by_lanes(source_of(tmp_path / name, lanes), lanes) == sorted(TEXTS)
    (tmp_path / "d.jsonl.gz").write_bytes(rows_of(TEXTS))
    assert read_by_lanes(source_of(tmp_path / "d.jsonl.gz", lanes), lanes) == sorted(TEXTS)


def test_a_mark_at_the_start_of_json_lines_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows_of(TEXTS))
    assert list(source_of(tmp_path / "a.jsonl").training_documents()) == TEXTS


TEXT = "naïve café — 日本語\r\nand a\rline\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_are_decoded_by_their_mark_and_keep_their_line_ends(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert list(source_of(tmp_path / "a.txt").training_documents()) == [TEXT]


@pytest.mark.parametrize(
    ("data", "reason", "encoding"),
    [
        ("naïve café".encode("latin-1"), r"a byte that is not UTF-8 \(0xef, byte 2\).*--data\.encoding", "latin-1"),
        ("naive".encode("utf-16-le"), r"zero bytes.*--data\.encoding utf-16-le", "utf-16-le"),
        (gzip.compress(b"text"), "is compressed", None),
    ],
    ids=["latin-1", "utf-16", "gzip"],
)
def test_a_text_file_in_another_encoding_is_named(
    tmp_path: Path, data: bytes, reason: str, encoding: str | None
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(RecipeError, match=rf"a\.txt .*{reason}"):
        list(source_of(tmp_path / "*.txt").training_documents())
    assert list(source_of(tmp_path / "*.txt", on_bad_row="skip").training_documents()) == ["plain"]
    if encoding:
        assert list(source_of(tmp_path / "a.txt", encoding=encoding).training_documents()) == [data.decode(encoding)]


@pytest.mark.parametrize("lanes", [1, 2, 5, 16, 60])
def test_a_file_is_cut_between_lines_and_every_line_is_in_one_part(tmp_path: Path, lanes: int) -> None:
    lengths = [(number * 37) % 90 for number in range(300)] if lanes < 60 else [2000, *[3] * 59]
    (tmp_path / "a.jsonl").write_bytes(rows_of(["x" * length for length in lengths]))
    data = (tmp_path / "a.jsonl").read_bytes()
    parts = cut([LocalFile(str(tmp_path / "a.jsonl"), len(data))], lanes)
    assert len(parts) >= lanes
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    pieces = [data[part.start : part.end] for part in parts]
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces)


def test_an_object_store_is_read_as_any_address(tmp_path: Path) -> None:
    """fsspec's own memory stands for it."""
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/a.jsonl": rows_of(TEXTS[:30]), "/bucket/b.jsonl": rows_of(TEXTS[30:])})
    source = open_source(config_for(tmp_path, "memory://bucket/*.jsonl", lanes=5))
    assert read_by_lanes(source, 5) == sorted(TEXTS)
    with pytest.raises(RecipeError, match=r"s3:// cannot be read: .*s3fs"):
        open_source(config_for(tmp_path, "s3://bucket/a.jsonl"))


@pytest.mark.slow
def test_a_bad_row_stops_all_ranks_with_a_checkpoint_and_skipping_it_goes_on(tmp_path: Path) -> None:
    """It is in a file that rank 1 alone reads, behind what the first updates need."""
    text = "".join(write_texts(tmp_path / "written", count=80))
    texts = [text[350 * number : 350 * number + 350] for number in range(320)]
    for lane in range(8):
        own = texts[40 * lane : 40 * lane + 40]
        (tmp_path / f"{lane}.jsonl").write_bytes(
            rows_of(own[:29]) + rows_of([2024 if lane == 6 else "fine"]) + rows_of(own[29:])
        )
    given = [
        "--run.directory",
        f"{tmp_path}/run",
        "--data.text_files",
        f"{tmp_path}/*.jsonl",
        "--data.validation_one_in",
        "null",
    ]
    tokenizer = ["--data.tokenizer", str(tmp_path / "tokenizer"), "--data.shuffle_blocks", "1"]
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    codes, _, errors = end_of(start_ranks(2, [SCRIPT, *TINY, *given, *tokenizer], stderr=PIPE))
    assert codes == [2, 2], errors
    (line,) = [line for line in errors.splitlines() if line]
    assert re.match(r"error \(rank 1\): row 30 of .*6\.jsonl has a number in column 'text', not text \(2024\)", line)
    done = len(read_ledger(tmp_path / "run"))
    assert done == read_state(list_checkpoints(tmp_path / "run/checkpoints")[0]).update > 0
    codes, output, _ = end_of(start_ranks(2, [SCRIPT, *TINY, *given, *tokenizer, "--data.on_bad_row", "skip"]))
    assert codes == [0, 0], output
    assert "left out so far, since they hold no text: 1 rows" in output
    events = read_events(tmp_path / "run", "bad_rows")
    assert [event["rows"] for event in events] == list(range(1, len(events) + 1)), "once in each epoch"
