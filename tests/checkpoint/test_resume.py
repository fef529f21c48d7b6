"""Stop a run any way you like, start it on other hardware, and get the same run."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipe.checkpoint.files import prune
from recipe.checkpoint.verify import why_invalid
from recipe.config.settings import Config, RunConfig
from recipe.run.directory import list_checkpoints
from recipe.run.stop import REPEAT_SECONDS
from tests.chaos import chaos
from tests.helpers import (
    FAULTY,
    ROOT,
    SCRIPT,
    assert_one_line,
    assert_same_run,
    end_of,
    read_events,
    read_ledger,
    run_ranks,
    start_ranks,
    start_training,
    train,
    wait_for,
    write_texts,
)
from tests.support.resuming import SMALL_DISK_BYTES, UPDATES, arguments, check_full_disk
from tests.support.runs import make_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and `whole`: the run that was never interrupted, on one rank, in a new Python."""
    root = tmp_path_factory.mktemp("resume")
    write_texts(root / "texts", count=16, largest=1200)
    done = train(*arguments(root / "whole"), fork=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
def test_a_run_of_the_fork_server_is_that_of_a_new_python_bit_for_bit(root: Path) -> None:
    done = train(*arguments(root / "forked"))
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", root / "forked")


@pytest.mark.slow
def test_three_resumes_give_the_uninterrupted_run_bit_for_bit(root: Path) -> None:
    """With dropout, in the middle of shuffle windows, into the third epoch."""
    state = json.loads((list_checkpoints(root / "whole/checkpoints")[0] / "training/state.json").read_text())
    assert max(lane["streams"][0]["epoch"] for lane in state["lane_states"]) >= 2
    assert any(lane["block"] for lane in state["lane_states"])
    for stop_after in (5, 10, 17, None):
        more = ["--run.max_updates", str(stop_after)] if stop_after else []
        done = train(*arguments(root / "resumed", *more))
        assert done.returncode == 0, done.stderr
    assert [event["update"] for event in read_events(root / "resumed", "resume")] == [5, 10, 17]
    assert_same_run(root / "whole", root / "resumed")


def test_a_run_moves_between_one_two_and_three_ranks(root: Path) -> None:
    """1 -> 2 -> 3 -> 1 ranks with other micro-batches, no dropout: the same blocks, losses within 1e-5."""
    plain = ["--model.dropout", "0"]
    done = train(*arguments(root / "one", *plain))
    assert done.returncode == 0, done.stderr
    for ranks, size, stop_after in ((1, 8, 6), (2, 5, 11), (3, 2, 17), (1, 3, UPDATES)):
        more = [*plain, "--batch.micro_batch_size", str(size), "--run.max_updates", str(stop_after)]
        run_ranks(ranks, [SCRIPT, *arguments(root / "moved", *more)])
    expected, found = read_ledger(root / "one"), read_ledger(root / "moved")
    assert [entry["world_size"] for entry in found] == [1] * 6 + [2] * 5 + [3] * 6 + [1] * 7
    assert [entry["blocks_sha256"] for entry in found] == [entry["blocks_sha256"] for entry in expected]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        *(pytest.param(n, 128 + n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(root: Path, number: int, code: int) -> None:
    directory = root / f"signal-{number}"
    endless = arguments(directory, "--checkpoint.every_tokens", "null", "--run.max_updates", "9999")
    process = start_training(*endless)
    wait_for(process, "update      6/")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on from here" in output
    assert "Traceback" not in errors
    (checkpoint,) = list_checkpoints(directory / "checkpoints")
    assert why_invalid(checkpoint) is None
    assert checkpoint.name == f"step-{len(read_ledger(directory)):06d}", "what was saved is the last whole update"
    done = train(*arguments(directory))
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", directory)


def test_kill_9_loses_nothing_but_time(root: Path) -> None:
    """Killed three times at different places, also while a checkpoint is written; the lock does not stay."""
    directory = root / "killed"
    for words in ("update     10/", "checkpoint ", "step-000020"):
        process = start_training(*arguments(directory))
        wait_for(process, words)
        process.kill()
        process.communicate()
    done = train(*arguments(directory))
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", directory)


@pytest.mark.slow
def test_a_second_process_on_the_same_directory_is_refused(root: Path) -> None:
    directory = root / "locked"
    process = start_training(*arguments(directory))
    wait_for(process, "update      2/")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        second = train(*arguments(directory))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert "another process is training" in second.stderr
    assert process.wait(timeout=120) == 0
    assert_same_run(root / "whole", directory)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_named(root: Path) -> None:
    """A flipped bit in the newest, a truncated file in the one before, a planted pickle, a stray file."""
    directory = root / "damaged"
    done = train(*arguments(directory, "--run.max_updates", "14"))
    assert done.returncode == 0, done.stderr
    newest, second, third = list_checkpoints(directory / "checkpoints")
    assert (newest.name, second.name, third.name) == ("step-000014", "step-000012", "step-000008")
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    os.truncate(second / "training/state.json", 100)
    trap = f"cos\nsystem\n(S'touch {directory}/executed'\ntR."
    for name in (".metadata", "training/.metadata", "pytorch_model.bin", "training/optimizer.pt"):
        (third / name).write_text(trap)
    (directory / "checkpoints/notes.txt").write_text("mine")
    (directory / "checkpoints/step-last").mkdir()
    done = train(*arguments(directory))
    assert done.returncode == 0, done.stderr
    assert "skipped step-000014: model.safetensors has changed since it was written" in done.stdout
    assert "skipped step-000012: training/state.json has 100 bytes instead of" in done.stdout
    assert "going on from" in done.stdout
    assert not (directory / "executed").exists()
    (event,) = read_events(directory, "resume")
    assert [name for name, _ in event["skipped"]] == ["step-000014", "step-000012"]
    assert_same_run(root / "whole", directory)


def test_another_run_in_the_directory_is_refused_with_the_difference(root: Path) -> None:
    done = train(*arguments(root / "whole", "--run.seed", "7", "--optimizer.learning_rate", "1e-4"))
    words = ["run.seed was 1234 and is 7", "optimizer.learning_rate was 0.005 and is 0.0001", "--resume fresh"]
    assert_one_line(done, words)
    assert "batch.lanes" not in done.stderr


@pytest.mark.slow
def test_changed_text_is_refused(root: Path) -> None:
    directory = root / "changed" / "run"
    write_texts(root / "changed/texts", count=16, largest=1200)
    done = train(*arguments(directory, "--run.max_updates", "6"))
    assert done.returncode == 0, done.stderr
    for path in (root / "changed/texts").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("e", "E"), encoding="utf-8")
    done = train(*arguments(directory, "--data.tokenizer", str(next((root / "changed/cache").glob("tokenizer-*")))))
    assert done.returncode == 2
    assert "data.tokenizer was None" in done.stderr
    assert_one_line(train(*arguments(directory)), ["000.txt has other text, of the same size", "--resume fresh"])
    forget_the_text(list_checkpoints(directory / "checkpoints")[0])
    done = train(*arguments(directory))
    assert done.returncode == 2
    assert "the text of update 6 is not what it was" in done.stderr


def forget_the_text(checkpoint: Path) -> None:
    """As an older checkpoint has none."""
    state, manifest = (checkpoint / name for name in ("training/state.json", "manifest.json"))
    values, contents = json.loads(state.read_text()), json.loads(manifest.read_text())
    del values["text"]
    state.write_text(json.dumps(values))
    data = state.read_bytes()
    contents["files"]["training/state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(contents))


def test_a_model_that_computes_another_function_is_refused(root: Path) -> None:
    """The weights are right, but attention sees the future: as after an update of a library that broke something."""
    directory = root / "another-function"
    done = train(*arguments(directory, "--run.max_updates", "2"))
    assert done.returncode == 0, done.stderr
    done = train("attention_sees_the_future", *arguments(directory), script=[FAULTY])
    assert done.returncode == 2
    assert "does not compute the same function" in done.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_only_the_checkpoints(root: Path) -> None:
    """No file may grow beyond a limit, until the first checkpoint has failed: training does not notice."""
    directory = root / "full"
    process = start_training(*arguments(directory))
    wait_for(process, "update      1/")
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, resource.RLIM_INFINITY))
    wait_for(process, "checkpoint after update 4 failed")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "step-000024" in output
    events = read_events(directory, "checkpoint_failed")
    assert events[0]["update"] == 4
    assert "File too large" in events[0]["reason"]
    assert not [path for path in (directory / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    assert_same_run(root / "whole", directory)


@pytest.mark.slow
def test_a_disk_that_stays_full_is_one_line_at_the_end_and_keeps_the_good_checkpoint(root: Path) -> None:
    directory = root / "stays-full"
    check_full_disk(directory)
    done = train(*arguments(directory))
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", directory)


def test_the_model_is_written_though_the_last_checkpoint_cannot_be(root: Path) -> None:
    """A disk with room for the weights, but not for the optimizer's state."""
    directory, sizes = (
        root / "no-optimizer",
        [p.stat().st_size for p in (root / "whole/checkpoints").rglob("*.safetensors")],
    )
    limit = (min(sizes) + max(sizes)) // 2
    process = start_training(*arguments(directory))
    wait_for(process, "step-000004")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert f"the last checkpoint could not be written to {directory}/checkpoints: " in line
    assert "File too large" in line
    assert "the same command goes on from the checkpoint before it" in line
    model = "final/model.safetensors"
    assert (directory / model).read_bytes() == (root / "whole" / model).read_bytes()
    assert list_checkpoints(directory / "checkpoints")[0].name == "step-000004"


@pytest.mark.slow
def test_a_file_system_that_can_do_less_is_named_once_and_trained_on(root: Path) -> None:
    directory = root / "poor"
    done = train("poor_file_system", *arguments(directory), script=[FAULTY], FAULTY_DIRECTORY=str(directory))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(f"the file system of {directory} has no ")]
    assert [line.partition(" has no ")[2].partition(":")[0] for line in said] == [
        *("locks", "fsync", "chmod", "rename of directories"),
    ]
    assert done.stdout.count("the file system") == 4
    assert_same_run(root / "whole", directory)
    assert all(why_invalid(path) is None for path in list_checkpoints(directory / "checkpoints"))
    assert not list(directory.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_non_finite_update_is_skipped_on_all_ranks(root: Path) -> None:
    """One rank's gradient becomes infinite in updates 3 and 4: no rank steps, and the run goes on; five in a row end it."""
    directory = root / "skipped"
    faulty, every_update = [FAULTY, "infinite_gradient_on_rank_1"], ["--checkpoint.every_tokens", "1536"]
    shorter = arguments(directory, "--run.max_updates", "8", *every_update)
    run_ranks(2, [*faulty, *shorter], FAULTY_UPDATES="3,4")
    assert [event["update"] for event in read_events(directory, "skipped_update")] == [3, 4]
    assert [entry["update"] for entry in read_ledger(directory)] == [1, 2, 5, 6, 7, 8]

    directory = root / "diverged"
    more = ["--run.max_updates", "12", *every_update, "--checkpoint.keep", "9"]
    done = train(*arguments(directory, *more), script=faulty, FAULTY_UPDATES="3,4,5,6,7")
    assert done.returncode == 3
    assert "updates 3 to 7 were not finite" in done.stderr
    assert "--optimizer.learning_rate" in done.stderr
    checkpoints = {path.name: path for path in list_checkpoints(directory / "checkpoints")}
    before = load_file(checkpoints["step-000002"] / "model.safetensors")
    after = load_file(checkpoints["step-000006"] / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number", "done"), [(2, 2, 4), (1, 1, 0), (1, 3, 4), (1, 5, 6), (1, 6, 6)])
def test_a_signal_in_an_evaluation_leaves_the_record_of_a_run_that_was_not_stopped(
    root: Path, ranks: int, number: int, done: int
) -> None:
    """To the last rank, in the evaluation before training, in the next or the last one, or in the first of their samples. The
    update that it is of is written down and saved without it, and the next start does what is missing."""
    evaluated = [
        *[
            "--evaluation.sets.mine",
            f"{root}/texts/000.txt",
            "--evaluation.every_tokens",
            "6144",
            "--model.dropout",
            "0",
        ],
        *["--run.max_updates", "6", "--batch.micro_batch_size", "4", "--checkpoint.every_tokens", "null"],
        *["--run.parity_check", "true", "--evaluation.prompts", "import", "def"],
    ]
    whole, directory = root / f"evaluated-{ranks}", root / f"signal-in-evaluation-{number}"
    if not whole.exists():
        run_ranks(ranks, [SCRIPT, *arguments(whole, *evaluated)])
    faulty = [FAULTY, "signal_in_an_evaluation", *arguments(directory, *evaluated)]
    codes, output, _ = end_of(start_ranks(ranks, faulty, FAULTY_EVALUATION=str(number)))
    assert codes == [143] * ranks, output
    assert "the same command goes on from here" in output
    column = "validation/mine/loss"
    if done:
        assert [entry["update"] for entry in read_ledger(directory)] == list(range(1, done + 1))
        assert (read_ledger(directory)[-1][column] is None) == (number in (2, 5))
        assert [path.name for path in list_checkpoints(directory / "checkpoints")] == [f"step-{done:06d}"]
    else:
        assert not (directory / "ledger.jsonl").exists()
    run_ranks(ranks, [SCRIPT, *arguments(directory, *evaluated)])
    assert_same_run(whole, directory)
    samples, expected = (
        [[e["update"], e["prompt"], e["text"]] for e in read_events(d, "sample")] for d in (directory, whole)
    )
    assert samples == expected
    assert [sample[:2] for sample in samples] == [[update, prompt] for update in (4, 6) for prompt in ("import", "def")]
    assert [entry["update"] for entry in read_ledger(whole) if entry[column] is not None] == [4, 6]
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["parity_check"]["differences"]
    assert summary["validation"]["mine"]["before"]["loss"] > summary["validation"]["mine"]["after"]["loss"]


def test_a_run_that_has_done_more_than_is_planned_trains_nothing_and_says_so(root: Path) -> None:
    """As if it had been stopped after its last update, before final/ was written."""
    directory = root / "more-than-planned"
    shutil.copytree(root / "whole", directory, ignore=shutil.ignore_patterns("final", "summary.json"))
    files = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    done = train(*arguments(directory, "--run.max_updates", "3"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "this run has done 24 updates, and 3 are planned: nothing is trained; --run.max_updates 24" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == files
    done = train(*arguments(directory, "--run.max_updates", "24"))  # as it says
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", directory)


def test_no_token_is_written_anywhere(root: Path) -> None:
    secret = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
    directory = root / "secret"
    more = ["--run.max_updates", "4", "--log.trackers", "tensorboard"]
    done = train(*arguments(directory, *more), HF_TOKEN=secret)
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_pruning_keeps_the_newest_and_the_marked(tmp_path: Path) -> None:
    for update in (10, 20, 25, 30, 40, 50):
        (tmp_path / f"step-{update:06d}").mkdir()
    (tmp_path / "step-000060.bak").mkdir()
    removed = prune(tmp_path, keep=2, keep_every_tokens=2000, tokens_after=lambda update: 100 * update)
    assert sorted(path.name for path in removed) == ["step-000010", "step-000025", "step-000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000020",
        "step-000040",
        "step-000050",
        "step-000060.bak",
    ]


def test_ledger_and_events_are_truncated_to_whole_lines(tmp_path: Path) -> None:
    ledger, events = tmp_path / "ledger.jsonl", tmp_path / "events.jsonl"
    ledger.write_bytes(b'{"update": 0}\n{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upda')
    events.write_bytes(b'{"event": "start", "update": 0}\n{"event": "sample", "update": 3}\n')
    run = make_run(Config(run=RunConfig(directory=str(tmp_path))))
    run.ledger.truncate(2)
    assert ledger.read_bytes() == b'{"update": 0}\n{"update": 1}\n{"update": 2}\n'
    assert events.read_bytes() == b'{"event": "start", "update": 0}\n'
    ledger.unlink()
    run.ledger.truncate(2)
    assert not ledger.exists()


def test_a_second_signal_leaves_at_once(root: Path) -> None:
    """The process is held in between, as in a long micro-batch. A launcher's repeat, within a second, is not a second one."""
    process = start_training(*arguments(root / "twice", "--run.max_updates", "9999"))
    wait_for(process, "update      2/")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(REPEAT_SECONDS + 0.1)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "goes on from here" not in output


@pytest.mark.slow
def test_chaos_in_short(tmp_path: Path) -> None:
    """Some interruptions of a two-rank run; `python -m tests.chaos --runs 30` is the long one."""
    hows = [
        "SIGKILL to all",
        "SIGTERM to all, nobody reads",
        "SIGKILL to all, tracker's disk full",
        "SIGTERM to run.sh",
    ]
    if not (ROOT / ".venv").exists():
        hows.pop()  # run.sh would make it
    happened = chaos(4, 5, tmp_path, tmp_path / "elsewhere", hows)
    assert sum(count for what, count in happened.items() if what.startswith("SIG")) == 4
