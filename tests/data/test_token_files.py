"""Flat files of token ids: each layout written byte by byte as its documents say, and all of them giving the same documents."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

import recipe.data.token_files as token_files
from benchmarks.text_memory import gpt2_tokenizer
from recipe.data.encode import DocumentEncoder
from recipe.data.formats import Part, State
from recipe.data.token_files import FlatTokens, open_token_files, strip_ends
from recipe.data.token_formats import is_validation_file
from recipe.data.tokenizer import find_tokenizer
from recipe.errors import RecipeError
from tests.helpers import TINY, read_ledger, train, write_texts
from tests.support.token_layouts import (
    BEGINNING,
    END,
    LAYOUTS,
    Write,
    after,
    around,
    datatrove,
    datatrove_bare,
    dolma,
    llmc,
    llmc_header,
    llmc_shards,
    megatron,
    numpy_array,
    put,
    raw_after,
)

VOCABULARY, GPT2_END = 258, 50256
LENGTHS = [0, 3, 1, 0, 0, 40, 7, 2, 150, 1, 1, 5, 0, 9, 33, 4, 0, 12]
DOCUMENTS = [[(17 * number + place) % END for place in range(length)] for number, length in enumerate(LENGTHS)]
AROUND = "raw, around", "dolma", "dolma, dtype given", "numpy, csv"  # with beginning-of-text tokens


def open_tokens(paths: Sequence[str], dtype: str | None = None, delimiters: Sequence[int] = (END,)) -> FlatTokens:
    return open_token_files(paths, dtype, delimiters, VOCABULARY)


def read_all(tokens: FlatTokens, parts: Sequence[Part]) -> list[list[int]]:
    return [ids.tolist() for part in parts for ids, _ in tokens.read(part)]


@pytest.fixture(params=[*LAYOUTS])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_layout(layout: str, directory: Path) -> FlatTokens:
    write, dtype = LAYOUTS[layout]
    delimiters = (END, BEGINNING) if layout in AROUND else (END,)
    return open_tokens(write(directory, DOCUMENTS), dtype, delimiters)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That end in documents, between them, and at delimiters."""
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(token_files, "_DOCUMENT_TOKENS", 3)


def test_every_layout_gives_the_same_documents(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = open_layout(layout, tmp_path)
    assert tokens.format == {"numpy": "npy", "numpy, csv": "dolma"}.get(layout, layout.split(",")[0])
    assert tokens.documents == (len(DOCUMENTS) if tokens.format in ("datatrove", "dolma", "megatron") else None)
    assert tokens.tokenizer == ("gpt2" if layout == "datatrove" else None)
    assert tokens.has_ends
    sent = pickle.loads(pickle.dumps(tokens))
    whole = [Part(file.file) for file in tokens.files]
    assert read_all(sent, whole) == DOCUMENTS
    stored = np.dtype(tokens.files[0].dtype)  # copied once, into blocks
    assert {ids.dtype for part in whole for ids, _ in tokens.read(part)} == {stored}
    for lanes in (*range(1, 8), len(DOCUMENTS)):
        parts = tokens.parts(lanes)
        assert len(parts) >= lanes
        of_parts = [read_all(sent, [part]) for part in parts]
        assert [document for documents in of_parts for document in documents] == DOCUMENTS, lanes
        assert len(parts) == len(tokens.files) or all(of_parts), lanes
    small_chunks(monkeypatch)
    assert read_all(tokens, tokens.parts(3)) == read_all(tokens, whole) == DOCUMENTS


def test_reading_goes_on_from_every_state(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = open_layout(layout, tmp_path)
    small_chunks(monkeypatch)
    for part in tokens.parts(1):
        given = [(ids.tolist(), state) for ids, state in tokens.read(part)]
        for number, (_, state) in enumerate(given, 1):
            left = [(ids.tolist(), state) for ids, state in tokens.read(part, state)]
            assert left == given[number:], state


def test_regions_have_about_as_many_tokens(tmp_path: Path) -> None:
    documents = [[1] * (300 + number % 100) for number in range(1000)]
    for paths in (raw_after(tmp_path, documents), datatrove(tmp_path, documents)):
        tokens = open_tokens(paths, "uint16")
        parts = tokens.parts(4)
        assert len(parts) == 16 * 4
        sizes = [sum(len(ids) + 1 for ids, _ in tokens.read(part)) for part in parts]
        assert sum(sizes) == tokens.tokens
        assert max(sizes) - min(sizes) <= 2 * 400


def test_as_many_even_files_as_lanes_are_read_whole(tmp_path: Path) -> None:
    paths = llmc_shards([40] * 7)(tmp_path, DOCUMENTS)
    tokens = open_tokens(paths)
    assert [part.file.address for part in tokens.parts(3)] == paths
    assert {part.end for part in tokens.parts(3)} == {None}
    assert len(tokens.parts(12)) >= 12


def test_a_first_shard_may_begin_within_a_document(tmp_path: Path) -> None:
    """As where only some shards were downloaded."""
    paths = llmc_shards([2])(tmp_path, [[1, 2, 3], *DOCUMENTS])
    tokens = open_tokens(paths[1:])
    assert read_all(tokens, tokens.parts(1)) == [[2, 3], *DOCUMENTS]


def test_both_delimiters_divide(tmp_path: Path) -> None:
    """A beginning-of-text token between documents alone, as Llama's shards have it, and behind an end-of-text token."""
    ids = [token for document in DOCUMENTS for token in (BEGINNING, *document)]
    shard = put(tmp_path / "a.bin", ids, "<u4", llmc_header(len(ids), 20240801, 7))
    around_shard = put(tmp_path / "b.bin", around(DOCUMENTS), "<u2", llmc_header(len(around(DOCUMENTS))))
    for path in (shard, around_shard):
        tokens = open_tokens([path], None, (END, BEGINNING))
        assert [read_all(tokens, tokens.parts(lanes)) for lanes in (1, 3, 18)] == [DOCUMENTS] * 3


def test_the_last_document_needs_no_end(tmp_path: Path) -> None:
    ids = after([*DOCUMENTS[1:], [1, 2]])[:-1]
    tokens = open_tokens([put(tmp_path / "train.bin", ids, "<u2")], "uint16")
    assert read_all(tokens, tokens.parts(2)) == [*DOCUMENTS[1:], [1, 2]]


def test_a_stream_without_ends_is_cut_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [number % END for number in range(10_007)]
    tokens = open_tokens([put(tmp_path / "train.bin", ids, "<u2")], "uint16")
    assert (tokens.has_ends, tokens.documents, tokens.tokens) == (False, None, len(ids))
    for lanes in (1, 3, 7):
        parts = tokens.parts(lanes)
        assert len(parts) == 16 * lanes
        pieces = [piece for part in parts for piece, _ in tokens.read(part)]
        assert len(pieces) == len(parts)
        assert np.concatenate(pieces).tolist() == ids
    monkeypatch.setattr(token_files, "PIECE_TOKENS", 100)
    part, *_ = tokens.parts(2)
    given = list[tuple[np.ndarray, State]](tokens.read(part))
    assert [len(piece) for piece, _ in given] == [100, 100, 100, 12]
    rest = [piece.tolist() for piece, _ in tokens.read(part, given[0][1])]
    assert rest == [piece.tolist() for piece, _ in given[1:]]


def test_an_end_of_text_token_is_looked_for_in_the_first_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "train.bin", [1] * 50 + [END] + [2] * 50, "<u2")
    monkeypatch.setattr(token_files, "_SEARCHED_TOKENS", 50)
    assert not open_tokens([path], "uint16").has_ends
    monkeypatch.setattr(token_files, "_SEARCHED_TOKENS", 51)
    assert open_tokens([path], "uint16").has_ends


def test_a_document_goes_without_the_tokens_around_it() -> None:
    for ids, left in (
        *(([], []), ([END], []), ([END, END], []), ([END, END, END], [END])),
        *(([1, END], [1]), ([BEGINNING, 1, END], [1]), ([END, 1], [1]), ([1, END, 2], [1, END, 2])),
    ):
        assert strip_ends(np.array(ids, np.int32), (END, BEGINNING)).tolist() == left, ids


def test_names_say_what_is_held_out() -> None:
    held_out = "val.bin", "a/fineweb_val_000000.bin", "tiny-val.bin", "validation-00000.npy", "X_VAL.ds", "val0.bin"
    assert [name for name in held_out if not is_validation_file(name)] == []
    others = "train.bin", "interval.bin", "valid_words.bin", "val/train.bin", "evaluation.bin", "values.bin"
    assert [name for name in others if is_validation_file(name)] == []


def break_file(write: Write, change: Callable[[bytes], bytes], ending: str = "") -> Write:
    """A set whose file, or the one beside it with that ending, is changed."""

    def broken(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
        paths = write(directory, documents)
        path = next(path for path in sorted(directory.iterdir()) if path.name.endswith(ending))
        path.write_bytes(change(path.read_bytes()))
        return paths

    return broken


def without(write: Write, ending: str) -> Write:
    def broken(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
        paths = write(directory, documents)
        (path,) = (path for path in directory.iterdir() if path.name.endswith(ending))
        path.unlink()
        return paths

    return broken


def one(name: str, content: bytes) -> Write:
    def write(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
        (directory / name).write_bytes(content)
        return [str(directory / name)]

    return write


def array(ids: np.ndarray) -> Write:
    def write(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
        np.save(directory / "a.npy", ids)
        return [str(directory / "a.npy")]

    return write


def two(*writes: Write) -> Write:
    return lambda directory, documents: [path for write in writes for path in write(directory, documents)]


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new, 1)


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:-size]


def change_place(index: bytes) -> bytes:
    """Of one sequence in the file."""
    place = 34 + 4 * SEQUENCES + 8 * 5
    return index[:place] + struct.pack("<Q", 8) + index[place + 8 :]


def change_last_document(index: bytes) -> bytes:
    place = 34 + 12 * SEQUENCES + 8 * len(LENGTHS)
    return index[:place] + struct.pack("<Q", SEQUENCES - 1) + index[place + 8 :]


def float_index(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    return megatron(directory, documents, 7, "<f4")


TOKENS = sum(LENGTHS) + len(LENGTHS)
SEQUENCES = len(LENGTHS) + sum(length > 3 for length in LENGTHS)  # of Megatron
INDEX_ENDS = struct.pack("<2Q", 1, 5)
FAULTS: dict[str, tuple[Write, str]] = {
    "no file": (lambda directory, documents: [str(directory / "a.bin")], r"cannot read .*a\.bin: No such file"),
    "directory": (lambda directory, documents: [str(directory)], "cannot read .*: Is a directory"),
    "address": (lambda directory, documents: ["https://a.org/a.bin?key=1"], r"https://a.org/a.bin is an.*hf download"),
    "hub": (lambda directory, documents: ["hf://datasets/a/b/a.bin"], "hf://datasets/a/b/a.bin is an address"),
    "empty": (one("a.bin", b""), r"a\.bin is empty"),
    "compressed": (one("a.bin", gzip.compress(b"1234")), "is compressed: unpack it"),
    "rows": (one("a.parquet", b"PAR1"), r"a\.parquet is no flat file"),
    "raw": (one("a.bin", b"1234"), r"set --data\.token_dtype .*uint16.*llm\.c.*\.ds.*\.idx.*\.npy"),
    "cut array": (break_file(numpy_array, cut(3)), "is no array of ids, or is cut off"),
    "floats": (array(np.ones(3)), "array of float64 with 1 dimensions"),
    "rows of ids": (array(np.ones((3, 2), np.int32)), "array of int32 with 2 dimensions"),
    "big-endian": (array(np.ones(3, ">i4")), "array of >i4"),
    "no ids": (array(np.ones(0, np.int32)), "0 tokens|no array"),
    "shard cut": (break_file(llmc, cut(1)), f"has {1023 + 2 * TOKENS:,} bytes and not {1024 + 2 * TOKENS:,}, for the"),
    "header cut": (break_file(llmc, lambda content: content[:900]), "header has 1,024 bytes, and it has 900"),
    "count 0": (one("a.bin", llmc_header(0)), "has 0 tokens"),
    "count negative": (one("a.bin", llmc_header(-5)), "has -5 tokens"),
    "version": (one("a.bin", llmc_header(1, version=2) + b"12"), "version 2: 1 and 7 are known"),
    "magic": (
        one("a.bin", llmc_header(1, 20250101) + b"12"),
        "unknown magic number 20250101: .* 20240520 and 20240801",
    ),
    "evaluation": (one("a.bin", llmc_header(1, 20240522)), "multiple-choice questions .*no text to train on"),
    "shard ids": (
        one("a.bin", llmc_header(3) + struct.pack("<3H", 1, 50300, 2)),
        r"largest id 50,300 at token 1 of .*a\.bin, but the tokenizer has 258 tokens: is --data",
    ),
    "first id too large": (array(np.array([1, VOCABULARY])), "largest id 258 at token 1 of"),
    "negative id": (array(np.array([1, 2, -3])), "largest id -3 at token 2"),
    "no .index": (without(datatrove, ".index"), r"\.ds\.index is missing"),
    "index cut": (break_file(datatrove, cut(3), ".index"), r"\.ds\.index is cut off"),
    "index short": (break_file(datatrove, cut(8), ".index"), f"has {TOKENS} tokens .* ends at {TOKENS - 13}"),
    "index backwards": (break_file(datatrove, swap(INDEX_ENDS, INDEX_ENDS[::-1]), ".index"), "backwards at document"),
    "index beyond": (break_file(datatrove, lambda c: c + struct.pack("<Q", 9999), ".index"), "ends at 9,999"),
    "index huge": (break_file(datatrove, lambda c: c[:-8] + b"\xff" * 8, ".index"), "backwards at document 17"),
    "index empty": (break_file(datatrove, lambda content: b"", ".index"), "0 documents"),
    "bare index": (break_file(datatrove_bare, cut(1), ".ds"), "does not fit"),
    "ds cut": (break_file(datatrove, cut(2), ".ds"), f"not {TOKENS} tokens of 2 bytes, as .*metadata says"),
    "metadata": (break_file(datatrove, lambda content: b"gpt2\n12", ".metadata"), "not what datatrove writes"),
    "no .bin": (without(megatron, ".bin"), r"cannot read .*document\.bin: No such file"),
    "float index": (float_index, "holds float32, and ids are integers"),
    "idx magic": (break_file(megatron, swap(b"MMIDIDX", b"TNTIDX\0"), ".idx"), "unknown magic number .*TNTIDX"),
    "idx version": (break_file(megatron, swap(b"\1", b"\2"), ".idx"), "of version 2: 1 is known"),
    "idx code": (break_file(megatron, swap(b"\1" + b"\0" * 7 + b"\10", b"\1" + b"\0" * 7 + b"\77"), ".idx"), "type 63"),
    "idx cut": (break_file(megatron, cut(100), ".idx"), r"\.idx has .* bytes and not .*: it is cut off"),
    "idx gap": (break_file(megatron, change_place, ".idx"), "do not lie one behind the other"),
    "idx documents": (break_file(megatron, change_last_document, ".idx"), "run backwards, or are not all of its 26"),
    "idx head": (break_file(megatron, lambda content: content[:20], ".idx"), "is cut off: it has 20 bytes"),
    "bin cut": (
        break_file(megatron, cut(2), ".bin"),
        f"has {TOKENS - 1} tokens of uint16, and its index ends at {TOKENS}",
    ),
    "bin half": (break_file(megatron, cut(1), ".bin"), "no whole number of uint16"),
    "csv": (break_file(dolma, lambda content: gzip.compress(b"a,b\n"), ".gz"), "does not say `start,end`"),
    "csv empty": (break_file(dolma, lambda content: gzip.compress(b""), ".gz"), "does not say `start,end`"),
    "csv cut": (break_file(dolma, cut(20), ".gz"), "does not say `start,end`"),
    "csv backwards": (
        break_file(dolma, lambda content: gzip.compress(b"0,4\n3,304\n"), ".gz"),
        "backwards at document 1",
    ),
    "csv beyond": (break_file(dolma, lambda content: gzip.compress(b"0,4\n4,9999\n"), ".gz"), "no size for the 9,999"),
    "no csv": (without(dolma, ".gz"), r"set --data\.token_dtype"),
    "two formats": (two(llmc, datatrove), r"one format, not of 2: .*\.bin \(llm\.c\), .*\.ds \(datatrove\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault: str, tmp_path: Path) -> None:
    write, message = FAULTS[fault]
    with pytest.raises(RecipeError) as caught:
        open_tokens(write(tmp_path, DOCUMENTS))
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    (path,) = llmc(tmp_path, DOCUMENTS)
    os.chmod(path, 0)
    with pytest.raises(RecipeError, match=r"cannot read .*: Permission denied"):
        open_tokens([path])


def test_a_type_of_ids_has_to_fit(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no whole number of uint16"):
        open_tokens([put(tmp_path / "a.bin", [1, 2, 3], "u1")], "uint16")
    with pytest.raises(RecipeError, match=r"data\.token_dtype = uint32, but .* has ids of uint16 \(llm\.c\)"):
        open_tokens(llmc(tmp_path, DOCUMENTS), "uint32")


def test_sets_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    paths = datatrove(tmp_path, DOCUMENTS)
    (tmp_path / "b").mkdir()
    paths += datatrove(tmp_path / "b", DOCUMENTS)
    Path(paths[-1]).write_text(f"llama|2\n{TOKENS}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"one tokenizer, not of 2: .* \(gpt2\), .* \(llama\)"):
        open_tokens(paths)


def test_what_goes_wrong_later_is_a_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id behind those that are looked at first; a file that has become shorter."""
    monkeypatch.setattr(token_files, "_LOOKED_AT_TOKENS", 8)
    monkeypatch.setattr(token_files, "_DOCUMENT_TOKENS", 8)
    (path,) = raw_after(tmp_path, [*DOCUMENTS, [300]])
    tokens = open_tokens([path], "uint16")
    with pytest.raises(RecipeError, match=f"largest id 300 at token {TOKENS} of"):
        read_all(tokens, tokens.parts(1))
    (path,) = raw_after(tmp_path, DOCUMENTS)
    tokens = open_tokens([path], "uint16")
    parts = tokens.parts(1)
    os.truncate(path, 100)
    with pytest.raises(RecipeError, match=f"no longer has {TOKENS} tokens: it has been changed"):
        read_all(tokens, parts)


@pytest.mark.slow
def test_what_datatrove_itself_writes(tmp_path: Path) -> None:
    """Its tokenizer step, and its step for Megatron."""
    step_of = "datatrove.pipeline.tokens."
    document = pytest.importorskip("datatrove.data").Document
    for_ds = pytest.importorskip(step_of + "tokenizer").DocumentTokenizer
    for_megatron = pytest.importorskip(step_of + "megatron_tokenizer").MegatronDocumentTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<|endoftext|>", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [" ".join("abcdefg"[(number + place) % 7] for place in range(number % 50)) for number in range(200)]
    expected = [tokenizer.encode(text).ids for text in texts]
    settings = {"tokenizer_name_or_path": str(tmp_path / "tokenizer.json"), "eos_token": "<|endoftext|>"}
    steps = (
        *(for_ds(str(tmp_path / "ds"), shuffle_documents=False, **settings),),
        *(for_megatron(str(tmp_path / "megatron"), **settings),),
    )
    for step in steps:
        step.run((document(text=text, id=str(number)) for number, text in enumerate(texts)))
    for folder, name in (("ds", "datatrove"), ("megatron", "megatron")):
        paths = [str(path) for path in (tmp_path / folder).rglob("*") if path.is_file()]
        tokens = open_token_files(paths, None, [0], len(words))
        assert (tokens.format, tokens.documents) == (name, len(texts))
        assert read_all(tokens, tokens.parts(3)) == expected


@pytest.mark.slow
def test_what_nanogpts_own_steps_write(tmp_path: Path) -> None:
    """`data/shakespeare/prepare.py`: one text, of which the last tenth is held out, encoded by tiktoken. It trains."""
    tokenizer = gpt2_tokenizer(tmp_path / "gpt2")
    ranks = data_gym_to_mergeable_bpe_ranks(f"{tokenizer}/merges.txt", f"{tokenizer}/vocab.json")
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": GPT2_END}
    )
    text = "".join(write_texts(tmp_path / "texts", 60))
    encoder, sizes = DocumentEncoder(find_tokenizer("the tokenizer", tokenizer)), dict[str, int]()
    for name, part in (("train", text[: int(len(text) * 0.9)]), ("val", text[int(len(text) * 0.9) :])):
        ids = encoding.encode_ordinary(part)
        np.array(ids, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
        assert encoder.encode([part])[0].tolist() == ids
        tokens = open_token_files([str(tmp_path / f"{name}.bin")], "uint16", [GPT2_END], GPT2_END + 1)
        assert [id for piece in read_all(tokens, tokens.parts(3)) for id in piece] == ids
        sizes[name] = len(ids)
    files = [str(tmp_path / "train.bin"), str(tmp_path / "val.bin")]
    data = ["--data.token_files", *files, "--data.token_dtype", "uint16", "--data.tokenizer", tokenizer]
    run = tmp_path / "run"
    short = ["--run.directory", str(run), "--run.max_updates", "4", "--evaluation.every_tokens", "3072"]
    done = train(*TINY, *short, *data, "--model.vocab_size", "50304")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sizes['train']:,} tokens" in done.stdout
    assert "pieces of a stream, since it has no known ends of documents" in done.stdout
    ledger = read_ledger(run)
    assert [line["target_tokens"] for line in ledger] == [1536] * 4
    assert 0 < ledger[-1]["validation/held_out/loss"] < ledger[0]["loss"]
