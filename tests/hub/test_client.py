"""The real huggingface_hub client against a real server: what is refused, what is tried again, what one push leaves there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import recipe.hub.client as client
from recipe.config.settings import Config, HubConfig, PushConfig
from recipe.errors import RecipeError
from recipe.hub.client import check_hub, explain, push_directory
from recipe.run.console import Console
from recipe.run.run import Run
from tests.support.hub_server import TOKEN, Fault, HubServer, Repository


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-000001"
    (directory / "training").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "manifest.json", "training/state.json"):
        (directory / name).write_bytes(name.encode())
    return directory


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why something was tried again; which is so after milliseconds."""
    monkeypatch.setattr(client, "PAUSES_SECONDS", (0.01, 0.02))
    return []


def check(settings: PushConfig) -> None:
    """`check_hub`, for a run of one rank."""
    alone: Any = SimpleNamespace(is_main_process=True)
    nothing: Any = None
    hub = HubConfig(**asdict(settings))
    check_hub(Run(Config(hub=hub), nothing, alone, "fp32", nothing, Console(True, 0), nothing))


def test_what_may_not_be_written_is_refused_at_the_start(
    online: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    online.faults = [Fault("elsewhere/.*/auth-check", 403)]
    online.repositories["user/public"] = Repository(private=False)
    online.repositories["user/public"].commit("main", "mine", {})
    with pytest.raises(RecipeError, match="'elsewhere/model' cannot be pushed to: HTTP 403"):
        check(PushConfig("elsewhere/model"))
    with pytest.raises(RecipeError, match="'user/public' cannot be pushed to: it is public"):
        check(PushConfig("user/public"))
    check(PushConfig("user/public", private=False))
    check(PushConfig("user/new"))
    assert capsys.readouterr().out.splitlines() == [
        f"checkpoints are pushed to {online.url}/user/{name}" for name in ("public", "new")
    ]
    assert online.repositories["user/new"].private
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Other" * 7)
    with pytest.raises(RecipeError, match=r"HTTP 401 .*; log in with HF_TOKEN or `hf auth login`"):
        check(PushConfig("user/model"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RecipeError, match="cannot be pushed to: LocalTokenNotFoundError"):
        check(PushConfig("user/model"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="cannot be pushed to: OfflineModeIsEnabled"):
        check(PushConfig("user/model"))
    assert "user/model" not in online.repositories


@pytest.mark.parametrize(("status", "words"), [(None, "ReadTimeout"), (503, "HTTP 503 to POST /api/repos/create")])
def test_a_hub_that_cannot_be_reached_is_one_line_and_no_error(
    status: int | None,
    words: str,
    online: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    reasons: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(client, "CHECK_SECONDS", 0.3)
    online.faults = [Fault("/repos/create", status)]
    check(PushConfig("user/model"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"user/model could not be checked: {words}")
    assert line.endswith("; pushes will be tried")
    assert TOKEN not in line, "the server's answer spells it out"


def test_a_push_is_one_commit_and_a_tag(online: HubServer, checkpoint: Path, reasons: list[str]) -> None:
    more = {"README.md": b"card", "config.yaml": b"settings"}
    push_directory(checkpoint, PushConfig("user/model"), more, reasons.append)
    repository = online.repositories["user/model"]
    model = {"model.safetensors": b"model.safetensors", "config.json": b"config.json", **more}
    assert repository.messages == ["initial commit", "Push step-000001"]
    assert online.pushed("step-000001") == online.pushed("main") == model, "no training state unless it is asked for"
    settings = PushConfig("user/model", training_state=True, revisions=False)
    push_directory(checkpoint, settings, more, reasons.append)
    assert set(online.pushed("main")) == {*model, "manifest.json", "training/state.json"}
    assert list(repository.tags) == ["step-000001"]
    assert online.pushed("step-000001") == model, "without revisions no tag moves"
    assert reasons == []


def test_a_push_survives_what_passes_and_moves_its_tag(
    online: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    """Too many requests, a server error and a request that hangs, once each; a tag of the same name is there already, and a
    file that is not ours."""
    monkeypatch.setattr(client, "REQUEST_SECONDS", 0.5)
    repository = online.repositories["user/model"] = Repository(private=True)
    repository.tags["step-000001"] = repository.commit("main", "mine", {"NOTES.md": b"mine", "manifest.json": b"old"})
    online.faults = [Fault("/preupload/", 429, 1), Fault("/commit/", 503, 1), Fault("/tag/", None, 1)]
    push_directory(checkpoint, PushConfig("user/model"), {}, reasons.append)
    server_error, hung = reasons  # the library itself repeats the 429
    assert server_error.startswith("HTTP 503 to POST /api/models/user/model/commit/main")
    assert "ReadTimeout" in hung
    files = {"NOTES.md": b"mine", "model.safetensors": b"model.safetensors", "config.json": b"config.json"}
    assert online.pushed("step-000001") == files
    assert repository.messages == ["mine", "Push step-000001"]
    assert TOKEN not in "".join(reasons)


def test_a_push_that_is_refused_is_not_repeated_and_one_that_fails_is_for_a_while(
    online: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 1.0)
    for status, least, most in ((403, 1, 1), (500, 2, 50)):
        online.faults, online.requests = [Fault("/commit/", status)], []
        with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever the library raises)
            push_directory(checkpoint, PushConfig("user/model"), {}, reasons.append)
        assert explain(caught.value).startswith(f"HTTP {status} to POST /api/models/user/model/commit/main")
        assert least <= len([request for request in online.requests if "/commit/" in request]) <= most


def test_no_text_holds_a_secret() -> None:
    address = "https://storage.example.com/object?X-Amz-Signature=1234"
    text = explain(ConnectionError(f"{address} with {TOKEN}\nfailed"))
    assert text == "ConnectionError: https://storage.example.com/object with hf_... failed"
