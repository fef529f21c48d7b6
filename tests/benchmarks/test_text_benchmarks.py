"""What measures the reading of text reads what it says, and ends what is over its limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.hub import Counts, Progress
from benchmarks.reading import Limits, read_updates, watch
from benchmarks.text_memory import KINDS, Text, gpt2_tokenizer, reading_of
from recipe.run.ledger import EVENTS, LEDGER
from tests.helpers import run, start
from tests.support.http_server import HUB_DATASET, HttpServer

TINY = 0.001  # 16 documents where there are thousands, and 10 kB in place of 10 MB


def test_the_same_text_in_four_files_gives_the_same_blocks(tmp_path: Path, accelerate_state: None) -> None:
    tokenizer, hashes = gpt2_tokenizer(tmp_path / "tokenizer"), set()
    compressed = [kind for kind in KINDS if "beside" in kind or "the same" in kind]
    for number, kind in enumerate(compressed):
        directory = tmp_path / str(number)
        directory.mkdir()
        measured = read_updates(reading_of(KINDS[kind](Text(directory, TINY)), 1, 2, tokenizer))
        assert measured["tokens_of_an_update"] == 8 * 2048
        assert len(measured["seconds"]) == 2
        assert measured["peak_bytes"] >= max(measured["resident_bytes"]) > 100e6
        hashes.add(measured["blocks_sha256"])
    assert len(compressed) == 3
    assert len(hashes) == 1


def test_files_have_the_sizes_that_their_kind_says(tmp_path: Path) -> None:
    largest = {}
    for number, (kind, write) in enumerate(KINDS.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        write(Text(directory, TINY))
        sizes = [path.stat().st_size for path in directory.iterdir()]
        largest[kind] = len(sizes), max(sizes)
    found = [largest[kind] for kind in ("40 `.txt` of 6 MB", "5,000 `.txt` of 4 kB", "one `.txt` of 50 MB")]
    for (files, size), (expected_files, expected_size) in zip(found, [(40, 6e3), (16, 4e3), (1, 50e3)], strict=True):
        assert files == expected_files
        assert 0.9 * expected_size < size < 1.05 * expected_size  # a few characters have several bytes
    assert all(files == 1 for kind, (files, _) in largest.items() if "txt" not in kind)


def test_a_process_over_its_limit_is_ended() -> None:
    """And so are those beside it, which would wait for it."""
    program = "import sys, time; held = b'x' * int(sys.argv[1]); time.sleep(60)"
    small, large = (start([sys.executable, "-c", program, size], fork=False) for size in ("1000", "300000000"))
    peaks, killed = watch([small, large], Limits(resident_bytes=200e6))
    assert killed.startswith("killed above 0.2 GB")
    assert peaks[0] < 100e6 < 200e6 < peaks[1]
    assert [small.returncode, large.returncode] == [-9, -9]


def test_one_that_fails_ends_those_that_wait_for_it() -> None:
    waits, fails = (
        start([sys.executable, "-c", program], fork=False)
        for program in ("import time; time.sleep(60)", "raise SystemExit(3)")
    )
    assert watch([waits, fails], Limits(seconds=60))[1] == ""
    assert (waits.returncode, fails.returncode) == (-9, 3)


def test_progress_has_what_was_asked_for_since_its_beginning(tmp_path: Path) -> None:
    totals, run_directory = tmp_path / "counts.json", tmp_path / "run"
    totals.write_text('{"counts": {"pages": 3, "ranges": 2}, "bytes": 7}', encoding="utf-8")
    with HttpServer(tmp_path) as server:
        progress = Progress(run_directory, 1, Counts(server.address("counts.json")))
        totals.write_text('{"counts": {"pages": 3, "ranges": 4, "other": 1}, "bytes": 1007}', encoding="utf-8")
        run_directory.mkdir()
        (run_directory / LEDGER).write_text('{"update": 0}\n{"update": 1}\n', encoding="utf-8")
        (run_directory / EVENTS).write_text('{"event": "start", "update": 0}\n', encoding="utf-8")
        assert progress.is_complete()
    assert list(progress.reached) == ["begun", "update 0", "update 1"]
    assert {(reached["requests"], reached["bytes"]) for reached in progress.reached.values()} == {(3, 1000)}


@pytest.mark.slow
def test_hub_benchmark_writes_its_numbers(tmp_path: Path) -> None:
    served, tokenizer = tmp_path / "served", gpt2_tokenizer(tmp_path / "tokenizer")
    served.mkdir()
    for number in range(4):
        text = Text(served, 0.01)
        text.rows(f"{number}.jsonl", ({"text": document} for document in text.short(10_000)))
    arguments = ["--dataset", HUB_DATASET, "--tokenizer", tokenizer, "--lanes", "4", "--updates", "2"]
    with HttpServer(served) as server:
        hub = {"HF_ENDPOINT": server.address("").rstrip("/"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "benchmarks.hub", *arguments, "--burst", "2", "--growth", "3"]
        done = run([*command, "--out", str(tmp_path / "out")], **hub)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "out").glob("*-hub.md")
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    one, two = result["trainings"]
    assert one["blocks_sha256"] == two["blocks_sha256"]
    assert (len(one["peak_bytes"]), len(two["peak_bytes"]), len(one["data_wait_seconds"])) == (1, 2, 2)
    assert min(one["peak_bytes"] + two["peak_bytes"]) > 200e6
    assert [len(result[name]["seconds"]) for name in ("first", "burst", "growth")] == [1, 2, 3]
    assert "update 1: s" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_gpu_reading_has_a_row_for_each_source(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.gpu_reading", "--quick", "--out", str(tmp_path)], timeout=300)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("*-gpu_reading.md")
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert list(result["sources"]) == ["blocks read before", "a flat file of ids", "Parquet of ids", "text"]
    for name, found in result["sources"].items():
        assert f"| {name} |" in page.read_text(encoding="utf-8")
        ((*seconds,),), ((*waited,),) = found["update_seconds"], found["data_wait_seconds"]  # of the one round
        assert len(seconds) == len(waited) == 3
        assert all(0 <= wait < second for wait, second in zip(waited, seconds, strict=True))
