"""The readers that the benchmark compares give the tokens that they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.data import corpus, readers
from benchmarks.data.corpus import read_flat, tokenizer_of, write_text, write_tokens
from benchmarks.data.readers import Job
from benchmarks.text_memory import gpt2_tokenizer
from recipe.data.encode import DocumentEncoder
from tests.helpers import run

SIZE, LENGTH, END = 1e5, 32, 50256
OURS = ["ours_from_text", "ours_from_flat", "ours_from_parquet"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("data")
    tokenizer = tokenizer_of(Path(gpt2_tokenizer(root / "tokenizer")))
    write_text(root / "text", SIZE)
    write_tokens(root / "tokens", SIZE, tokenizer)
    return Job(str(root), lanes=1, blocks=4, length=LENGTH, validation_one_in=None)


def test_the_text_has_its_size_and_its_tokens(job: Job) -> None:
    texts = pq.read_table(job.path / "text/text.parquet")["text"].to_pylist()
    assert 0.5 * SIZE < sum(len(text.encode()) for text in texts) < 1.1 * SIZE
    rows = [np.array(row) for row in pq.read_table(job.path / "tokens/train.parquet")["input_ids"].to_pylist()]
    encoded = DocumentEncoder(tokenizer_of(job.path / "tokenizer")).encode(texts)
    assert [row.tolist() for row in rows] == [ids.tolist() for ids in encoded]
    assert read_flat(job.path / "tokens").tolist() == [id for ids in encoded for id in [*ids.tolist(), END]]


@pytest.mark.parametrize("name", ["raw_memmap", "datasets_stream", "litdata", "mosaicml", *OURS])
def test_every_token_is_read_once(job: Job, name: str, accelerate_state: None) -> None:
    """But for what does not fill the last batch; a target is what follows its input."""
    if name in ("litdata", "mosaicml"):
        pytest.importorskip({"litdata": "litdata", "mosaicml": "streaming"}[name])
    if name == "litdata":
        corpus.write_litdata(job.path / "litdata", job.path / "tokens", LENGTH)
    if name == "mosaicml":
        corpus.write_mds(job.path / "mds", job.path / "tokens", LENGTH)
    stream, counted, read = read_flat(job.path / "tokens"), np.zeros(50257, dtype=np.int64), 0
    for inputs, targets, held in getattr(readers, name)(job):
        if inputs.numel():
            assert inputs.dtype == targets.dtype
            assert str(inputs.dtype) == "torch.int64"
            assert (inputs[:, 1:] == targets[:, :-1]).all()
            assert inputs.shape[1] == LENGTH
            counted += np.bincount(inputs.flatten().numpy(), minlength=50257)
            read += inputs.numel() + held
    expected = np.bincount(stream, minlength=50257)
    if name in OURS:  # which hold the rest
        assert (counted <= expected).all()
        assert counted.sum() > 0
        assert read >= len(stream)
    else:
        assert np.abs(expected - counted).sum() <= job.blocks * LENGTH


def test_map_and_group_gives_the_tokens_of_the_text(job: Job) -> None:
    (inputs,) = [np.concatenate([batch.inputs.flatten().numpy() for batch in readers.map_and_group(job)])]
    without_ends = np.concatenate(pq.read_table(job.path / "tokens/train.parquet")["input_ids"].to_numpy())
    assert inputs.tolist() == without_ends[: len(inputs)].tolist()
    assert len(without_ends) - len(inputs) < 2 * LENGTH


@pytest.mark.slow
def test_benchmark_writes_its_numbers(tmp_path: Path) -> None:
    sections_of_minutes = ["limits", "prepared", "on_the_fly"]
    command = [sys.executable, "-m", "benchmarks.data", "--quick", "--only", *sections_of_minutes]
    done = run([*command, "--out", str(tmp_path)], timeout=900)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("*-data.md")
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    sections = result["sections"]
    assert [*sections] == sections_of_minutes
    for section in ("prepared", "on_the_fly"):
        limit = next(iter(sections[section]))
        assert "limit" in limit
        rows = [found for found in sections[section].values() if "rounds" in found]
        assert len(rows) > 2
        assert all(
            one["tokens"] > 0 and one["seconds"] > one["first_seconds"] > 0 for row in rows for one in row["rounds"]
        )
    assert "this recipe, 8 lanes" in page.read_text(encoding="utf-8")
