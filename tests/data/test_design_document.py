"""docs/design.md is enough to compute the hash of every update's blocks; see tests/support/design_document.py."""

from __future__ import annotations

import ast
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
    documents = sum(len(list(order.documents(shard))) for shard in range(len(order.shards)))
    assert documents < sum(map(len, order.shards)), "some are held out"
    assert {len(shard) for shard in order.shards} == {1}


@pytest.mark.slow
def test_the_document_gives_the_blocks_of_several_epochs_over_grouped_files_and_of_the_standard_library(
    tmp_path: Path,
) -> None:
    """Of one small run each; the second takes the tokenizer of the first."""
    write_texts(tmp_path / "texts", count=36, largest=1400)
    (tmp_path / "texts/000.txt").write_bytes(b"caf\xe9\r\nand <|endoftext|> in the\rmiddle\n" * 900)
    (tmp_path / "texts/035.txt").write_bytes(b"")
    (tmp_path / "texts/0.txt").symlink_to("001.txt")
    os.link(tmp_path / "texts/002.txt", tmp_path / "texts/zzz.txt")
    (tmp_path / "texts/up").symlink_to("..")
    texts = [
        "--data.text_files",
        f"{tmp_path}/texts/**/*.txt",
        "--data.validation_one_in",
        "4",
        "--data.shuffle_blocks",
        "20",
    ]
    short = ["--batch.lanes", "2", "--run.max_updates", "24", "--checkpoint.every_tokens", "null"]
    done = train(*TINY, "--run.directory", str(tmp_path / "texts-run"), *texts, *short)
    assert done.returncode == 0, done.stderr
    order = check_order(tmp_path / "texts-run")
    assert order.epochs_begun >= 3
    assert {len(shard) for shard in order.shards} == {1, 2}

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
