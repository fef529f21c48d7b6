"""Where documents come from: a Hub dataset, files, or Python's standard library."""

import json
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipe.config.settings import STANDARD_LIBRARY, STANDARD_LIBRARY_VALIDATION_ONE_IN, Config, DataConfig
from recipe.config.text_files import TEXT_FILE_FORMATS, expand_text_files, is_remote, text_file_format
from recipe.data.documents import Source, hash_number, may_pass, reason_of
from recipe.data.files import File, LocalFile, find_file, name_of, side_by_side
from recipe.data.formats import Part
from recipe.data.remote_files import RemoteFile, find_pattern
from recipe.data.shards import COPIED_COLUMN, Reading, Shards, make_shards
from recipe.errors import RecipeError
from recipe.format import size_text
from recipe.retry import growing_pauses, retry
from recipe.run.files import new_file

_NOT_TRAINED_ON = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TYPICAL_TOKEN_BYTES = 4.5  # of English text in GPT-2's vocabulary
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0

Say = Callable[[str], None]


def find_text(config: Config, say: Say = lambda line: None) -> list[File]:
    """The files that `config.data` names, in the order in which they are dealt to lanes; those of the Hub name their commit.

    `say` is told why a server is asked again.

    Raises:
        RecipeError: they cannot be found.
    """
    data = config.data
    if data.text_files:
        found = expand_text_files(data.text_files)
        paths = found.paths
        if found.left_out:
            say(found.left_out)
        is_any_remote = any(map(is_remote, paths))
        return _patiently(data.retry_seconds * is_any_remote, "", lambda: _find_files(paths), say)
    if data.dataset == STANDARD_LIBRARY:
        return _find_files(split_standard_library()[0])
    name = (
        f"data.dataset = {data.dataset!r} (NAME or NAME:CONFIGURATION, data.split = {data.split!r}; for text on this machine "
        "use --data.text_files)"
    )
    return _patiently(data.retry_seconds, name, lambda: _find_dataset(data), say)


def open_source(config: Config, files: Sequence[File] | None = None, say: Say = lambda line: None) -> Source:
    """Open the documents that `config.data` names, in at least `config.batch.lanes` shards.

    Args:
        config: the settings.
        files: what `find_text` has found, if it has been asked.
        say: is told what takes long, and why a server is asked again.

    Raises:
        RecipeError: a source that cannot be opened, or has fewer shards or documents than lanes.
    """
    data, lanes = config.data, config.batch.lanes
    files = find_text(config, say) if files is None else files
    is_library = not data.text_files and data.dataset == STANDARD_LIBRARY
    name = data.dataset if not data.text_files else name_of(files[0]) if len(files) == 1 else f"{len(files)} files"
    retry_seconds = data.retry_seconds * (not all(isinstance(file, LocalFile) for file in files))
    kind = "text" if is_library else text_file_format(files[0].address)
    assert kind is not None, files[0]
    reading = Reading(kind, data.text_column, data.encoding)
    skips = data.on_bad_row == "skip"

    def copy(shards: Shards) -> File:
        whole = Source(name, shards, retry_seconds=retry_seconds, skips_bad_rows=skips)
        return _copy(whole, config.cache_directory / "text", say)

    if is_library:
        held_out = Shards(reading, list(map(Part, _find_files(split_standard_library()[1]))))
        source = Source(name, Shards(reading, list(map(Part, files))), validation=held_out, skips_bad_rows=True)
    else:
        shards = _patiently(retry_seconds, name, lambda: make_shards(files, reading, lanes, copy), say)
        source = Source(name, shards, data.validation_one_in, retry_seconds=retry_seconds, skips_bad_rows=skips)
    if len(source) < lanes:
        raise RecipeError(
            f"{name} has {len(source)} documents, fewer than batch.lanes = {lanes}: set --batch.lanes to {len(source)} or "
            "less, or give more text"
        )
    if source.is_remote and source.training.parquet:
        _check_memory(lanes, source.training.parquet.largest_bytes)
    return source


def describe(source: Source, files: Sequence[File], lanes: int, tokens: int) -> str:
    """What was opened, in one line, for a run that trains so many tokens."""
    commits = {found[1] for file in files if (found := re.match(r"hf://datasets/[^@]+@(\w+)/", file.address))}
    size = source.training.text_bytes
    parts = [
        f"{source.name}{''.join(f' at {commit[:12]}' for commit in commits)}",
        f"{len(files):,} files",
        f"{len(source):,} shards for {lanes} lanes",
    ]
    if size:
        passes = tokens * TYPICAL_TOKEN_BYTES / size
        shown = f"{passes:,.1f}" if passes >= 0.1 else "under 0.1"
        parts.append(f"{size_text(size)} of text: {shown} passes, if a token is {TYPICAL_TOKEN_BYTES} bytes of it")
    if source.is_remote and (parquet := source.training.parquet):
        parts.append(f"up to {size_text(lanes * parquet.largest_bytes)} of row groups in memory")
    return ", ".join(parts)


def identity_of(source: Source) -> list[Any]:
    """JSON value that is another where the documents are others."""
    files = dict.fromkeys(part.file for part in source.training.parts)
    reading = [source.training.reading.column, source.skips_bad_rows]
    return [*reading, *([name_of(file), file.size, file.version] for file in files)]


def _check_memory(lanes: int, lane_bytes: int) -> None:
    """Refuse what the lanes of this machine cannot hold."""
    import psutil

    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / int(os.environ.get("WORLD_SIZE", "1"))
    needed, available = lanes * lane_bytes * share, psutil.virtual_memory().available
    if needed > available:
        raise RecipeError(
            f"{lanes} lanes hold up to {size_text(lane_bytes)} each, the text of a row group and the next one as stored: "
            f"{size_text(needed)}, and this machine has {size_text(available)} left; set --batch.lanes to less, or write the "
            "files with smaller row groups"
        )


def standard_library_files() -> tuple[Path, list[Path]]:
    """(directory, sorted relative paths) of the running interpreter's `.py` files, without its tests."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for directory, folders, names in os.walk(root):
        folders[:] = set(folders) - _NOT_TRAINED_ON  # os.walk goes into these alone: site-packages is large
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        files += [path.relative_to(root) for path in paths if path.is_file()]
    return root, sorted(files)


def split_standard_library() -> tuple[list[str], list[str]]:
    """Paths of its files to train on, and of those held out."""
    root, files = standard_library_files()
    held_out = {f for f in files if hash_number(f.as_posix().encode()) % STANDARD_LIBRARY_VALIDATION_ONE_IN == 0}
    return [str(root / f) for f in files if f not in held_out], [str(root / f) for f in files if f in held_out]


def _find_files(paths: Sequence[str]) -> list[File]:
    paths = [found for path in paths for found in (find_pattern(path) if is_remote(path) else [path])]
    return side_by_side(find_file, paths) if any(map(is_remote, paths)) else list(map(find_file, paths))


def _find_dataset(data: DataConfig) -> list[File]:
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


def _patiently(seconds: float, name: str, action: Callable[[], Any], say: Say) -> Any:
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


def _copy(source: Source, directory: Path, say: Say) -> File:
    """All documents as one file of JSON Lines with nothing but the text, made once.

    Raises:
        RecipeError: it cannot be read or written.
    """
    path = directory / f"{hash_number(json.dumps(identity_of(source)).encode()):016x}.jsonl"
    if not path.exists():
        say(f"copying the text of {source.name} to {path}, to share it out over the lanes")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as rows:
                for text in source.training_documents():
                    rows.write(json.dumps({COPIED_COLUMN: text}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}; set --data.cache_directory") from None
    return LocalFile(str(path), path.stat().st_size)
