"""Pushes beside a training: the Hub gets every result, and whatever the Hub does, the training does not notice.

Two trainings of two ranks, one on a Hub that hangs until they are done, and one that goes on from it elsewhere while that Hub
fails. What needs no training pushes the first one's checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import recipe.hub.background as background
from recipe.checkpoint.files import list_checkpoints
from recipe.checkpoint.resume import find_resume_point
from recipe.commands import push as push_command
from recipe.config.command_line import load_config, read_config
from recipe.errors import RecipeError
from recipe.hub.background import Pusher
from recipe.plan.phases import Phase
from recipe.plan.run_plan import make_plan
from recipe.run.console import Console
from recipe.run.ledger import EVENTS, Ledger, read_lines
from recipe.run.run import Run
from recipe.run.stop import STOP_SIGNALS, StopRequest
from tests.helpers import (
    FAULTY,
    ROOT,
    SCRIPT,
    TINY,
    environment,
    fork_server,
    read_ledger,
    start_ranks,
    train,
    write_texts,
)
from tests.support.fork_server import ForkServer
from tests.support.hub_server import TOKEN, Fault, HubServer

UPDATES = 12
CARD = {"README.md", "curves.png"}
NAMES = ("step-000004", "step-000012")


def arguments(directory: Path, *more: str) -> list[str]:
    """12 updates with a checkpoint after every 4; texts are those of all runs here."""
    return [
        *TINY,
        *["--run.directory", str(directory), "--run.max_updates", str(UPDATES), "--evaluation.sample_tokens", "null"],
        *["--data.text_files", f"{directory.parent}/texts/*.txt", "--checkpoint.every_tokens", str(4 * 1536)],
        *["--data.cache_directory", "null", "--hub.repo_id", "user/model", *more],
    ]


def content_of(directory: Path) -> dict[str, bytes]:
    """Path -> bytes of every file in a local directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def events_of(directory: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(directory / EVENTS) if line.get("event") == event]


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_texts(root / "texts", count=16, largest=1200)
    return root


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """The Hub of the two trainings."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def on_hub(root: Path, hub: HubServer) -> ForkServer:
    """Forks runs that take it for the Hub, which libraries read where that is when they are imported."""
    return fork_server(**hub.environment(HF_HOME=str(root / "home")))


@pytest.fixture(scope="module")
def pushed(root: Path, hub: HubServer, on_hub: ForkServer) -> SimpleNamespace:
    """The first training, in root/first: its first push hangs until the last update is done.

    Then its links, what the ranks print, and the checkpoints that pruning has left are looked at.
    """
    directory = root / "first"
    hub.faults = [Fault("POST .*/commit/", None)]
    command = arguments(directory, "--hub.training_state", "true", "--checkpoint.keep", "1")
    processes = start_ranks(2, [SCRIPT, *command], fork=on_hub, **hub.environment(HF_HOME=str(root / "home")))
    try:
        final = directory / "final"
        wait_until(lambda: processes[1].poll() is not None)
        wait_until(lambda: [content_of(links) for links in directory.glob(".pushing/*/final")] == [content_of(final)])
        seen = SimpleNamespace(
            rank_0=processes[0].poll(),
            updates=[entry["update"] for entry in read_ledger(directory)],
            pushes=events_of(directory, "push"),
            checkpoints=[path.name for path in list_checkpoints(directory / "checkpoints")],
            links={path.name: content_of(path) for path in directory.glob(".pushing/*/*")},
        )
        hub.faults = []
        hub.is_released.set()
        seen.outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], seen.outputs
    return seen


@pytest.fixture(scope="module")
def resumed(root: Path, hub: HubServer, on_hub: ForkServer, pushed: SimpleNamespace) -> SimpleNamespace:
    """The second training, in root/second: on an empty machine it goes on from the first one's first checkpoint on the Hub,
    which does not answer when it is checked, and then fails for ever."""
    hub.faults, hub.is_released = [Fault("/repos/create", None, 1), Fault("/user/second/", 500)], threading.Event()
    shutil.rmtree(root / "home", ignore_errors=True)
    command = arguments(root / "second", "--hub.repo_id", "user/second", "--hub.wait_seconds", "4")
    command += ["--resume", f"hf://user/model@{NAMES[0]}"]
    script = [FAULTY, "impatient_with_the_hub"]
    processes = start_ranks(2, [*script, *command], fork=on_hub, **hub.environment(HF_HOME=str(root / "home")))
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    return SimpleNamespace(outputs=outputs, codes=[process.returncode for process in processes])


def test_a_hanging_hub_does_not_hold_up_training(root: Path, hub: HubServer, pushed: SimpleNamespace) -> None:
    """Its checkpoint is pruned meanwhile, and pushed all the same; of those that waited the newest is pushed."""
    assert pushed.updates == list(range(1, UPDATES + 1))
    assert pushed.rank_0 is None, "rank 0 waits for the Hub, and no other rank for it"
    assert pushed.pushes == []
    assert pushed.checkpoints == [NAMES[1]]
    assert set(pushed.links) == {*NAMES, "final"}
    assert [line["revision"] for line in events_of(root / "first", "push")] == [*NAMES, "main"]
    (failed,) = events_of(root / "first", "push_failed")
    assert (failed["update"], failed["revision"]) == (8, "step-000008")
    assert failed["reason"] == "step-000012 took its place in the queue"
    assert not (root / "first/.pushing").exists()
    asked = [request for request in hub.requests if request == "POST /api/repos/create"]
    assert len(asked) >= 4, "once before the run and once for each push"
    assert "pushed" not in pushed.outputs[1], "rank 0 alone pushes"


def test_each_checkpoint_is_a_revision_and_main_is_the_finished_model(
    root: Path, hub: HubServer, pushed: SimpleNamespace
) -> None:
    repository = hub.repositories["user/model"]
    assert repository.private
    assert repository.messages == ["initial commit", *[f"Push {name}" for name in (*NAMES, "final")]]
    assert set(repository.tags) == set(NAMES)
    local = {**pushed.links, NAMES[1]: content_of(root / "first/checkpoints" / NAMES[1])}
    for name, revision in ((NAMES[0], NAMES[0]), (NAMES[1], NAMES[1]), ("final", "main")):
        files = hub.pushed(revision)
        assert files.keys() - local[name].keys() == CARD | ({"config.yaml"} - local[name].keys())
        assert {path: files[path] for path in local[name]} == local[name]
        assert f"pushed {name} to user/model@{revision}" in pushed.outputs[0]
    assert "training/state.json" in local[NAMES[0]]
    assert not any(path.startswith("training/") for path in hub.pushed("main")), "no training state is left over"
    commits = {**repository.tags, **repository.branches}
    told = [(line["update"], line["revision"], line["commit"]) for line in events_of(root / "first", "push")]
    assert told == [(n, r, commits[r]) for n, r in [(4, NAMES[0]), (12, NAMES[1]), (12, "main")]]


def test_each_revision_has_the_card_of_its_own_update(hub: HubServer, pushed: SimpleNamespace) -> None:
    for revision, words in ((NAMES[0], "after 4 of 12 updates"), (NAMES[1], "18,432 of 61,440 tokens")):
        files = hub.pushed(revision)
        assert words in files["README.md"].decode()
        assert 'name = "user/model"' in files["README.md"].decode()
        assert files["curves.png"].startswith(b"\x89PNG")
    assert "is not finished" not in hub.pushed("main")["README.md"].decode()


def test_the_settings_beside_a_pushed_model_are_those_of_the_run(
    root: Path, hub: HubServer, pushed: SimpleNamespace, tmp_path: Path
) -> None:
    """All but where it is written and who hears of it."""
    ours, default = read_config(root / "first/config.yaml"), load_config([])
    for revision in (*NAMES, "main"):
        (tmp_path / "config.yaml").write_bytes(hub.pushed(revision)["config.yaml"])
        theirs = read_config(tmp_path / "config.yaml")
        assert theirs == replace(
            ours,
            run=replace(ours.run, directory=default.run.directory),
            data=replace(ours.data, cache_directory=default.data.cache_directory),
            **{name: getattr(default, name) for name in ("resume", "log", "hub")},
        )


def test_the_pushed_model_loads_with_from_pretrained(
    root: Path, hub: HubServer, pushed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    hub.lead(monkeypatch, tmp_path)
    for revision, local in (("main", "final"), (NAMES[1], f"checkpoints/{NAMES[1]}")):
        model = GPT2LMHeadModel.from_pretrained("user/model", revision=revision, cache_dir=tmp_path)
        expected = GPT2LMHeadModel.from_pretrained(root / "first" / local).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained("user/model", cache_dir=tmp_path)
    assert (len(tokenizer), tokenizer.eos_token) == (384, "<|endoftext|>")


def test_an_empty_machine_goes_on_from_the_hub_bit_for_bit(root: Path, resumed: SimpleNamespace) -> None:
    """No checkpoint, no tokenizer and no cache of the library; the ledger from there on is that of the first run."""
    assert resumed.codes == [0, 0], resumed.outputs
    first, second = read_ledger(root / "first"), read_ledger(root / "second")
    assert len(second) == UPDATES - 4
    for name in ("update", "loss", "grad_norm", "blocks_sha256"):
        assert [entry[name] for entry in second] == [entry[name] for entry in first[4:]]
    assert content_of(root / "second/final") == content_of(root / "first/final")


@pytest.mark.slow
def test_a_run_outlives_a_hub_that_takes_nothing_and_is_pushed_later(
    root: Path,
    hub: HubServer,
    resumed: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, output = root / "second", resumed.outputs[0]
    assert resumed.codes == [0, 0], resumed.outputs
    assert "user/second could not be checked: ReadTimeout" in output
    failed = events_of(directory, "push_failed")
    assert [line["revision"] for line in failed][-2:] == [NAMES[1], "main"]
    for line in failed:
        assert line["reason"].startswith("not done 4 s after the end of training (")
        assert f"was not pushed to user/second: {line['reason']}; `python -m recipe push {directory}`" in output
    assert TOKEN not in output + json.dumps(failed), "the server's answers spell it out"
    assert "Traceback" not in output
    assert not (directory / ".pushing").exists()

    hub.faults = []
    hub.lead(monkeypatch, root / "home")
    monkeypatch.setattr(sys, "argv", ["push", str(directory)])
    push_command.main()
    assert capsys.readouterr().out.count("pushed ") == 3
    assert set(hub.repositories["user/second"].tags) == {"step-000008", "step-000012"}
    assert hub.pushed("main", "user/second").items() >= content_of(directory / "final").items()

    monkeypatch.setattr(sys, "argv", ["push", str(root / "first")])
    push_command.main()
    assert capsys.readouterr().out.count("pushed ") == 1, "of what the run has pushed itself only main again"


def test_what_cannot_be_resumed_from_the_hub_is_one_line_that_says_why(
    root: Path, hub: HubServer, pushed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.lead(monkeypatch, tmp_path / "home")
    mixed = {"model.safetensors": hub.pushed(NAMES[1])["model.safetensors"]}
    hub.repositories["user/model"].commit("mixed", "", hub.pushed(NAMES[0]) | mixed)
    for reference, words in (
        ("user/model@mixed", ["model.safetensors has changed since it was written"]),
        ("user/model", ["without training state; take a revision that was pushed with --hub.training_state true"]),
        ("user/model@none", ["HTTP 404", "Invalid rev id: none"]),
        ("user/none", ["HTTP 404"]),
        ("", ["resume = 'hf://'"]),
    ):
        with pytest.raises(RecipeError) as caught:
            find_resume_point(load_config([*arguments(root / "new"), "--resume", f"hf://{reference}"]))
        assert all(word in str(caught.value) for word in words), caught.value


def test_the_token_is_in_no_file_and_no_output(root: Path, hub: HubServer, resumed: SimpleNamespace) -> None:
    """Every request carried it: the server refuses others. The storage, which is another host, was not sent it either."""
    assert TOKEN not in "".join(resumed.outputs)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 40
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    for repository in hub.repositories.values():
        for files_of_commit in repository.commits.values():
            assert TOKEN.encode() not in b"".join(files_of_commit.values())


def test_a_refused_token_is_one_line_before_anything_is_trained(
    root: Path, hub: HubServer, on_hub: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = []
    monkeypatch.setattr(hub, "token", "another")
    done = train(*arguments(root / "refused"), fork=on_hub, **hub.environment(HF_HOME=str(root / "home")))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hub.repo_id = 'user/model' cannot be pushed to: HTTP 401")
    assert "hf auth login" in line
    assert not (root / "refused/ledger.jsonl").exists()


@pytest.fixture
def run(root: Path, pushed: SimpleNamespace, online: HubServer, tmp_path: Path) -> Iterator[Run]:
    """A run whose directory is a copy of the first training's, before its events, for a Hub that hangs."""
    online.faults = [Fault(".", None)]
    shutil.copytree(root / "first", tmp_path / "run")
    config = load_config(["--config", str(tmp_path / "run/config.yaml"), "--run.directory", str(tmp_path / "run")])
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    accelerator = SimpleNamespace(is_main_process=True, process_index=0)
    ledger = Ledger(config, accelerator, print)
    stop = StopRequest()
    stop.listen()
    yield Run(config, make_plan(config, 1), accelerator, "fp32", stop, Console(True, UPDATES), ledger)
    ledger.close()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def failures_of(run: Run) -> list[tuple[str, str]]:
    """(revision, reason) of this run's failed pushes, without that of the run it is a copy of."""
    return [(line["revision"], line["reason"]) for line in events_of(run.directory, "push_failed")][1:]


def test_a_push_is_given_up_when_it_takes_too_long_and_at_a_signal(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is ended while training goes on, the second when a signal comes in the wait at the end."""
    monkeypatch.setattr(background, "LONGEST_PUSH_SECONDS", 0.2)
    pusher, checkpoint = Pusher(run), run.directory / "checkpoints" / NAMES[1]
    children = psutil.Process().children()
    pusher.push(12, checkpoint)

    def is_reported() -> bool:
        pusher.poll()
        return bool(failures_of(run))

    wait_until(is_reported, seconds=20)
    monkeypatch.setattr(background, "LONGEST_PUSH_SECONDS", 60)
    pusher.push(12, run.directory / "final")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    pusher.finish()
    assert failures_of(run) == [
        (NAMES[1], "not done after 0.2 s (no answer)"),
        ("main", "not done when signal 15 ended the wait (no answer)"),
    ]
    assert not (run.directory / ".pushing").exists()
    assert "waiting for the push to user/model, 600 s at most" in capsys.readouterr().out
    assert psutil.Process().children() == children


@pytest.mark.slow
def test_a_refused_push_says_why_without_secrets(
    run: Run, online: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    online.faults = [Fault("/commit/", 403)]
    pusher = Pusher(run)
    pusher.push(12, run.directory / "checkpoints" / NAMES[1])
    pusher.finish()
    ((revision, reason),) = failures_of(run)
    assert revision == NAMES[1]
    assert reason.startswith(
        "HTTP 403 to POST /api/models/user/model/commit/main: planted, for Bearer hf_...; log in with"
    )
    output = capsys.readouterr().out
    assert f"{NAMES[1]} was not pushed to user/model: {reason}; `python -m recipe push" in output
    assert TOKEN not in output


def test_checkpoints_are_pushed_when_enough_tokens_have_passed(run: Run, tmp_path: Path) -> None:
    """Every 5 updates of one that goes on after 6: none at 8, the next at 12; then 14 and 16 wait for it."""
    settings = replace(run.config.hub, every_tokens=5 * 1536, wait_seconds=0)
    run.config = replace(run.config, hub=settings)
    pusher = Pusher(run, done=6)

    def links() -> set[str]:
        return {path.name for path in run.directory.glob(".pushing/*/*")}

    for update, expected in ((8, set()), (12, {12}), (14, {12}), (16, {12, 16}), (20, {12, 20}), (22, {12, 20})):
        directory = tmp_path / f"step-{update:06d}"
        directory.mkdir()
        (directory / "model.safetensors").touch()
        pusher.push(update, directory)
        assert links() == {f"step-{number:06d}" for number in expected}
    pusher.finish()
    assert [revision for revision, _ in failures_of(run)] == ["step-000016", "step-000012", "step-000020"]


def test_tokens_between_pushes_are_those_of_the_budget_of_each_update(run: Run, tmp_path: Path) -> None:
    """Eight updates of 1,536, then one of 3,072: that reaches the second 7,680."""
    run.config = replace(run.config, hub=replace(run.config.hub, every_tokens=5 * 1536, wait_seconds=0))
    first = run.plan.update
    larger = replace(first, tokens_per_update=2 * first.tokens_per_update)
    run.plan = replace(run.plan, phases=(Phase(1, 0, first), Phase(9, 8 * 1536, larger)))
    pusher = Pusher(run, done=8)
    (tmp_path / "step-000009").mkdir()
    pusher.push(9, tmp_path / "step-000009")
    pusher.finish()
    assert [revision for revision, _ in failures_of(run)] == ["step-000009"]


@pytest.mark.parametrize("can_link", [True, False])
def test_what_is_pushed_outlives_its_checkpoint(
    can_link: bool, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a hard link, or as a copy on a file system that has none; and a disk that is full is reported."""
    run.config = replace(run.config, hub=replace(run.config.hub, wait_seconds=0))
    directory = tmp_path / "step-000013"
    (directory / "training").mkdir(parents=True)
    (directory / "training/state.json").write_text("{}", encoding="utf-8")
    if not can_link:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    pusher = Pusher(run)
    pusher.push(13, directory)
    (links,) = run.directory.glob(".pushing/*/*")
    assert (links / "training/state.json").read_text(encoding="utf-8") == "{}"
    assert (links / "training/state.json").stat().st_nlink == (2 if can_link else 1)
    pusher.push(14, directory.with_name("step-000014"))
    pusher.finish()
    (gone, reason), (_, given_up) = failures_of(run)
    assert gone == "step-000014"
    assert reason.startswith("FileNotFoundError")
    assert given_up == "not done 0 s after the end of training (no answer)"


def test_other_ranks_push_nothing_and_what_a_killed_run_left_is_removed(run: Run) -> None:
    (run.directory / ".pushing/1/final").mkdir(parents=True)
    run.accelerator.is_main_process = False
    pusher = Pusher(run)
    pusher.push(12, run.directory / "final")
    pusher.finish()
    assert (run.directory / ".pushing/1/final").is_dir(), "which is not theirs to remove"
    run.accelerator.is_main_process = True
    Pusher(run)
    assert not (run.directory / ".pushing").exists()


@pytest.mark.slow
def test_no_push_outlives_its_run(run: Run, online: HubServer) -> None:
    """However that ends: here by kill -9, while the Hub hangs. Ctrl-C at a terminal does not reach it."""
    script = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from recipe.config.command_line import read_config
from recipe.hub.background import Pusher
from recipe.run.run import Run
directory = Path(sys.argv[1])
config = read_config(directory / "config.yaml")
pusher = Pusher(Run(config, None, SimpleNamespace(is_main_process=True), "fp32", None, None, None))
pusher.push(12, directory / "checkpoints/{NAMES[1]}")
print(pusher._child.pid, flush=True)
input()
"""
    config = (run.directory / "config.yaml").read_text(encoding="utf-8")
    (run.directory / "config.yaml").write_text(
        config.replace(
            f"directory: {read_config(run.directory / 'config.yaml').run.directory}", f"directory: {run.directory}"
        ),
        encoding="utf-8",
    )
    training = subprocess.Popen(
        [sys.executable, "-c", script, str(run.directory)],
        cwd=ROOT,
        env=environment(**online.environment(HF_HOME=os.environ["HF_HOME"])),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    push = psutil.Process(int(training.stdout.readline()))
    wait_until(lambda: bool(online.requests))
    assert os.getsid(push.pid) == push.pid != os.getsid(training.pid)
    assert list(run.directory.glob(".pushing/*/*"))
    training.kill()
    training.communicate()
    wait_until(lambda: not push.is_running() or push.status() == psutil.STATUS_ZOMBIE, seconds=20)
    assert not (run.directory / ".pushing").exists()
