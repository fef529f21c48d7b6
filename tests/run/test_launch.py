"""What launchers leave in the environment, and what becomes of a run when a launcher, or whoever it is, gets a signal."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import recipe.commands.launch
from recipe.checkpoint.verify import why_invalid
from recipe.config.settings import Config, PerformanceConfig, Sharding
from recipe.errors import RecipeError
from recipe.run.directory import list_checkpoints
from recipe.run.launch import check_launch, ignored_settings, with_sharding_of_launch
from recipe.run.ledger import read_lines
from tests.helpers import (
    ACCELERATE,
    ROOT,
    SCRIPT,
    TINY,
    end_of,
    expect_error,
    free_port,
    launch_file_for_a_cpu,
    read_ledger,
    run,
    start,
    train,
)

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NAMES = (*GROUP, "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
FILES = [str(ROOT / f"accelerate_configs/{name}.yaml") for name in ("cpu", "cpu_2")]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE = 2 without RANK, LOCAL_RANK", "unset WORLD_SIZE"]),
        ({"RANK": "1"}, ["RANK = 1 without WORLD_SIZE", "unset RANK"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK = 0 without RANK"]),
        ({**GROUP, "RANK": ""}, ["RANK = '' is no number", "unset RANK"]),
        ({**GROUP, "WORLD_SIZE": "two"}, ["WORLD_SIZE = 'two' is no number"]),
        ({**GROUP, "MASTER_ADDR": ""}, ["MASTER_ADDR = '' is no address"]),
        ({**GROUP, "RANK": "2"}, ["RANK = 2 of 2 ranks"]),
        ({**GROUP, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, ["LOCAL_RANK = 1 of 1 ranks"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE = 4", "mpirun", "each would train alone"]),
        ({"OMPI_COMM_WORLD_SIZE": ""}, ["OMPI_COMM_WORLD_SIZE = '' is no number"]),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ["SLURM_STEP_NUM_TASKS = 8", "srun", "slurm/train.sbatch"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM is not supported"]),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, ["ACCELERATE_TORCH_DEVICE = cuda:1", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_half_a_launch_is_refused(variables: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as refused:
        check_launch()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        GROUP,
        {"WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {**GROUP, "OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "8"},  # a batch script of a job with tasks of its own
        {"MASTER_ADDR": "localhost"},
    ],
)
def test_a_whole_launch_and_none_are_accepted(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_launch()


def test_a_rank_that_is_alone_is_told_by_itself(tmp_path: Path) -> None:
    """Also one that is not rank 0, or has no number."""
    for variables, words in (({"RANK": "1"}, "rank 1"), ({"RANK": "", "WORLD_SIZE": "2"}, "RANK = ''")):
        done = train(*TINY, "--run.directory", str(tmp_path / "run"), **variables)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert words in line
    assert not (tmp_path / "run").exists()


def test_a_group_that_cannot_be_formed_is_one_line_of_ours(tmp_path: Path) -> None:
    """torch adds warnings of its own: here, that the port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {**GROUP, "MASTER_PORT": str(taken.getsockname()[1])}
        done = train(*TINY, "--run.directory", str(tmp_path / "run"), **variables)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: rank 0 cannot listen at 127.0.0.1:{variables['MASTER_PORT']}")
    assert "another process has this port" in line


FSDP = {**GROUP, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}


@pytest.mark.parametrize(("variables", "sharding"), [(GROUP, "none"), (FSDP, "full"), (HSDP, "hybrid")])
def test_sharding_is_read_from_accelerates_launch_and_taken_from_it(
    variables: dict[str, str], sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = with_sharding_of_launch(Config())
    assert config.performance.sharding == sharding
    assert with_sharding_of_launch(config) == config
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize(
    ("variables", "sharding", "words"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "none", ["FSDP_VERSION = 1", "fsdp_version: 2"]),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "none", ["FSDP_OFFLOAD_PARAMS"]),
        ({**HSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "none", ["PARALLELISM_CONFIG_TP_SIZE = 2"]),
        ({**HSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"}, "none", ["2 machines", "dp_replicate_size: 2"]),
        (FSDP, "hybrid", ["performance.sharding = hybrid", "full"]),
        (HSDP, "full", ["performance.sharding = full", "hybrid"]),
    ],
)
def test_a_launch_of_another_sharding_is_refused(
    variables: dict[str, str], sharding: Sharding, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = Config(performance=PerformanceConfig(sharding=sharding))
    expect_error(words, lambda: with_sharding_of_launch(config))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="run.sh would set it up")
def test_run_sh_trains_one_process_without_a_launcher(texts: Path, tmp_path: Path) -> None:
    given = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{texts}/*.txt", "--run.max_updates", "2"]
    done = run(["bash", "run.sh", "benchmarks/plain.yaml", *TINY[2:], *given], TOPOLOGY="cpu")
    assert done.returncode == 0, done.stderr
    assert [line["world_size"] for line in read_ledger(tmp_path / "run")] == [1, 1]
    assert (tmp_path / "run/final/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu_8", "fsdp2_8", "hsdp_2x8", "multi_node"])
def test_launch_files_of_several_gpus_train_on_as_many_ranks(name: str, texts: Path, tmp_path: Path) -> None:
    """On a CPU, with two ranks for eight GPUs; the two machines are both this one."""
    file = launch_file_for_a_cpu(name, tmp_path)
    machines = 2 if "num_machines: 2" in file.read_text("utf-8") else 1
    given = [
        *TINY,
        "--run.directory",
        str(tmp_path / "run"),
        "--data.text_files",
        f"{texts}/*.txt",
        "--run.max_updates",
        "2",
    ]
    launch = [
        ACCELERATE,
        "launch",
        "--config_file",
        str(file),
        "--main_process_port",
        str(free_port()),
    ]
    processes = [start([*launch, "--machine_rank", str(number), SCRIPT, *given]) for number in range(machines)]
    codes, output, errors = end_of(processes)
    assert codes == [0] * machines, output + errors
    assert {line["world_size"] for line in read_ledger(tmp_path / "run")} == {2 * machines}
    parts = len(list((tmp_path / "run/checkpoints/step-000002/training").glob("optimizer*")))
    assert parts == {"gpu_8": 1, "fsdp2_8": 2, "hsdp_2x8": 2, "multi_node": 1}[name]


@pytest.mark.slow
def test_accelerates_own_configuration_changes_nothing_silently(texts: Path, tmp_path: Path) -> None:
    """dynamo, mixed precision and accumulation steps, as `accelerate launch` passes them on: the same losses, a line each."""
    configured = {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
    }
    losses = []
    for directory, variables in (("plain", {}), ("configured", configured)):
        given = ["--run.directory", str(tmp_path / directory), "--data.text_files", f"{texts}/*.txt"]
        done = train(*TINY, *given, "--run.max_updates", "2", "--evaluation.sample_tokens", "null", **variables)
        assert done.returncode == 0, done.stderr
        losses.append([entry["loss"] for entry in read_ledger(tmp_path / directory)])
        for name, value in variables.items():
            assert f"{name} = {value}, from accelerate's configuration, has no effect here" in done.stdout
    assert losses[0] == losses[1]


def test_what_agrees_with_accelerates_configuration_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert ignored_settings("bf16") == []
    assert len(ignored_settings("fp32")) == 1


def test_our_launcher_gives_the_last_checkpoint_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kills ranks 30 s after a signal, and ends itself at each of those that it handles."""
    configs: list[Any] = []
    monkeypatch.setattr(
        "torch.distributed.run.elastic_launch", lambda config, entrypoint: lambda *_: configs.append(config)
    )
    monkeypatch.setattr("recipe.commands.launch.listened_signals", lambda: [])
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["launch", "--quiet", "--config_file", FILES[1], SCRIPT])
    recipe.commands.launch.main()
    assert [(config.shutdown_timeout, config.signals_to_handle, config.nproc_per_node) for config in configs] == [
        (1800, "SIGQUIT", 2)
    ]


# ---- Signals -----------------------------------------------------------------------------------------------------------


def wait_for_updates(directory: Path, updates: int, process: subprocess.Popen[str]) -> None:
    """Until the ledger has so many lines."""
    while len(read_lines(directory / "ledger.jsonl")) < updates:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def ranks_under(process_id: int) -> list[psutil.Process]:
    """The training processes that descend from one, itself included."""
    family = [psutil.Process(process_id), *psutil.Process(process_id).children(recursive=True)]
    return [process for process in family if SCRIPT in process.cmdline() and "launch" not in process.cmdline()]


LAUNCHERS = {
    "recipe launch": [sys.executable, "-m", "recipe", "launch", "--quiet", "--config_file", FILES[1]],
    "accelerate, one rank": [ACCELERATE, "launch", "--quiet", "--config_file", FILES[0]],
    "accelerate, two ranks": [ACCELERATE, "launch", "--quiet", "--config_file", FILES[1]],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "target"),
    [
        ("recipe launch", signal.SIGTERM, "launcher"),
        ("recipe launch", signal.SIGUSR1, "launcher"),
        ("recipe launch", signal.SIGHUP, "launcher"),
        ("recipe launch", signal.SIGINT, "all"),
        ("recipe launch", signal.SIGTERM, "rank 1"),
        ("recipe launch", signal.SIGKILL, "launcher"),
        ("accelerate, one rank", signal.SIGTERM, "launcher"),
        ("accelerate, two ranks", signal.SIGUSR1, "launcher"),
    ],
)
def test_whoever_gets_the_signal_the_run_saves(
    launcher: str, number: signal.Signals, target: str, texts: Path, tmp_path: Path
) -> None:
    """And our launcher ends last, with 128 + the signal's number."""
    directory = tmp_path / "run"
    endless = ["--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt", "--run.max_updates", "99999"]
    endless += ["--schedule.total_tokens", "999999999", "--checkpoint.every_tokens", "null"]
    # Not into a pipe, which would be waited for until the last rank has closed it.
    with (tmp_path / "output").open("w") as output:
        process = start([*LAUNCHERS[launcher], SCRIPT, *TINY, *endless], fork=False, stdout=output, stderr=output)
    wait_for_updates(directory, 3, process)
    ranks = ranks_under(process.pid)
    assert len(ranks) == (1 if "one" in launcher else 2)
    targets = {"launcher": [process.pid], "rank 1": [ranks[-1].pid], "all": [process.pid, *(r.pid for r in ranks)]}[
        target
    ]
    for process_id in targets:
        os.kill(process_id, number)
    code = process.wait(timeout=60)
    if launcher == "recipe launch" and number != signal.SIGKILL:
        assert code == 128 + number
        assert [rank for rank in ranks if rank.is_running()] == []
    psutil.wait_procs(ranks, timeout=60)
    said = (tmp_path / "output").read_text()
    assert "the same command goes on from here" in said
    if launcher == "recipe launch":
        assert "Traceback" not in said
    (checkpoint,) = list_checkpoints(directory / "checkpoints")
    assert why_invalid(checkpoint) is None
    assert checkpoint.name == f"step-{read_ledger(directory)[-1]['update']:06d}"


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(texts: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    endless = ["--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt", "--run.max_updates", "99999"]
    command = [*LAUNCHERS["recipe launch"], SCRIPT, *TINY, *endless, "--schedule.total_tokens", "999999999"]
    process = start(command, fork=False)
    wait_for_updates(directory, 2, process)
    ranks_under(process.pid)[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search("error: rank 1 was ended by SIGKILL; the same command goes on from the last checkpoint", errors)
