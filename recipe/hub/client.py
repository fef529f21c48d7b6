"""The Hub: a repository made and checked, a directory pushed as one commit, a checkpoint brought back. Imports no torch.

The login is huggingface_hub's own, from HF_TOKEN or `hf auth login`: no token passes through this code.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.config.settings import PushConfig
from recipe.errors import RecipeError
from recipe.retry import growing_pauses, retry
from recipe.run.run import Run
from recipe.text import one_line, public_address, redact

REQUEST_SECONDS = 60.0  # without an answer; the library waits for ever (huggingface/huggingface_hub#3931)
CHECK_SECONDS = 30.0  # the same, before a run begins
RETRY_SECONDS = 600.0
PAUSES_SECONDS = (1.0, 60.0)  # the first and the longest


def check_hub(run: Run) -> None:
    """Make the repository if there is none, and check that it can be written to, before anything is trained. Collective.

    A Hub that cannot be reached for `CHECK_SECONDS` is a line on the console, and the run begins.

    Raises:
        RecipeError: no token, one that is refused or may not write there, or a public repository.
    """
    settings = run.config.hub

    def attempt() -> str:
        api = _api(CHECK_SECONDS)
        _open_repository(api, settings)
        api.auth_check(settings.repo_id, write=True)
        return f"checkpoints are pushed to {public_address(api.endpoint)}/{settings.repo_id}"

    def check() -> str:
        try:
            return retry(attempt, growing_pauses(*PAUSES_SECONDS, within=CHECK_SECONDS), _may_pass)
        except Exception as error:
            if _may_pass(error):
                return f"{settings.repo_id} could not be checked: {explain(error)}; pushes will be tried"
            raise RecipeError(f"hub.repo_id = {settings.repo_id!r} cannot be pushed to: {explain(error)}") from None

    if settings.repo_id is not None:
        run.console.say(run.on_main(check))


def revision_of(directory: Path, settings: PushConfig) -> str:
    """The revision that holds a directory after its push: the tag `step-N` of a checkpoint, or `main`."""
    return directory.name if settings.revisions and directory.name.startswith("step-") else "main"


def files_of(directory: Path) -> dict[str, Path]:
    """Name -> path of each plain file in a directory. What a symbolic link leads to is not in it, nor what previous/ keeps.

    Raises:
        OSError: it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    paths = [Path(root, name) for root, _, names in os.walk(directory, onerror=fail) for name in names]
    files = {p.relative_to(directory).as_posix(): p for p in paths if p.is_file() and not p.is_symlink()}
    return {name: path for name, path in files.items() if not name.startswith("previous/")}


def push_directory(directory: Path, settings: PushConfig, more: dict[str, bytes], report: Callable[[str], None]) -> str:
    """Make main hold a checkpoint or finished model in one commit, and tag a checkpoint.

    Args:
        directory: `step-N` or `final`, of which `files_of` is pushed; nobody may change or remove it meanwhile.
        settings: what is pushed where.
        more: name -> content of files that go along, in place of those of the same name in `directory`.
        report: called with the reason why an attempt failed, before the next.

    Returns: the commit.
    Raises:
        Exception: it was refused, or failed again and again for `RETRY_SECONDS`; `explain` makes a line of it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files: dict[str, Any] = files_of(directory)
    if not settings.training_state:
        files = {name: path for name, path in files.items() if not _is_training_state(name)}
    files |= more
    revision = revision_of(directory, settings)

    def attempt() -> str:
        api = _api(REQUEST_SECONDS)
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

    pauses = growing_pauses(*PAUSES_SECONDS, within=RETRY_SECONDS)
    return retry(attempt, pauses, _may_pass, lambda error: report(explain(error)))


def download_checkpoint(reference: str, cache: Path) -> Path:
    """The directory of the checkpoint `hf://user/name@revision`, downloaded into `cache` if it is not there yet.

    Raises:
        RecipeError: there is none, it cannot be downloaded, or it was pushed without its training state.
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
    return redact(one_line(text))[:300]


def _is_training_state(name: str) -> bool:
    """Whether only a resume needs this file of a checkpoint."""
    return name == "manifest.json" or name.startswith("training/")


def _api(silence_seconds: float) -> Any:
    """The library's client, whose requests fail if the Hub sends nothing for that long."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = silence_seconds
    return HfApi(token=True)


def _open_repository(api: Any, settings: PushConfig) -> Any:
    """Make the repository if there is none; its ModelInfo."""
    api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
    info = api.model_info(settings.repo_id)
    if settings.private and not info.private:
        raise RecipeError("it is public: if that is meant, set hub.private to false")
    return info


def _may_pass(error: Exception) -> bool:
    """Whether a later attempt may succeed."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    error = _cause(error)
    response: Any = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    final = (RecipeError, ValueError, FileNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled)
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, final)  # JSON: a proxy's page came instead


def _cause(error: Exception) -> Exception:
    """The error that the library wraps into a RuntimeError if a file could not be uploaded."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
