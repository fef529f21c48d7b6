"""docs/design.md is enough to compute the hash of every update's blocks; see tests/support/design_document.py."""

from __future__ import annotations

import ast
import json
import os
from itertools import islice
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from tests.helpers import ROOT, TINY, read_ledger, train, write_texts
from tests.support.design_document import Order


def check_order(run: Path, tokenizer: Tokenizer | None = None) -> Order:
    order = Order(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")), tokenizer)
    recorded = [line["blocks_sha256"] for line in read_ledger(run)]
    assert len(recorded) > 5
    assert list(islice(order.hashes(), len(recorded))) == recorded
    return order


def test_the_document_gives_the_blocks_of_a_run_over_text_files(finished: Path) -> None:
    order = check_order(finished)
    (source,) = order.sources
    assert len(list(source.all_documents())) < len(source.shards), "some are held out"


def test_the_document_gives_the_blocks_of_a_mixture(tmp_path: Path) -> None:
    """Of three files of text each and one of rows, with a tokenizer trained on both; the rows are read three times."""
    texts = write_texts(tmp_path / "texts", count=30, largest=1400)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[24:])
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    for number in range(24, 30):
        (tmp_path / f"texts/{number:03d}.txt").unlink()
    sources = [
        {"text_files": [f"{tmp_path}/texts/*.txt"], "weight": 0.1, "name": "files"},
        {"text_files": [f"{tmp_path}/rows.jsonl"], "weight": 0.2},
    ]
    run = tmp_path / "run"
    given = ["--data.sources", json.dumps(sources), "--batch.lanes", "2", "--data.shuffle_blocks", "20"]
    done = train(
        *TINY, *given, "--run.directory", str(run), "--run.max_updates", "10", "--checkpoint.every_tokens", "null"
    )
    assert done.returncode == 0, done.stderr
    order = check_order(run)
    assert order.sources[1].epochs_begun >= 3


@pytest.mark.slow
def test_the_document_gives_the_blocks_of_several_epochs_of_a_file_that_is_cut_and_of_the_standard_library(
    tmp_path: Path,
) -> None:
    """Of one small run each; the second takes the tokenizer of the first."""
    texts = [
        *write_texts(tmp_path / "written", count=36, largest=1400),
        "café\r\nand <|endoftext|> in the\rmiddle\n" * 900,
        "",
    ]
    (tmp_path / "texts").mkdir()
    for name, part in (("a", texts[:5]), ("b", texts[5:])):
        rows = [json.dumps({"id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(part)]
        (tmp_path / f"texts/{name}.jsonl").write_text("\n\n".join(rows), "utf-8", newline="")
    (tmp_path / "texts/0.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "texts/b.jsonl", tmp_path / "texts/zzz.jsonl")
    (tmp_path / "texts/up").symlink_to(".")
    given = [
        "--data.text_files",
        f"{tmp_path}/texts/**/*.jsonl",
        "--data.validation_one_in",
        "4",
        "--data.shuffle_blocks",
        "20",
    ]
    short = ["--batch.lanes", "2", "--run.max_updates", "24", "--checkpoint.every_tokens", "null"]
    done = train(*TINY, "--run.directory", str(tmp_path / "texts-run"), *given, *short)
    assert done.returncode == 0, done.stderr
    order = check_order(tmp_path / "texts-run")
    (source,) = order.sources
    assert source.epochs_begun >= 3
    assert 12 < len(source.shards) < 32, "some places coincide behind a long line"

    library = [
        "--data.tokenizer",
        str(tmp_path / "texts-run/final"),
        "--run.max_updates",
        "6",
        "--evaluation.tokens",
        "64",
    ]
    done = train(*TINY, "--run.directory", str(tmp_path / "library-run"), *library)
    assert done.returncode == 0, done.stderr
    check_order(tmp_path / "library-run", order.tokenizer)


def test_what_is_written_from_the_document_imports_no_recipe() -> None:
    tree = ast.parse((ROOT / "tests/support/design_document.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in imported if str(name).startswith(("recipe", "tests"))]
