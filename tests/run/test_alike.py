"""Hosts that differ, in settings, text or a run directory that is not shared, are refused with one line that says where.

A host is here a process with a current directory of its own, in which the paths of the command line lead to other files.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipe.data.tokenizer import train_tokenizer
from tests.helpers import ROOT, SCRIPT, TINY, end_of, free_port, read_ledger, start, write_texts

HOST = platform.node()


def train_on_hosts(
    hosts: Sequence[Path], arguments: Sequence[Sequence[str]], scripts: Sequence[str] = (str(ROOT / SCRIPT),) * 2
) -> tuple[list[int], str]:
    """(exit codes, all on stderr) of a training on one rank of each of these hosts, each by a script of its own."""
    port, processes = str(free_port()), []
    for rank, (host, own) in enumerate(zip(hosts, arguments, strict=True)):
        group = {"RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [
            sys.executable,
            scripts[rank],
            *TINY,
            "--data.text_files",
            "texts/*.txt",
            "--run.directory",
            "run",
            *own,
        ]
        processes.append(start(command, cwd=host, **group))
    codes, _, errors = end_of(processes)
    return codes, errors


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    """Two directories with the same text."""
    found = [tmp_path / "a", tmp_path / "b"]
    for host in found:
        write_texts(host / "texts")
    return found


def assert_refused(codes: Sequence[int], errors: str, words: Sequence[str]) -> None:
    """By one line of rank 0, on all ranks."""
    assert codes == [2, 2], errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    for word in words:
        assert word in line
    assert "Traceback" not in errors


def test_other_settings(hosts: list[Path]) -> None:
    codes, errors = train_on_hosts(hosts, [[], ["--optimizer.learning_rate", "0.002"]])
    assert_refused(codes, errors, ["optimizer.learning_rate on rank 1", f"host {HOST}", "0.002; on rank 0"])
    assert not (hosts[0] / "run").exists()


@pytest.mark.slow
def test_the_cache_may_be_elsewhere_and_hosts_that_agree_train(hosts: list[Path]) -> None:
    once = ["--run.max_updates", "1"]
    codes, errors = train_on_hosts(hosts, [once, [*once, "--data.cache_directory", "elsewhere"]])
    assert codes == [0, 0], errors
    assert len(read_ledger(hosts[0] / "run")) == 1


@pytest.mark.parametrize("change", ["other text", "a file less"])
def test_other_text(hosts: list[Path], change: str) -> None:
    changed = hosts[1] / "texts/003.txt"
    if change == "other text":
        changed.write_text(changed.read_text(encoding="utf-8").replace("e", "a"), encoding="utf-8")
        words = ["003.txt on rank 1", "hash", "has to be the same on all hosts"]
    else:
        changed.unlink()
        words = ["the text on rank 1", "texts/003.txt", "No such file", "on rank 0"]
    codes, errors = train_on_hosts(hosts, [[], []])
    assert_refused(codes, errors, words)


@pytest.mark.slow
def test_another_tokenizer_with_the_same_vocabulary(hosts: list[Path]) -> None:
    train_tokenizer([path.read_text("utf-8") for path in hosts[0].glob("texts/*")], 384).save_pretrained(
        hosts[0] / "tokenizer"
    )
    shutil.copytree(hosts[0] / "tokenizer", hosts[1] / "tokenizer")
    file = hosts[1] / "tokenizer/tokenizer.json"
    changed = json.loads(file.read_text("utf-8")) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(changed), encoding="utf-8")
    codes, errors = train_on_hosts(hosts, [["--data.tokenizer", "tokenizer"]] * 2)
    assert_refused(codes, errors, ["the tokenizer on rank 1", "has to be the same on all hosts"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("import platform; platform.python_version = lambda: '3.0.1'", ["python on rank 1", ": 3.0.1; on rank 0"]),
        (
            "import recipe.run.environment as e; e._recipe_commit = lambda: 'another'",
            ["recipe_commit on rank 1", ": another; on rank 0"],
        ),
    ],
)
def test_another_installation(hosts: list[Path], fault: str, words: list[str]) -> None:
    (hosts[1] / "other.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{fault}\n"
        f"runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    codes, errors = train_on_hosts(hosts, [[], []], [str(ROOT / SCRIPT), "other.py"])
    assert_refused(codes, errors, words)


@pytest.mark.slow
def test_a_run_directory_that_hosts_do_not_share(hosts: list[Path]) -> None:
    cache = ["--data.cache_directory", str(hosts[0] / "cache")]
    codes, errors = train_on_hosts(hosts, [[*cache, "--run.max_updates", "1"]] * 2)
    assert codes == [0, 0], errors
    codes, errors = train_on_hosts(hosts, [cache, cache])
    assert_refused(codes, errors, ["the checkpoint on rank 1", "step-000001, not there: hosts share no run.directory"])
    shutil.copytree(hosts[0] / "run", hosts[1] / "run")
    codes, errors = train_on_hosts(hosts, [[*cache, "--run.max_updates", "2"]] * 2)
    assert codes == [0, 0], errors
    assert len(read_ledger(hosts[0] / "run")) == 2
