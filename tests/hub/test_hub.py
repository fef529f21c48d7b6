"""The real huggingface_hub client against a real server: pushed in the background, brought back, and never in the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from recipe.checkpoint.files import list_checkpoints
from tests.config.test_errors import assert_one_line
from tests.helpers import ROOT, TINY, read_ledger, read_ledger_lines, start_ranks, train, write_texts
from tests.support.hub_server import TOKEN, Fault, HubServer, Repository

UPDATES = 12


def arguments(directory: Path, every: int, *more: str) -> list[str]:
    """12 updates with a checkpoint after `every`; texts and tokenizer are those of all runs here."""
    return [
        *TINY,
        *["--run.directory", str(directory), "--run.max_updates", str(UPDATES), "--evaluation.sample_tokens", "null"],
        *["--data.text_files", f"{directory.parent}/texts/*.txt", "--checkpoint.every_tokens", str(every * 1536)],
        *["--data.cache_directory", str(directory.parent / "cache"), "--hub.repo_id", "user/model", *more],
    ]


def content_of(directory: Path) -> dict[str, bytes]:
    """Path -> bytes of every file in a local directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def pushed_to(hub: HubServer, revision: str) -> dict[str, bytes]:
    """Path -> bytes of every file of a revision on the Hub, without its card and the file that the Hub makes itself."""
    others = (".gitattributes", "README.md", "curves.png", "config.yaml")
    return {p: c for p, c in hub.repositories["user/model"].files(revision).items() if p not in others}


def events_of(directory: Path, event: str) -> list[dict[str, object]]:
    return [line for line in read_ledger_lines(directory) if line.get("event") == event]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_texts(root / "texts", count=16, largest=1200)
    return root


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(root: Path) -> Iterator[tuple[HubServer, subprocess.CompletedProcess[str]]]:
    """A run in root/pushed with two checkpoints, pushed with their training state."""
    with HubServer() as server:
        command = arguments(root / "pushed", 6, "--hub.training_state", "true")
        done = train(*command, **server.environment(HF_HOME=str(root / "home")))
        assert done.returncode == 0, done.stderr
        yield server, done


def test_each_checkpoint_is_a_revision_and_main_is_the_finished_model(
    root: Path, pushed: tuple[HubServer, subprocess.CompletedProcess[str]]
) -> None:
    hub, done = pushed
    repository = hub.repositories["user/model"]
    assert repository.private
    assert repository.messages == ["initial commit", "Push step-000006", "Push step-000012", "Push final"]
    assert set(repository.tags) == {"step-000006", "step-000012"}
    for name in repository.tags:
        assert pushed_to(hub, name) == content_of(root / "pushed/checkpoints" / name)
        assert f"pushed {name} to user/model@{name}" in done.stdout
    assert pushed_to(hub, "main") == content_of(root / "pushed/final"), "no training state is left over"
    told = [(line["update"], line["revision"], line["commit"]) for line in events_of(root / "pushed", "push")]
    commits = {**repository.tags, **repository.branches}
    assert told == [(n, r, commits[r]) for n, r in [(6, "step-000006"), (12, "step-000012"), (12, "main")]]


def test_each_revision_has_the_card_of_its_own_update(
    pushed: tuple[HubServer, subprocess.CompletedProcess[str]],
) -> None:
    hub, _ = pushed
    for revision, words in (("step-000006", "after 6 of 12 updates"), ("step-000012", "18,432 of 61,440 tokens")):
        files = hub.repositories["user/model"].files(revision)
        assert words in files["README.md"].decode()
        assert 'name = "user/model"' in files["README.md"].decode()
        assert files["curves.png"].startswith(b"\x89PNG")
    assert "is not finished" not in hub.repositories["user/model"].files("main")["README.md"].decode()


def test_the_pushed_model_loads_with_from_pretrained(
    root: Path, pushed: tuple[HubServer, subprocess.CompletedProcess[str]]
) -> None:
    script = """
import sys, torch
from transformers import AutoTokenizer, GPT2LMHeadModel
for revision, local in (("main", "final"), ("step-000006", "checkpoints/step-000006")):
    model = GPT2LMHeadModel.from_pretrained("user/model", revision=revision)
    expected = GPT2LMHeadModel.from_pretrained(f"{sys.argv[1]}/{local}").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
tokenizer = AutoTokenizer.from_pretrained("user/model")
print(len(tokenizer), tokenizer.eos_token)
"""
    hub, _ = pushed
    done = train(str(root / "pushed"), script=("-c", script), **hub.environment(HF_HOME=str(root / "other-home")))
    assert done.stdout.strip() == "384 <|endoftext|>", done.stderr


def test_an_empty_machine_goes_on_from_the_hub_bit_for_bit(
    root: Path, pushed: tuple[HubServer, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """No checkpoint, no tokenizer and no cache of the library; the ledger from there on is that of the first run."""
    hub, _ = pushed
    variables = hub.environment(HF_HOME=str(tmp_path / "home"))
    command = arguments(tmp_path / "run", 6, "--hub.repo_id", "null", "--data.cache_directory", "null")
    command += ["--data.text_files", f"{root}/texts/*.txt"]
    done = train(*command, "--resume", "hf://user/model@step-000006", **variables)
    assert done.returncode == 0, done.stderr
    first, second = read_ledger(root / "pushed"), read_ledger(tmp_path / "run")
    for name in ("update", "loss", "grad_norm", "blocks_sha256"):
        assert [entry[name] for entry in second] == [entry[name] for entry in first[6:]]
    assert content_of(tmp_path / "run/final") == content_of(root / "pushed/final")


def test_what_cannot_be_resumed_from_the_hub_is_one_line_that_says_why(
    root: Path, pushed: tuple[HubServer, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    hub, _ = pushed
    mixed = {"model.safetensors": pushed_to(hub, "step-000012")["model.safetensors"]}
    hub.repositories["user/model"].commit("mixed", "", pushed_to(hub, "step-000006") | mixed)
    script = """
import sys
from recipe.config.command_line import load_config
from recipe.errors import RecipeError
from recipe.checkpoint.resume import find_resume_point
for reference in ("hf://user/model@mixed", "hf://user/model", "hf://user/model@none", "hf://user/none", "hf://"):
    try:
        find_resume_point(load_config([*sys.argv[1:], "--resume", reference]))
    except RecipeError as error:
        print(error)
"""
    command = [*arguments(tmp_path / "run", 6), "--data.text_files", f"{root}/texts/*.txt"]
    done = train(*command, script=("-c", script), **hub.environment(HF_HOME=str(tmp_path / "home")))
    assert done.returncode == 0, done.stderr
    mixed_up, model_only, no_revision, no_repository, nothing = done.stdout.splitlines()
    assert "model.safetensors has changed since it was written" in mixed_up
    assert "without training state; take a revision that was pushed with --hub.training_state true" in model_only
    assert "HTTP 404" in no_revision
    assert "Invalid rev id: none" in no_revision
    assert "HTTP 404" in no_repository
    assert "resume = 'hf://'" in nothing


def test_the_token_is_in_no_file_and_no_output(
    root: Path, pushed: tuple[HubServer, subprocess.CompletedProcess[str]]
) -> None:
    """Every request carried it: the server refuses others. The storage, which is another host, was not sent it either."""
    hub, done = pushed
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 40
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    for files_of_commit in hub.repositories["user/model"].commits.values():
        assert TOKEN.encode() not in b"".join(files_of_commit.values())


def test_a_hanging_hub_does_not_hold_up_training(root: Path, hub: HubServer) -> None:
    """On two ranks. The first push hangs until the run is over, and its checkpoint is not pruned under it; of those that
    waited meanwhile the newest is pushed."""
    directory = root / "hanging"
    hub.faults = [Fault("POST .*/commit/", None)]
    command = ["recipe/train.py", *arguments(directory, 2, "--checkpoint.keep", "1")]
    processes = start_ranks(2, command, **hub.environment(HF_HOME=str(root / "home")))
    try:
        wait_until((directory / "final").is_dir)
        assert [entry["update"] for entry in read_ledger(directory)] == list(range(1, UPDATES + 1))
        wait_until(lambda: processes[1].poll() is not None)
        assert processes[0].poll() is None, "rank 0 waits for the Hub, and no other rank for it"
        assert events_of(directory, "push") == []
        kept = {path.name for path in list_checkpoints(directory / "checkpoints")}
        assert {"step-000002", "step-000012"} <= kept < {f"step-{update:06d}" for update in range(2, UPDATES + 1, 2)}
        hub.faults = []
        hub.is_released.set()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [line["revision"] for line in events_of(directory, "push")] == ["step-000002", "step-000012", "main"]
    failed = events_of(directory, "push_failed")
    assert [line["revision"] for line in failed] == [f"step-{update:06d}" for update in (4, 6, 8, 10)]
    assert failed[0]["reason"] == "step-000006 took its place in the queue"
    model = content_of(directory / "checkpoints/step-000012")
    assert pushed_to(hub, "step-000012") == {name: model[name] for name in content_of(directory / "final")}
    assert set(pushed_to(hub, "step-000002")) == set(pushed_to(hub, "main")), "a model, without training state"
    assert [request.split()[1] for request in hub.requests].count("/api/repos/create") == 4, "rank 0 alone asks"


@pytest.mark.slow
def test_a_run_outlives_a_hub_that_takes_nothing_and_is_pushed_later(root: Path, hub: HubServer) -> None:
    """It hangs at the start, refuses the first push, and fails for ever."""
    directory = root / "failing"
    hub.faults = [Fault("/repos/create", None, 1), Fault("/commit/", 403, 1), Fault("/commit/", 500)]
    variables = hub.environment(HF_HOME=str(root / "home"))
    done = train(*arguments(directory, 6, "--hub.wait_seconds", "8"), **variables)
    assert done.returncode == 0, done.stderr
    assert "user/model could not be checked in 8 s (no answer)" in done.stdout
    assert [entry["update"] for entry in read_ledger(directory)] == list(range(1, UPDATES + 1))
    failed = events_of(directory, "push_failed")
    assert [line["revision"] for line in failed] == ["step-000006", "step-000012", "main"]
    for line, reason in zip(failed, ("HTTP 403", "HTTP 500", "not done 8 s after the end of training"), strict=True):
        assert reason in str(line["reason"])
        assert f"was not pushed to user/model: {line['reason']}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr + json.dumps(failed), "the server's answers spell it out"
    assert f"python -m recipe push {directory}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

    hub.faults = []
    later = train(str(directory), script=("-m", "recipe", "push"), **variables)
    assert later.returncode == 0, later.stderr
    assert pushed_to(hub, "main") == content_of(directory / "final")
    assert set(hub.repositories["user/model"].tags) == {"step-000006", "step-000012"}
    assert later.stdout.count("pushed ") == 3


def test_a_refused_token_is_one_line_before_anything_is_trained(root: Path, hub: HubServer) -> None:
    hub.token = "another"
    done = train(*arguments(root / "refused", 6), **hub.environment(HF_HOME=str(root / "home")))
    assert_one_line(done, ["hub.repo_id = 'user/model'", "HTTP 401", "HF_TOKEN", "hf auth login"])
    assert not (root / "refused/ledger.jsonl").exists()


ACCESS = """
import sys
from recipe.config.settings import PushConfig
from recipe.errors import RecipeError
from recipe.hub.client import check_access
for name in sys.argv[1:]:
    try:
        check_access(PushConfig(repo_id=name), lambda reason: None)
    except RecipeError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_what_may_not_be_written_is_refused_at_the_start(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = [Fault("elsewhere/.*/auth-check", 403)]
    hub.repositories["user/public"] = Repository(private=False)
    hub.repositories["user/public"].commit("main", "mine", {})
    script, variables = ("-c", ACCESS), hub.environment(HF_HOME=str(tmp_path))
    done = train("elsewhere/model", "user/public", "user/new", script=script, **variables)
    assert done.returncode == 0, done.stderr
    forbidden, public = done.stdout.splitlines()
    assert "'elsewhere/model' cannot be pushed to: HTTP 403" in forbidden
    assert "'user/public' cannot be pushed to: it is public" in public
    assert hub.repositories["user/new"].private
    for missing in ({"HF_TOKEN": ""}, {"HF_HUB_OFFLINE": "1"}):
        done = train("user/model", script=script, **{**variables, **missing})
        assert "cannot be pushed to: " in done.stdout, done.stderr
    assert "user/model" not in hub.repositories


def test_a_push_survives_what_passes_and_moves_its_tag(hub: HubServer, tmp_path: Path) -> None:
    """Too many requests, a server error and a request that hangs, once each; a tag of the same name is there already, and a
    file that is not ours."""
    repository = hub.repositories["user/model"] = Repository(private=True)
    repository.tags["step-000001"] = repository.commit("main", "mine", {"NOTES.md": b"mine", "manifest.json": b"old"})
    hub.faults = [Fault("/preupload/", 429, 1), Fault("/commit/", 503, 1), Fault("/tag/", None, 1)]
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001/model.safetensors").write_bytes(b"weights")
    script = """
import sys
from pathlib import Path
import recipe.hub.client
recipe.hub.client.REQUEST_SECONDS = 1.5
recipe.hub.client.push_directory(Path(sys.argv[1]), recipe.hub.client.PushConfig("user/model"), print)
"""
    variables = hub.environment(HF_HOME=str(tmp_path / "home"))
    done = train(str(tmp_path / "step-000001"), script=("-c", script), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HTTP 503 to POST /api/models/user/model/commit/main")
    assert "Timeout" in done.stdout
    assert pushed_to(hub, "step-000001") == {"NOTES.md": b"mine", "model.safetensors": b"weights"}
    assert repository.messages == ["mine", "Push step-000001"]


def test_a_push_is_given_up_when_it_takes_too_long_and_at_a_signal(hub: HubServer, tmp_path: Path) -> None:
    """The Hub hangs. The first push is ended while training goes on, the second when a signal comes in the wait at the end."""
    hub.faults = [Fault(".", None)]
    script = """
import os, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import recipe.hub.background
from recipe.config.command_line import load_config
from recipe.run.console import Console
from recipe.run.ledger import Ledger
from recipe.run.stop import StopRequest
recipe.hub.background.LONGEST_PUSH_SECONDS = 0.1
run, stop = Path(sys.argv[1]), StopRequest()
config = load_config(["--run.directory", str(run), "--hub.repo_id", "user/model"])
ledger = Ledger(run / "ledger.jsonl", SimpleNamespace(is_main_process=True), 1)
pusher = recipe.hub.background.Pusher(config, ledger, Console(True, 2), is_main=True)
pusher.checkpoint(1, run / "step-000001")
pusher.checkpoint(2, run / "step-000002")
while not (run / "ledger.jsonl").read_text():
    pusher.poll()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
pusher.finish(stop)
"""
    done = train(str(tmp_path), script=("-c", script), **hub.environment(HF_HOME=str(tmp_path / "home")))
    assert done.returncode == 0, done.stderr
    failed = [(line["revision"], line["reason"]) for line in events_of(tmp_path, "push_failed")]
    assert failed == [
        ("step-000001", "not done after 0.1 s (no answer)"),
        ("step-000002", "not done when signal 15 ended the wait (no answer)"),
    ]


def test_no_push_outlives_its_run(hub: HubServer, tmp_path: Path) -> None:
    """However that ends: here without a goodbye, while the Hub hangs."""
    hub.faults = [Fault(".", None)]
    script = """
import os
from recipe.config.settings import PushConfig
from recipe.hub.client import check_access
from recipe.hub.background import BackgroundCall
call = BackgroundCall(check_access, PushConfig("user/model"))
print(call._process.pid, flush=True)
input()
os._exit(1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=hub.environment(HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    push = psutil.Process(int(process.stdout.readline()))
    wait_until(lambda: bool(hub.requests))
    assert push.is_running()
    process.communicate("\n", timeout=30)
    wait_until(lambda: not push.is_running() or push.status() == psutil.STATUS_ZOMBIE)
