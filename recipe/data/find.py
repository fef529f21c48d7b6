"""Which files a source consists of: local ones, those behind addresses, those of a dataset of the Hub."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from recipe.config.settings import Config, SourceConfig
from recipe.config.text_files import TEXT_FILE_FORMATS, expand_files, is_remote, text_file_format
from recipe.data.documents import may_pass, reason_of
from recipe.data.files import File, find_file, side_by_side
from recipe.data.remote_files import RemoteFile, find_pattern
from recipe.data.standard_library import split_standard_library
from recipe.errors import RecipeError
from recipe.retry import growing_pauses, retry

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0

Say = Callable[[str], None]


def find_files_of(config: Config, of: SourceConfig | None = None, say: Say = lambda line: None) -> list[File]:
    """The files that a source of `config.data` names, the first if none is given, in the order in which lanes get them.

    Those of the Hub name their commit. `say` is told why a server is asked again.

    Raises:
        RecipeError: they cannot be found.
    """
    of, retry_seconds = of or config.data.mixture[0], config.data.retry_seconds
    if of.files:
        found = expand_files(of)
        paths = found.paths
        if found.left_out:
            say(found.left_out)
        is_any_remote = any(map(is_remote, paths))
        return patiently(retry_seconds * is_any_remote, "", lambda: find_all(paths), say)
    if of.is_standard_library:
        return find_all(split_standard_library()[0])
    name = (
        f"data.dataset = {of.dataset!r} (NAME or NAME:CONFIGURATION, data.split = {of.split!r}; for text on this machine "
        "use --data.text_files)"
    )
    return patiently(retry_seconds, name, lambda: _find_dataset(of), say)


def find_all(paths: Sequence[str]) -> list[File]:
    paths = [found for path in paths for found in (find_pattern(path) if is_remote(path) else [path])]
    return side_by_side(find_file, paths) if any(map(is_remote, paths)) else list(map(find_file, paths))


def _find_dataset(data: SourceConfig) -> list[File]:
    """The files of a Hub dataset and its split, with sizes, at one commit."""
    splits = {split.strip() for split in data.split.split("+")}
    found = _load_builder(data.repository, data.configuration, data.revision).config.data_files or {}
    if found and not splits <= found.keys():
        raise RecipeError(f"data.split = {data.split!r}: {data.dataset} has {', '.join(map(str, found))}")
    addresses = [address for split in found if split in splits for address in found[split]]
    kinds = {text_file_format(address): address for address in addresses}
    if not addresses or len(kinds) > 1 or None in kinds:
        example = kinds.get(None) or ", ".join(kinds.values()) or "none"
        raise RecipeError(
            f"data.dataset = {data.dataset!r}: its files are not of one of the formats {', '.join(TEXT_FILE_FORMATS)} "
            f"({example}); the Hub has most datasets as Parquet too: try --data.revision refs/convert/parquet"
        )
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    return [
        RemoteFile(address, hub.info(address)["size"]) if address.startswith("hf://") else find_file(address)
        for address in addresses
    ]


def _load_builder(repository: str, configuration: str | None, revision: str | None) -> Any:
    """What `datasets` knows of a dataset: its configurations, splits and files. To import it takes seconds."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it has to say is in our one line
    return datasets.load_dataset_builder(repository, configuration, revision=revision)


def patiently(seconds: float, name: str, action: Callable[[], Any], say: Say) -> Any:
    """The result of `action`, which asks servers, tried again for so long where that may help."""
    pauses = growing_pauses(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, seconds)
    try:
        return retry(action, pauses, _may_answer_later, lambda error: say(f"trying again: {reason_of(error)}"))
    except RecipeError:
        raise
    except Exception as error:  # of any library that opens
        raise RecipeError(f"cannot read {name}{': ' * bool(name)}{' '.join(reason_of(error).split())[:300]}") from error


def _may_answer_later(error: Any) -> bool:
    """Whether a server has failed, as one of the causes of an error says, and not refused."""
    if error is None or isinstance(error, RecipeError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if found := re.search(r"(?:HTTP Error|status) (\d{3})\b", str(error)):
        return int(found[1]) >= 500 or int(found[1]) in (408, 429)
    is_of_server = may_pass(error) or type(error).__module__.startswith(("httpx", "httpcore"))
    return _may_answer_later(error.__cause__ or error.__context__) or (
        is_of_server and not isinstance(error, FileNotFoundError)
    )
