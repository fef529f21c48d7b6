"""The Hub: a repository made and checked, a directory pushed as one commit, a checkpoint brought back. Imports no torch.

The login is huggingface_hub's own, from HF_TOKEN or `hf auth login`: no token passes through this code.
"""

import json
import os
import re
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
    if settings.repo_id is not None:
        run.console.say(run.on_main(lambda: check_repository(settings, "hub.repo_id", "checkpoints")))


def check_repository(settings: PushConfig, setting: str, what: str, repo_type: str = "model") -> str:
    """What there is to say of a repository, once it is there and can be written to.

    `setting` names it, and `what` is pushed there.

    Raises:
        RecipeError: see `check_hub`.
    """

    def attempt() -> str:
        api = _api(CHECK_SECONDS)
        _open_repository(api, settings, repo_type)
        api.auth_check(settings.repo_id, repo_type=repo_type, write=True)
        folder = "datasets/" if repo_type == "dataset" else ""
        return f"{what} are pushed to {public_address(api.endpoint)}/{folder}{settings.repo_id}"

    try:
        return retry(attempt, growing_pauses(*PAUSES_SECONDS, within=CHECK_SECONDS), _may_pass)
    except Exception as error:
        if _may_pass(error):
            return f"{settings.repo_id} could not be checked: {explain(error)}; pushes will be tried"
        raise RecipeError(f"{setting} = {settings.repo_id!r} cannot be pushed to: {explain(error)}") from None


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
    files: dict[str, Any] = files_of(directory)
    if not settings.training_state:
        files = {name: path for name, path in files.items() if not _is_training_state(name)}
    files |= more
    revision = revision_of(directory, settings)

    def attempt() -> str:
        api = _api(REQUEST_SECONDS)
        commit = _commit(api, settings, f"Push {directory.name}", files)
        if revision != "main":
            if revision in [tag.name for tag in api.list_repo_refs(settings.repo_id).tags]:
                api.delete_tag(settings.repo_id, tag=revision)  # of an earlier attempt or run
            api.create_tag(settings.repo_id, tag=revision, revision=commit)
        return commit

    return _patiently(attempt, report)


def push_dataset(directory: Path, settings: PushConfig, more: dict[str, bytes], report: Callable[[str], None]) -> str:
    """Make main of a dataset repository hold a prepared directory in one commit, and no files of an earlier one.

    Arguments, result and errors are those of `push_directory`.
    """
    files: dict[str, Any] = {**files_of(directory), **more}
    return _patiently(
        lambda: _commit(_api(REQUEST_SECONDS), settings, f"Push {directory.name}", files, "dataset"), report
    )


def _patiently(attempt: Callable[[], str], report: Callable[[str], None]) -> str:
    pauses = growing_pauses(*PAUSES_SECONDS, within=RETRY_SECONDS)
    return retry(attempt, pauses, _may_pass, lambda error: report(explain(error)))


def _commit(api: Any, settings: PushConfig, message: str, files: dict[str, Any], repo_type: str = "model") -> str:
    """One commit with these files, and without those there of an earlier push that would be taken for some of them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = [sibling.rfilename for sibling in _open_repository(api, settings, repo_type).siblings or []]
    is_ours = _is_training_state if repo_type == "model" else _is_prepared
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files]
    # Not upload_folder, which may make several commits of one folder.
    return str(api.create_commit(settings.repo_id, operations, commit_message=message, repo_type=repo_type).oid)


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


def _is_prepared(name: str) -> bool:
    """Whether this file of a dataset is one of token ids that `recipe prepare` has written."""
    return re.fullmatch(r"(train|val)-\d+-of-\d+\.(parquet|bin)", name) is not None


def _api(silence_seconds: float) -> Any:
    """The library's client, whose requests fail if the Hub sends nothing for that long."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = silence_seconds
    return HfApi(token=True)


def _open_repository(api: Any, settings: PushConfig, repo_type: str) -> Any:
    """Make the repository if there is none; its ModelInfo or DatasetInfo."""
    api.create_repo(settings.repo_id, private=settings.private, exist_ok=True, repo_type=repo_type)
    info = api.repo_info(settings.repo_id, repo_type=repo_type)
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
