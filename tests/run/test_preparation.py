"""Until training begins there is nothing to save: a signal ends the run at once, whatever its ranks are waiting for."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.helpers import SCRIPT, TINY, end_of, start_ranks
from tests.support.http_server import HttpServer, for_ever


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_before_training_ends_all_ranks_with_one_line(number: int, tmp_path: Path) -> None:
    """Rank 0 waits for a server that says nothing, rank 1 for rank 0: neither comes back to Python by itself."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.jsonl").write_text('{"text": "some text"}\n' * 8)
    with HttpServer(tmp_path / "files") as server:
        server.plan("a.jsonl", for_ever("hang"))
        directory = ["--run.directory", str(tmp_path / "run"), "--data.text_files", server.address("a.jsonl")]
        ranks = start_ranks(2, [SCRIPT, *TINY, *directory], stderr=PIPE)
        while not server.requests:
            time.sleep(0.02)
        for rank in ranks:
            rank.send_signal(number)
        codes, _, errors = end_of(ranks, timeout=25)  # less than the server is waited for
    assert codes == [128 + number, 128 + number]
    assert errors == f"stopped by signal {number} before training began\n"
    assert not (tmp_path / "run/events.jsonl").exists()
