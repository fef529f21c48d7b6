"""Fixtures for all tests: the text and the run that several folders look at, and state that libraries keep."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# Before libraries read them: what a developer has exported decides nothing, and workers do not fight for the cores.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "WORLD_SIZE"):
    os.environ.pop(name, None)
os.environ["OMP_NUM_THREADS"] = "1"

from tests import helpers  # noqa: E402
from tests.helpers import TINY, train, write_texts  # noqa: E402

# By a run of the suite on two cores, from the longest on: whoever begins last should not have the most to do.
LONGEST_FIRST = (
    *("data/test_prepare_engine", "benchmarks/test_benchmarks", "model/test_kernels"),  # of the slow ones
    *("checkpoint/test_resume", "test_train", "hub/test_background", "report/test_report", "plan/test_run_plan"),
    *("data/test_data_faults", "step/test_stability", "step/test_update", "config/test_errors", "report/test_card"),
    *("plan/test_memory", "data/test_data", "data/test_prepare"),
)
LENGTHY = (
    *("benchmarks/test_gpu_benchmark", "data/test_data_faults", "data/test_data.py::test_state_is_exact"),
    *("model/test_kernels", "plan/test_memory", "report/test_card", "report/test_report"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out tests that start a process, and lengthy ones")


def pytest_configure(config: pytest.Config) -> None:
    helpers.may_start_processes = not config.getoption("--quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take files in this order."""
    order = {f"tests/{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    if config.getoption("--quick"):
        lengthy = tuple(f"tests/{name}" for name in LENGTHY)
        items[:] = [item for item in items if not item.nodeid.startswith(lengthy)]


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to look at it again."""
    gc.freeze()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that the first worker to ask for it makes, and all read. Nobody changes it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory = root / name
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.made").exists():
            directory.mkdir(exist_ok=True)  # if it was left out before
            make(directory)
            (root / f"{name}.made").touch()
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of the standard library, as .txt."""
    return once(tmp_path_factory, "texts", lambda directory: write_texts(directory, count=60))


FINISHED_UPDATES = 8


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A complete run in a directory `tiny`: held-out text, a set of its own, an awkward prompt, parity check, checkpoints."""

    def make(directory: Path) -> None:
        done = train(
            *[*TINY, "--run.directory", str(directory / "tiny"), "--data.text_files", f"{texts}/*.txt"],
            *["--data.validation_one_in", "10", "--evaluation.prompts", 'print("é|😀")', "--run.parity_check", "true"],
            *["--schedule.total_tokens", str(FINISHED_UPDATES * 1536), "--evaluation.sets.mine", f"{texts}/00*.txt"],
            *["--evaluation.every_tokens", "6144", "--checkpoint.every_tokens", "3072", "--model.vocab_size", "380"],
        )
        assert done.returncode == 0, done.stderr
        (directory / "stdout.txt").write_text(done.stdout, encoding="utf-8")

    return once(tmp_path_factory, "finished", make) / "tiny"


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """accelerate as it is in a new process, before and after."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def accelerator(accelerate_state: None) -> Any:
    """One rank on the CPU."""
    from tests.support.gradients import make_accelerator

    return make_accelerator()
