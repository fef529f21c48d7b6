"""A run with a constant rate gets its length late."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import TINY, assert_same_run, read_ledger, train, write_texts


@pytest.mark.slow
def test_one_stable_run_extended_to_two_lengths_is_each_of_these_runs(tmp_path: Path) -> None:
    """Four updates of a run of 12, then on to 6 and to 8: bit for bit the run that had this length from the beginning."""
    write_texts(tmp_path / "texts", count=16, largest=1200)

    def run(name: str, updates: int, *more: str) -> Path:
        directory = tmp_path / name
        given = ["--run.directory", str(directory), "--data.text_files", f"{tmp_path}/texts/*.txt"]
        given += ["--data.cache_directory", f"{tmp_path}/cache", "--schedule.total_tokens", str(1536 * updates)]
        given += ["--schedule.shape", "wsd", "--schedule.decay_tokens", "3072", "--schedule.warmup_tokens", "1536"]
        done = train(*TINY, *given, "--batch.micro_batch_size", "24", "--evaluation.sample_tokens", "null", *more)
        assert done.returncode == 0, done.stderr
        return directory

    stable = run("stable", 12, "--run.max_updates", "4")
    assert {entry["learning_rate"] for entry in read_ledger(stable)} == {0.005}
    for updates in (6, 8):
        shutil.copytree(stable, tmp_path / str(updates))
        rates = [entry["learning_rate"] for entry in read_ledger(run(str(updates), updates))]
        assert [rate < 0.005 for rate in rates] == [False] * (updates - 2) + [True] * 2
        assert rates[-1] == 0.0005
    assert_same_run(run("whole", 8), tmp_path / "8")
    shorter, longer = ([entry["loss"] for entry in read_ledger(tmp_path / name)] for name in ("6", "8"))
    assert shorter[:5] == longer[:5], "the first of the decay, too, has the loss before its step"
    assert shorter[5] != longer[5]
