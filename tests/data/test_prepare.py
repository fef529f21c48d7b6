"""A source prepared once: the blocks that its text gives, the same bytes from any number of processes, and gone on with."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recipe.data.token_writers as token_writers
from recipe.commands import prepare as command
from recipe.config.settings import Config, MixtureSource
from recipe.data.blocks import combine_hashes, make_lanes, next_update
from recipe.data.encode import DocumentEncoder
from recipe.data.prepare import Wanted, prepare
from recipe.data.prepare_file import UNFINISHED
from recipe.data.sources import open_source
from recipe.data.token_formats import is_validation_file
from recipe.data.tokenizer import load_tokenizer, train_tokenizer
from recipe.errors import RecipeError
from tests.helpers import TINY, read_ledger, run, start, train, write_texts
from tests.support.lanes import CPU, config_for, run_on

LANES, UPDATES = 4, 8


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in several formats, and a tokenizer."""
    directory = tmp_path_factory.mktemp("corpus")
    texts = [*write_texts(directory / "texts", count=60), "", "<|endoftext|>"]
    train_tokenizer(texts, 400).save_pretrained(directory / "tokenizer")
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with gzip.open(directory / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((directory / "a.jsonl").read_text(encoding="utf-8"))
    pq.write_table(pa.table({"text": texts}), directory / "c.parquet", row_group_size=6)
    return directory


def config_of(corpus: Path, pattern: str, tmp_path: Path, **more: Any) -> Config:
    settings = {"tokenizer": str(corpus / "tokenizer"), "validation_one_in": 5, **more}
    return config_for(tmp_path, str(corpus / pattern), lanes=settings.pop("lanes", LANES), **settings)


def from_tokens(config: Config, pattern: str, **more: Any) -> Config:
    data = replace(config.data, dataset=None, text_files=(), token_files=(pattern,), **more)
    return replace(config, data=data)


def quietly(config: Config, directory: Path, form: Any = "parquet", processes: int = 1) -> dict[str, Any]:
    manifest: dict[str, Any] = prepare(Wanted(config, directory, form), processes, lambda line: None)
    return manifest


def read(config: Config, updates: int = UPDATES) -> tuple[list[str], list[list[int]]]:
    """blocks_sha256 of the first updates, and the held-out documents as token ids without end-of-text."""
    source = open_source(config)
    tokenizer = load_tokenizer(config, [source])
    lanes = make_lanes(run_on(config, 2 * config.batch.lanes), [source], tokenizer)
    hashes = [combine_hashes(next_update(lanes, 2, CPU).sha256) for _ in range(updates)]
    held_out: list[Any] = list(source.validation_documents())
    if not source.holds_ids:
        held_out = DocumentEncoder(tokenizer).encode(held_out)
    return hashes, [ids.tolist() for ids in held_out]


def inodes_of(directory: Path) -> dict[str, int]:
    """Of the files of training documents that are done."""
    notes = [path.stem for path in (directory / UNFINISHED).glob("0*.json")]
    hidden = {note: directory / UNFINISHED / f"training-{note}.parquet" for note in notes}
    return {
        note: (path if path.exists() else directory / f"train-{note}-of-00008.parquet").stat().st_ino
        for note, path in hidden.items()
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("pattern", ["a.jsonl", "b.jsonl.gz", "c.parquet", "texts/*.txt"])
def test_prepared_text_gives_the_blocks_and_the_held_out_documents_of_the_text(
    pattern: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a shard holds nothing to train on, where one has several row groups, and in every epoch."""
    monkeypatch.setattr(token_writers, "ROW_GROUP_TOKENS", 3000)
    config = config_of(corpus, pattern, tmp_path)
    manifest = quietly(config, tmp_path / "out")
    hashes, held_out = read(config)
    assert len(set(hashes)) == UPDATES
    assert len(held_out) > 5
    assert read(from_tokens(config, f"{tmp_path}/out/*.parquet")) == (hashes, held_out)
    assert [name for name in manifest["files"] if is_validation_file(name)] == ["val-00000-of-00001.parquet"]
    assert manifest["held_out"]["documents"] == len(held_out)
    assert manifest["held_out"]["tokens"] == sum(map(len, held_out))
    groups = [pq.ParquetFile(tmp_path / "out" / name).metadata for name in manifest["files"]]
    assert max(g.row_group(i).num_rows for g in groups for i in range(g.num_row_groups)) < 62
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_llmc_gives_the_stream_of_one_lane(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, "a.jsonl", tmp_path, lanes=1)
    manifest = quietly(config, tmp_path / "out", "llmc")
    assert [*manifest["files"]] == ["train-00000-of-00001.bin", "val-00000-of-00001.bin"]
    assert read(from_tokens(config, f"{tmp_path}/out/*.bin")) == read(config)


@pytest.mark.parametrize("form", ["parquet", "llmc"])
def test_token_ids_are_prepared_again(form: str, corpus: Path, tmp_path: Path) -> None:
    """From rows with their val file, and from rows that are pieces of a stream."""
    config = config_of(corpus, "a.jsonl", tmp_path, lanes=1)
    quietly(config, tmp_path / "first")
    of_tokens = from_tokens(config, f"{tmp_path}/first/*.parquet")
    manifest = quietly(of_tokens, tmp_path / "second", form)
    assert read(from_tokens(config, f"{tmp_path}/second/train-*"))[0] == read(config)[0]
    assert read(from_tokens(config, f"{tmp_path}/second/*-of-*")) == read(config)
    assert manifest["rows_are"] == "documents"

    packed = replace(of_tokens, data=replace(of_tokens.data, rows_are="packed"))
    manifest = quietly(packed, tmp_path / "third", form)
    assert manifest["rows_are"] == "packed"
    again = open_source(from_tokens(packed, f"{tmp_path}/third/*-of-*"))
    assert again.holds_pieces
    for read_all in ("training_documents", "validation_documents"):  # a flat stream is cut at other places
        stream, expected = (np.concatenate([*getattr(of, read_all)()]) for of in (again, open_source(packed)))
        np.testing.assert_array_equal(stream, expected)


def test_rows_that_hold_ends_of_text_keep_them(corpus: Path, tmp_path: Path) -> None:
    end = json.loads((corpus / "tokenizer/tokenizer.json").read_text("utf-8"))["added_tokens"][0]["id"]
    rows = [[end, end, 5], [end, end], [end, end, end], [], [end], [6, end, end], [7, end, 8], [9]] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows), encoding="utf-8")
    config = from_tokens(config_of(corpus, "a.jsonl", tmp_path), f"{tmp_path}/rows.jsonl", validation_one_in=None)
    quietly(config, tmp_path / "out")
    assert read(from_tokens(config, f"{tmp_path}/out/*.parquet"), 2) == read(config, 2)


def test_what_is_written_does_not_depend_on_the_processes(corpus: Path, tmp_path: Path) -> None:
    for form, numbers in (("parquet", (1, 2, 3)), ("llmc", (1, 2))):
        written = []
        for processes in numbers:
            quietly(config_of(corpus, "a.jsonl", tmp_path), tmp_path / f"{form}{processes}", form, processes)
            written.append(files_of(tmp_path / f"{form}{processes}"))
        assert len(written[0]) == 10
        assert all(files == written[0] for files in written)


def test_the_manifest_says_what_is_in_each_file(corpus: Path, tmp_path: Path) -> None:
    manifest = quietly(config_of(corpus, "a.jsonl", tmp_path), tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    for name, file in manifest["files"].items():
        content, table = (tmp_path / "out" / name).read_bytes(), pq.read_table(tmp_path / "out" / name)
        ids = table["input_ids"]
        assert ids.type.value_type == pa.uint16()
        assert file == {
            "documents": len(ids),
            "tokens": len(ids.combine_chunks().flatten()),
            "bytes": len(content),
            "sha256": sha256(content).hexdigest(),
        }
        metadata = table.schema.metadata
        assert metadata[b"recipe.vocabulary_sha256"].decode() == manifest["tokenizer"]["vocabulary_sha256"]
        assert metadata[b"recipe.tokenizer"] == b"tokenizer"
        assert int(metadata[b"recipe.end_of_text"]) == manifest["tokenizer"]["end_of_text"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(corpus) not in json.dumps(manifest)


class Killed(BaseException):
    """In place of a SIGKILL."""


def test_what_is_done_is_not_done_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any time: within a file, before the held-out documents are put together, before the manifest."""
    config, out = config_of(corpus, "a.jsonl", tmp_path), tmp_path / "out"
    whole = quietly(config, tmp_path / "whole")
    replaced, left = os.replace, 0

    def replace_some(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replaced(source, target)

    monkeypatch.setattr("recipe.run.files.os.replace", replace_some)
    kills, kept = 0, dict[str, int]()
    while True:
        left = 5  # the settings, what is held out, the file, the note of it, and one of the next file
        try:
            assert quietly(config, out) == whole
            break
        except Killed:
            kills += 1
        inodes = inodes_of(out)
        assert inodes | kept == inodes, "they are the files that they were"
        kept = inodes
        assert not (out / "manifest.json").exists()
    assert kills >= 8
    assert len(kept) == 8
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lanes": 2}, "batch.lanes = 4, and not 2"),
        ({"validation_one_in": 7}, "data.validation_one_in = 5, and not 7"),
        ({"format": "llmc"}, "format = parquet, and not llmc"),
        ({"tokenizer": None}, "data.tokenizer = tokenizer, and not None"),
        ({"text": 1}, "from other text, a.jsonl has [0-9,]+ bytes instead of"),
    ],
)
def test_a_directory_is_not_mixed_of_two_preparations(
    change: dict[str, Any], words: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    config, out = replace(config_of(corpus, "a.jsonl", tmp_path)), tmp_path / "out"
    config = replace(config, data=replace(config.data, text_files=(str(tmp_path / "a.jsonl"),)))
    quietly(config, out)
    before = files_of(out)
    lines: list[str] = []
    prepare(Wanted(config, out, "parquet"), 1, lines.append)
    assert lines == [f"{out} is complete: nothing is left to do"]
    change = dict(change)
    if change.pop("text", None):
        with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
    form = change.pop("format", "parquet")
    config = replace(config, batch=replace(config.batch, lanes=change.pop("lanes", LANES)))
    with pytest.raises(RecipeError, match=f"{out} was prepared .*{words}.*: set --output to another directory"):
        quietly(replace(config, data=replace(config.data, **change)), out, form)
    assert files_of(out) == before


def test_a_directory_of_somebody_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, "a.jsonl", tmp_path)
    with pytest.raises(RecipeError, match=r"is not empty, and was not made by this command"):
        quietly(config, corpus)
    with pytest.raises(RecipeError, match=r"a.jsonl is no directory"):
        quietly(config, corpus / "a.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"format": 3, "files": {}}', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"manifest.json is not what this command writes"):
        quietly(config, tmp_path / "out")
    manifest = quietly(config, tmp_path / "whole")
    (tmp_path / "whole" / [*manifest["files"]][2]).write_bytes(b"cut")
    with pytest.raises(RecipeError, match=r"train-00002-of-00008.parquet has 3 bytes and not"):
        quietly(config, tmp_path / "whole")


def test_a_tokenizer_that_is_trained_on_the_text_is_saved_beside_the_files(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, "a.jsonl", tmp_path, tokenizer=None)
    manifest = quietly(config, tmp_path / "out")
    of_tokens = from_tokens(config, f"{tmp_path}/out/*.parquet", tokenizer=str(tmp_path / "out/tokenizer"))
    assert read(of_tokens) == read(config)
    assert quietly(config, tmp_path / "out") == manifest
    assert manifest["tokenizer"]["name"] == "tokenizer"
    other = replace(of_tokens, data=replace(of_tokens.data, tokenizer=str(corpus / "tokenizer")))
    with pytest.raises(RecipeError, match="was prepared with another tokenizer than"):
        open_source(other)


def test_what_cannot_be_prepared_is_one_line(corpus: Path, tmp_path: Path) -> None:
    import resource

    config = config_of(corpus, "a.jsonl", tmp_path)
    mixture = replace(config.data, text_files=(), sources=(MixtureSource(text_files=("a",)), MixtureSource()))
    with pytest.raises(RecipeError, match="one by one"):
        quietly(replace(config, data=mixture), tmp_path / "none")
    (tmp_path / "held.jsonl").write_text('{"text": "all of it"}\n' * 8, encoding="utf-8")
    held = replace(config, data=replace(config.data, text_files=(str(tmp_path / "held.jsonl"),), validation_one_in=2))
    one_in = next(
        one_in
        for one_in in range(2, 99)
        if open_source(replace(held, data=replace(held.data, validation_one_in=one_in))).is_held_out("all of it")
    )
    with pytest.raises(RecipeError, match="has no documents to train on"):
        quietly(replace(held, data=replace(held.data, validation_one_in=one_in)), tmp_path / "empty")
    assert not (tmp_path / "empty/manifest.json").exists()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(
            RecipeError, match=f"cannot write {tmp_path}/full: .*too large; files that are done are kept"
        ):
            quietly(config, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert quietly(config, tmp_path / "full") == quietly(config, tmp_path / "whole")


def test_a_process_that_dies_is_one_line_and_what_is_done_is_kept(corpus: Path, tmp_path: Path) -> None:
    config, out, killed = config_of(corpus, "a.jsonl", tmp_path), tmp_path / "out", list[int]()

    def kill_one() -> None:
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.002)
        killed.append(int(workers[0].pid or 0))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(
        RecipeError, match=r"a process was killed by signal 9, .*; the same command goes on from here"
    ) as error:
        quietly(config, out, processes=2)
    thread.join()
    assert error.value.exit_code == 1
    assert not multiprocessing.active_children()
    assert quietly(config, out, processes=2) == quietly(config, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text((corpus / "a.jsonl").read_text("utf-8") * 16, encoding="utf-8")
    flags = ["--data.text_files", f"{tmp_path}/a.jsonl", "--data.tokenizer", str(corpus / "tokenizer")]
    command = [sys.executable, "-m", "recipe", "prepare", *TINY, *flags, "--processes", "2", "--output"]
    process = start([*command, str(tmp_path / "out")])
    notes, deadline = tmp_path / "out" / UNFINISHED, time.monotonic() + 120
    while not [*notes.glob("0*.json")] and time.monotonic() < deadline:
        time.sleep(0.01)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 4, "two that work, the one that forks them, and multiprocessing's own"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert not alive
    if number == signal.SIGKILL:
        assert (process.returncode, errors) == (-9, "")
    else:
        assert process.returncode == 128 + number
        assert errors == f"stopped by signal {number} before all was prepared; the same command goes on from here\n"
    inodes = inodes_of(tmp_path / "out")
    assert 1 <= len(inodes) < 8
    assert not [*(tmp_path / "out").glob("*.parquet")], "which somebody would train on"
    again = run([*command, str(tmp_path / "out")])
    assert again.returncode == 0, again.stderr
    assert f"{len(inodes)} of 8 files are done already" in again.stdout
    final = {note: (tmp_path / "out" / f"train-{note}-of-00008.parquet").stat().st_ino for note in inodes}
    assert final == inodes
    whole = run([*command, str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_says_how_to_train_and_that_gives_the_same_updates(corpus: Path, tmp_path: Path) -> None:
    """With a tokenizer that is trained on the text, which the run would train on the same."""
    flags = [*TINY, "--data.text_files", f"{corpus}/texts/*.txt", "--data.validation_one_in", "5"]
    of_text = train(*flags, "--run.max_updates", "3", "--run.directory", f"{tmp_path}/text")
    assert of_text.returncode == 0, of_text.stderr
    out = tmp_path / "out"
    command = [*flags, "--run.max_updates", "3", "--run.directory", f"{tmp_path}/tokens"]
    done = run([sys.executable, "-m", "recipe", "prepare", *command, "--output", str(out), "--processes", "1"])
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:4] == ["python", "-m", "recipe", "train"]
    of_tokens = train(*words[4:])
    assert of_tokens.returncode == 0, of_tokens.stderr
    hashes = [[line["blocks_sha256"] for line in read_ledger(tmp_path / name)] for name in ("text", "tokens")]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 3
    losses = [[line["loss"] for line in read_ledger(tmp_path / name)] for name in ("text", "tokens")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["set --output to the directory"]),
        (["--output", "out", "--repo_id", "data"], ["repo_id = 'data'", "user/name"]),
        (["--output", "out", "--format", "csv"], ["format", "csv"]),
        (["--output", "out", "--data.sources", "[{dataset: a/b}]", "--data.text_files", "[]"], ["one by one"]),
    ],
)
def test_flags_are_answered_before_anything_is_read(
    more: list[str], words: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *TINY, "--data.text_files", f"{corpus}/a.jsonl", *more])
    monkeypatch.setattr("recipe.run.stop.StopRequest.listen", lambda stop: None)  # for signals of this process
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        command.main()
    assert all(word in str(error.value) for word in words)
    assert not [*tmp_path.iterdir()]
