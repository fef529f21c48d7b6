"""The run that is stopped, killed and resumed."""

from __future__ import annotations

import resource
from pathlib import Path

from recipe.checkpoint.verify import why_invalid
from recipe.run.directory import list_checkpoints
from tests.helpers import SCRIPT, TINY, start_training, wait_for

UPDATES = 24
SMALL_DISK_BYTES = 100_000  # of the largest file that can be written: less than the model's


def arguments(directory: Path, *more: str) -> list[str]:
    """24 updates over a small corpus, so that some are of the third epoch; a checkpoint every 4, windows of 5 documents."""
    return [
        *TINY,
        *["--run.directory", str(directory), "--data.text_files", f"{directory.parent}/texts/*.txt"],
        *["--schedule.total_tokens", str(UPDATES * 1536), "--checkpoint.every_tokens", str(4 * 1536)],
        *["--data.shuffle_blocks", "5", "--batch.micro_batch_size", "8", "--model.dropout", "0.1"],
        *["--data.cache_directory", str(directory.parent / "cache"), *more],
    ]


def check_full_disk(directory: Path, script: tuple[str, ...] = (SCRIPT,)) -> None:
    """No large file can be written after the first checkpoint: one line at the end, and that checkpoint is kept.

    Raises:
        AssertionError: it is not.
        IndexError: there is none.
    """
    process = start_training(*arguments(directory, "--run.max_updates", "14", "--checkpoint.keep", "1"), script=script)
    wait_for(process, "step-000004")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, SMALL_DISK_BYTES))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "checkpoint after update 14 failed" in output
    (line,) = errors.splitlines()
    assert f"cannot write the model to {directory}/final: " in line
    assert "File too large" in line
    assert why_invalid(list_checkpoints(directory / "checkpoints")[0]) is None
