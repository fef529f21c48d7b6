"""A resumed run reads the text that its checkpoint was trained on, or says which file is another."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.checkpoint.files import TrainingState, read_state
from recipe.checkpoint.resume import ResumePoint, find_resume_point
from recipe.checkpoint.same_text import open_text
from recipe.config.command_line import load_config
from recipe.config.settings import Config, DataConfig
from recipe.data.files import File
from recipe.data.find import find_files_of
from recipe.data.record import PIECE_BYTES, TextFile, pack_record, record_text, touched, unpack_record, what_changed
from recipe.errors import RecipeError
from recipe.run.directory import list_checkpoints
from tests.conftest import FINISHED_UPDATES
from tests.helpers import assert_one_line, read_events, read_ledger, train, write_texts
from tests.support.http_server import HttpServer
from tests.support.lanes import config_for
from tests.support.runs import make_run


def files_of(*patterns: str) -> list[File]:
    return find_files_of(Config(data=DataConfig(text_files=patterns)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """a.txt, b.txt, c.txt; the last is too large to be hashed whole."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name, size in (("a", 10), ("b", 2 * PIECE_BYTES), ("c", 5 * PIECE_BYTES)):
        (directory / f"{name}.txt").write_text(name * size)
    return directory


def edit(path: Path, place: int, text: str = "!") -> None:
    """Other text of the same length, with the same modification time."""
    stamp, data = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    data[place : place + 1] = text.encode()
    path.write_bytes(data)
    os.utime(path, ns=(stamp, stamp))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "longer": (lambda d: (d / "b.txt").write_text("b" * 999), "b.txt has 999 bytes instead of 131,072"),
    "head": (lambda d: edit(d / "c.txt", 0), "c.txt has other text, of the same size"),
    "tail": (lambda d: edit(d / "c.txt", 5 * PIECE_BYTES - 1), "c.txt has other text"),
    "middle": (lambda d: edit(d / "b.txt", PIECE_BYTES), "b.txt has other text"),
    "added": (lambda d: (d / "aa.txt").write_text("new"), "aa.txt is new"),
    "removed": (lambda d: (d / "a.txt").unlink(), "a.txt is missing"),
    "renamed into another order": (lambda d: (d / "a.txt").rename(d / "z.txt"), "a.txt is missing"),
    "added elsewhere": (lambda d: write_texts(d.parent / "d", count=1), "d/000.txt is new"),
    "swapped": (
        lambda d: [(d / old).rename(d / new) for old, new in (("a.txt", "x"), ("b.txt", "a.txt"), ("x", "b.txt"))],
        "a.txt has 131,072 bytes instead of 10",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_file_that_changed_is_named(change: str, corpus: Path) -> None:
    patterns = f"{corpus}/*.txt", f"{corpus.parent}/*/*.txt"
    earlier = unpack_record(pack_record(record_text(files_of(*patterns))))
    assert what_changed(earlier, record_text(files_of(*patterns))) is None
    action, words = CHANGES[change]
    action(corpus)
    changed = what_changed(earlier, record_text(files_of(*patterns)))
    assert changed is not None
    assert changed.startswith(words)


def test_the_same_text_may_lie_elsewhere_and_be_newer(corpus: Path, tmp_path: Path) -> None:
    """And a large file whose time differs is named: between head and tail it may have changed."""
    earlier = record_text(files_of(f"{corpus}/*.txt"))
    shutil.copytree(corpus, tmp_path / "copies/of/corpus")
    os.utime(tmp_path / "copies/of/corpus/a.txt", (1, 1))
    os.utime(tmp_path / "copies/of/corpus/c.txt", (1, 1))
    now = record_text(files_of(f"{tmp_path}/copies/**/*.txt"))
    assert [file.name for file in now] == ["a.txt", "b.txt", "c.txt"]
    assert what_changed(earlier, now) is None
    assert touched(earlier, now) == ["c.txt"]
    for name in "abc":
        (corpus / f"{name}.txt").rename(corpus / f"1{name}.txt")
    assert what_changed(earlier, record_text(files_of(f"{corpus}/*.txt"))) is None, "renamed, in the same order"


def test_a_record_of_20000_files_is_small(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("some text")
    (file,) = record_text(files_of(f"{tmp_path}/0.txt"))
    record = [
        file._replace(name=f"part/{i:05d}.txt", size_bytes=i * 7919 % 5000, hash=f"{hash((i, 1)) % 2**64:016x}")
        for i in range(20_000)
    ]
    assert unpack_record(pack_record(record)) == record
    assert len(pack_record(record)) < 600_000


@pytest.mark.parametrize(
    "text", ["é", "no record", pack_record([])[:-1], base64.b85encode(zlib.compress(b"[1]")).decode()]
)
def test_a_record_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(RecipeError, match="the checkpoint's record of its text cannot be read"):
        unpack_record(text)


def test_addresses_are_recorded_as_the_server_knows_them_without_what_signs_them(corpus: Path) -> None:
    with HttpServer(corpus) as server:
        record = record_text(files_of(f"{server.address('a.txt')}?signature=secret"))
    assert [file.name.rpartition("/")[2] for file in record] == ["a.txt"]
    assert record[0].size_bytes == 10
    assert "secret" not in json.dumps(record)
    assert str(what_changed(record, [record[0]._replace(hash="other")])).endswith(
        "/a.txt has another ETag, of the same size"
    )


def test_the_standard_library_is_recorded_by_its_files(tmp_path: Path) -> None:
    record = record_text(
        find_files_of(replace(config_for(tmp_path), data=DataConfig(dataset="python-standard-library")))
    )
    names = [file.name for file in record]
    assert len(names) > 400
    assert "json/decoder.py" in names
    assert names == sorted(names, key=Path)
    changed = [file._replace(size_bytes=1) if file.name == "json/decoder.py" else file for file in record]
    assert str(what_changed(record, changed)).startswith("json/decoder.py has 1 bytes instead of")


def test_another_commit_of_a_dataset_names_the_setting_that_goes_back() -> None:
    earlier, now = ([TextFile("user/corpus", None, commit * 40)] for commit in "ab")
    assert str(what_changed(earlier, now)).endswith(f"and was at {'a' * 40}: set --data.revision {'a' * 40}")


# ---- A run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: Path, texts: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command that trains two updates on, from a checkpoint alone, on texts that were copied to another place."""
    shutil.copytree(texts, tmp_path / "copy")
    checkpoint = list_checkpoints(finished / "checkpoints")[-1]
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    settings = ["--config", str(finished / "config.yaml"), "--run.directory", str(tmp_path / "run")]
    files = sorted(map(str, (tmp_path / "copy").glob("*.txt")))  # as a shell expands a glob
    settings += ["--resume", str(tmp_path / checkpoint.name), "--data.text_files", *files]
    return lambda *more: [*settings, *more]


def test_a_run_goes_on_with_the_same_text_at_another_path_and_notes_it(
    finished: Path, texts: Path, tmp_path: Path, copied: Callable[..., list[str]]
) -> None:
    (tmp_path / "copy/link.txt").symlink_to("000.txt")  # of which nothing is read
    done = train(*copied(str(tmp_path / "copy/link.txt"), "--run.parity_check", "false"))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("data.text_files was")]
    assert f"data.text_files was ['{texts}/*.txt'], is ['{tmp_path}/copy/000.txt'" in line
    assert len(line) < 500
    assert done.stdout.count(f"left out repetitions (1): {tmp_path}/copy/link.txt is {tmp_path}/copy/000.txt\n") == 1
    (event,) = read_events(tmp_path / "run", "resume")
    earlier, now = event["changes"]["data.text_files"]
    assert (earlier, now[0], len(now)) == ([f"{texts}/*.txt"], f"{tmp_path}/copy/000.txt", 61)
    hashes = {line["update"]: line["blocks_sha256"] for line in read_ledger(finished)}
    found = read_ledger(tmp_path / "run")
    assert found[-1]["update"] == FINISHED_UPDATES
    assert all(line["blocks_sha256"] == hashes[line["update"]] for line in found)


def test_text_that_has_changed_is_refused_before_anything_is_made(
    tmp_path: Path, copied: Callable[..., list[str]]
) -> None:
    (tmp_path / "no-files.yaml").write_text("data: {text_files: []}")
    last = max((tmp_path / "copy").iterdir())
    last.write_text(last.read_text()[:-1] + "~")
    assert_one_line(train(*copied()), [f"{last.name} has other text", "the text is not what", "--resume fresh"])
    assert not (tmp_path / "run/ledger.jsonl").exists()
    without_files = copied()[: copied().index("--data.text_files")]
    with pytest.raises(RecipeError, match=r"data.text_files was \['.*/\*.txt'\] and is \[\]"):
        find_resume_point(load_config([*without_files, "--config", str(tmp_path / "no-files.yaml")]))


def test_a_checkpoint_without_a_record_is_taken_as_before(
    accelerate_state: None, finished: Path, texts: Path, tmp_path: Path
) -> None:
    state = read_state(list_checkpoints(finished / "checkpoints")[-1])
    (tmp_path / "other.txt").write_text("other text")
    run = make_run(config_for(tmp_path, f"{tmp_path}/other.txt"))
    with pytest.raises(RecipeError, match=r"0\w+\.txt is missing: the text is not what"):
        open_text(run, ResumePoint(Path("step-1"), state))
    without = TrainingState(**{name: value for name, value in vars(state).items() if name != "text"})
    assert len(open_text(run, ResumePoint(Path("step-1"), without))) == 1
    assert [file.name for file in unpack_record(run.text_record)] == ["other.txt"]
