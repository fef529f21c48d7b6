"""A text behind a signed address or a password: it is read, and the secret is nowhere but in the request."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recipe.data.remote_files as remote_files
from recipe.commands import card as card_command
from recipe.commands import report as report_command
from recipe.config.command_line import load_config, read_config
from recipe.data.sources import open_source
from recipe.errors import RecipeError
from recipe.text import public_address, redact
from tests.helpers import TINY, read_events, read_ledger, train, write_texts
from tests.support.http_server import HttpServer

DOCUMENTS = 40
FIRST, SECOND = "5ecretOfTheFirstDay", "5ecretOfTheSecondDay"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    """It has a file that is streamed, a row group for each document, and one in one row group, which is downloaded."""
    served = tmp_path / "served"
    texts = write_texts(tmp_path / "texts", count=DOCUMENTS)
    served.mkdir()
    pq.write_table(pa.table({"text": texts}), served / "a.parquet", row_group_size=1)
    pq.write_table(pa.table({"text": texts}), served / "whole.parquet")
    with HttpServer(served) as server:
        yield server


def with_password(address: str, secret: str) -> str:
    return address.replace("://", f"://me:{secret}@")


@pytest.mark.slow
def test_a_secret_of_an_address_is_written_nowhere(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two trainings with different signatures of the same file, a tracker, its report and its card."""
    directory, address = tmp_path / "run", server.address("a.parquet")
    said = []

    def train_with(secret: str, updates: int) -> None:
        server.secret = secret
        text = [f"{address}?X-Amz-Signature={secret}&X-Amz-Expires=60", with_password(address, secret)]
        done = train(
            *[
                *TINY,
                "--run.directory",
                str(directory),
                "--data.text_files",
                text[0],
                "--evaluation.sets.mine",
                text[1],
            ],
            *["--run.max_updates", str(updates), "--log.trackers", "tensorboard"],
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)

    train_with(FIRST, 2)
    train_with(SECOND, 4)
    assert [entry["update"] for entry in read_ledger(directory)] == [1, 2, 3, 4]
    (resume,) = read_events(directory, "resume")
    assert resume["changes"] == {"run.max_updates": [2, 4]}, "another signature is no other text"
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory)])
    report_command.main()
    card_command.main()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {".html", ".md", ".yaml", ".jsonl", ".json", ".yml", ".png"} <= {path.suffix for path in files}
    assert [path for path in files if re.search(rb"5ecret|X-Amz", path.read_bytes())] == []
    assert "5ecret" not in "".join(said)
    written = read_config(directory / "config.yaml")
    assert (written.data.text_files, written.evaluation.sets) == ((address,), {"mine": address})
    assert f"| source | files: {address} |" in (directory / "final/README.md").read_text("utf-8")

    monkeypatch.setattr(remote_files, "PAUSES_SECONDS", ())
    for text, hint in ([], True), (["--data.text_files", f"{address}?X-Amz-Signature={FIRST}"], False):
        with pytest.raises(RecipeError, match=f"cannot read {address}: HTTP Error 403") as caught:
            open_source(load_config(["--config", str(directory / "config.yaml"), *text]))
        assert ("if it needs a query or a password, give it with them" in str(caught.value)) is hint
        assert "5ecret" not in str(caught.value)


def test_addresses_that_differ_in_their_query_are_different_files(server: HttpServer, tmp_path: Path) -> None:
    """Downloaded ones too, of which `datasets` writes down where they came from."""
    pages = [server.address(f"whole.parquet?page={number}") for number in (2, 1)]
    config = load_config([*TINY, "--run.directory", str(tmp_path / "run"), "--data.text_files", *pages])
    assert len(list(open_source(config).training_documents())) == 2 * DOCUMENTS
    assert {path.partition("?")[2] for path in server.paths} == {"page=1", "page=2"}
    cached = b"".join(path.read_bytes() for path in (tmp_path / "run/cache").rglob("*") if path.is_file())
    assert cached.count(b"\n") == 2 * DOCUMENTS, "a copy of the text, which is split by rows"
    assert b"page=" not in cached


@pytest.mark.parametrize(
    "address",
    [
        f"http://127.0.0.1:1/a b.txt?sig={FIRST}",
        f"http://127.0.0.1:1/a.txt?sig={FIRST[:6]} {FIRST}",
        f"http://me:{FIRST}#x@127.0.0.1:1/a.txt",
        f"http://me:{FIRST}/x@127.0.0.1:1/a.txt",
        f"http://me:{FIRST}@/a.txt",
        f"http://127.0.0.1:1/a.zip?sig={FIRST}",
        f"http://127.0.0.1:1/é.txt?sig={FIRST}",
    ],
)
def test_what_is_no_address_is_refused_without_its_secret(address: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.text_files: 'http://") as caught:
        load_config([*TINY, "--data.text_files", address])
    assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host:8080/a.txt?sig=1#part", "https://host:8080/a.txt"),
        ("https://token@host", "https://host"),
        ("no 'https://host/a.txt?sig=1': 403", "no 'https://host/a.txt': 403"),
        ('["https://host/a?x=1", "https://me:pw@host/b?x=2"]', '["https://host/a", "https://host/b"]'),
        ('"https://host/a","https://me:pw@host/b"', '"https://host/a","https://host/b"'),
        ("https://host/a.txt?sig='1'", "https://host/a.txt"),
        ("https://me:a#b@host/a.txt https://me:a/b@host/a.txt", "https://host/a.txt https://host/a.txt"),
        ("https://proxy/https://me:pw@host/a?sig=1", "https://proxy/https://host/a"),
        ("http://[::1]:8080/@a.txt and http://host:80/@a.txt", "http://[::1]:8080/@a.txt and http://host:80/@a.txt"),
        ("hf://user/name@step-000001, what? #1", "hf://user/name@step-000001, what? #1"),
        ("socks5://me:pw@proxy:1", "socks5://proxy:1"),
    ],
)
def test_an_address_that_is_shown_has_no_secret(text: str, expected: str) -> None:
    assert redact(text) == public_address(text) == str(RecipeError(text)) == expected


def test_a_new_signature_leaves_the_order_of_the_files() -> None:
    """Also where one name begins like another, whose query would come before its ending."""
    from recipe.config.text_files import expand_text_files, public_name

    names = ("a.jsonl", "a.jsonl.gz.jsonl", "b.jsonl")
    for signatures in ("123", "321", "213"):
        found = expand_text_files([f"https://host/{n}?sig={s}" for n, s in zip(names, signatures, strict=True)])
        assert [public_name(path) for path in found.paths] == [f"https://host/{name}" for name in names]
