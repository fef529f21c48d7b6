"""The Hub: a repository made and checked, a directory pushed as one commit, a checkpoint brought back. Imports no torch.

The login is huggingface_hub's own, from HF_TOKEN or `hf auth login`: no token passes through this code.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from recipe.config.settings import PushConfig
from recipe.errors import RecipeError
from recipe.report.card import card_files

Result = TypeVar("Result")
Report = Callable[[str], None]  # is told why something has to be tried again

REQUEST_SECONDS = 60.0  # without an answer; the library waits for ever (huggingface/huggingface_hub#3931)
RETRY_SECONDS = 600.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


def check_access(settings: PushConfig, report: Report) -> str:
    """See that the repository can be written to, before anything is trained for it; it is made where there is none.

    Args:
        settings: what is pushed where.
        report: is told why the Hub could not be asked yet.

    Returns: the repository's address.
    Raises:
        RecipeError: no token, one that is refused or may not write there, or a public repository.
    """

    def attempt() -> str:
        api = _api()
        _open_repository(api, settings)
        api.auth_check(settings.repo_id, write=True)
        return f"{api.endpoint}/{settings.repo_id}"

    try:
        return retry(attempt, report)
    except RecipeError as error:
        raise RecipeError(f"hub.repo_id = {settings.repo_id!r} cannot be pushed to: {error}") from None


def revision_of(directory: Path, settings: PushConfig) -> str:
    """The revision that holds a directory after its push: the tag `step-N` of a checkpoint, or `main`."""
    return directory.name if settings.revisions and directory.name.startswith("step-") else "main"


def push_directory(directory: Path, settings: PushConfig, report: Report) -> str:
    """Make main hold a checkpoint or finished model and its card, in one commit, and tag it where it is a checkpoint.

    Args:
        directory: RUN/checkpoints/step-N, or RUN/final; nobody may change or remove it meanwhile.
        settings: what is pushed where.
        report: is told why an attempt failed that is made again.

    Returns: the commit.
    Raises:
        RecipeError: it was refused, or failed again and again for `RETRY_SECONDS`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files: dict[str, Any] = {
        path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()
    }
    if not settings.training_state:
        files = {name: path for name, path in files.items() if not _is_training_state(name)}
    files |= _card_of(directory, settings)
    revision = revision_of(directory, settings)

    def attempt() -> str:
        api = _api()
        there = [sibling.rfilename for sibling in _open_repository(api, settings).siblings or []]
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in there if _is_training_state(name) and name not in files]
        # Not upload_folder, which may make several commits of one folder.
        commit = api.create_commit(settings.repo_id, operations, commit_message=f"Push {directory.name}").oid
        if revision != "main":
            if revision in [tag.name for tag in api.list_repo_refs(settings.repo_id).tags]:
                api.delete_tag(settings.repo_id, tag=revision)  # of an earlier attempt or run
            api.create_tag(settings.repo_id, tag=revision, revision=commit)
        return str(commit)

    return retry(attempt, report)


def _card_of(directory: Path, settings: PushConfig) -> dict[str, bytes]:
    """The card's files for a checkpoint or finished model; none where it lies in no run's directory."""
    is_checkpoint = directory.name.startswith("step-")
    update = int(directory.name.removeprefix("step-")) if is_checkpoint else None
    try:
        return card_files(
            directory.parent.parent if is_checkpoint else directory.parent, settings.repo_id, update=update
        )
    except RecipeError:
        return {}


def download_checkpoint(reference: str, cache: Path) -> Path:
    """The directory of the checkpoint `hf://user/name@revision`, downloaded into `cache` where it is not there yet.

    Raises:
        RecipeError: it cannot be had, or was pushed without its training state.
    """
    from huggingface_hub import HfApi, get_session, parse_hf_uri, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    get_session().timeout = REQUEST_SECONDS
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        uri = parse_hf_uri(reference)
        if uri.type != "model" or uri.path_in_repo:
            raise RecipeError("it is no model repository")
        info = HfApi().model_info(uri.id, revision=uri.revision)
        if "manifest.json" not in [sibling.rfilename for sibling in info.siblings or []]:
            raise RecipeError(
                "it holds a model without training state; take a revision that was pushed with --hub.training_state true"
            )
        return Path(snapshot_download(uri.id, revision=info.sha, cache_dir=cache))
    except Exception as error:
        raise RecipeError(f"resume = {reference!r}: {explain(error)}; give hf://user/name@revision") from None


def explain(error: Exception) -> str:
    """What went wrong with the Hub, in one line without secrets."""
    error = _cause(error)
    text = str(error) if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
    response: Any = getattr(error, "response", None)
    if response is not None:
        what = getattr(error, "server_message", None) or response.reason_phrase
        text = f"HTTP {response.status_code} to {response.request.method} {response.request.url.path}: {what}"
        if response.status_code in (401, 403):
            text += "; log in with HF_TOKEN or `hf auth login`, and a token that may do this"
    return redact(" ".join(text.split())[:300])


def redact(text: str) -> str:
    """The text without access tokens, and without the signatures in addresses of storage."""
    return re.sub(r"\b(hf|api_org)_\w{16,}", r"\1_...", re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text))


def _is_training_state(name: str) -> bool:
    """Whether a file of a checkpoint is there for resuming alone."""
    return name == "manifest.json" or name.startswith("training/")


def _api() -> Any:
    from huggingface_hub import HfApi, get_session

    get_session().timeout = REQUEST_SECONDS
    return HfApi(token=True)


def _open_repository(api: Any, settings: PushConfig) -> Any:
    """Its ModelInfo."""
    api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
    info = api.model_info(settings.repo_id)
    if settings.private and not info.private:
        raise RecipeError("it is public: if that is meant, set hub.private to false")
    return info


def retry(action: Callable[[], Result], report: Report) -> Result:
    """The result of `action`, which is tried again with growing pauses where a later attempt may succeed."""
    pause, deadline = FIRST_PAUSE_SECONDS, None
    while True:
        try:
            return action()
        except Exception as error:
            reason = explain(error)
            deadline = deadline or time.monotonic() + RETRY_SECONDS  # from the first failure: an upload may take long
            if not _may_pass(error) or time.monotonic() + pause > deadline:
                raise RecipeError(reason) from error
        report(reason)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    error = _cause(error)
    response: Any = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    if isinstance(error, json.JSONDecodeError):  # a proxy's page where the Hub's answer should be
        return True
    return not isinstance(
        error, RecipeError | ValueError | FileNotFoundError | LocalTokenNotFoundError | OfflineModeIsEnabled
    )


def _cause(error: Exception) -> Exception:
    """What is behind the library's RuntimeError for a file that could not be uploaded."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
