"""The run that card and page are tested with; that of `test_trained_run.py` is a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.run_files import write_run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A finished run on two ranks after one, with validation sets, samples, events, a parity check and an empty final/."""
    return write_run(tmp_path / "run")
