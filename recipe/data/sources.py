"""Where documents come from: a Hub dataset, files, or Python's standard library.

Local .txt files are read by `recipe.data.shards`, all else by `datasets`.
"""

import functools
import glob
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipe.config.settings import STANDARD_LIBRARY, STANDARD_LIBRARY_VALIDATION_ONE_IN, Config, DataConfig
from recipe.config.text_files import expand_text_files, is_remote, public_name, text_file_format
from recipe.data.documents import Source, hash_number, reason_of
from recipe.data.shards import StreamedShards, TextShards
from recipe.errors import RecipeError

# A local file that cannot be split is copied into this many shards per lane, so that shard order shuffles something.
SHARDS_PER_LANE = 16
# Local files are streamed in place if the largest lane holds at most this many times the bytes of the smallest.
LARGEST_LANE_RATIO = 2
_NOT_TRAINED_ON = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def open_source(config: Config) -> Source:
    """Open the documents that `config.data` names, in at least `config.batch.lanes` shards.

    Raises:
        RecipeError: a source that cannot be opened, or has fewer shards or documents than lanes.
    """
    data = config.data
    if data.text_files:
        paths = expand_text_files(data.text_files).paths
        name = public_name(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
        retry_seconds = data.retry_seconds if any(map(is_remote, paths)) else 0.0
        training = _files(paths, config)
        source = Source(name, training, data.text_column, data.validation_one_in, retry_seconds=retry_seconds)
    elif data.dataset == STANDARD_LIBRARY:
        training, validation = map(TextShards, split_standard_library())
        source = Source(STANDARD_LIBRARY, training, "text", validation=validation)
    else:
        training = _hub_dataset(config)
        source = Source(
            data.dataset, training, data.text_column, data.validation_one_in, retry_seconds=data.retry_seconds
        )
    if source.num_shards < config.batch.lanes:
        unit = "documents" if data.text_files else "shards"
        raise RecipeError(
            f"{source.name} has {source.num_shards} {unit}, fewer than batch.lanes = {config.batch.lanes}: "
            f"set --batch.lanes to {source.num_shards} or less, or give more text"
        )
    return source


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


def dataset_files(config: Config) -> list[str]:
    """Addresses, or local paths, of the files of `config.data.dataset` and its split; those of the Hub name their commit.

    Raises:
        RecipeError: it cannot be opened.
    """
    splits = {split.strip() for split in config.data.split.split("+")}
    files = _builder(config).config.data_files or {}
    return [file for split in files if split in splits or not splits & files.keys() for file in files[split]]


def _files(paths: list[str], config: Config) -> StreamedShards | TextShards:
    """Streamed in place if the files have shards enough for the lanes, and lanes would get about as much text each.

    Otherwise a memory-mapped copy is split by rows: each lane gives the same number of blocks to an update, so the text of a
    lane that holds little would be repeated as often as the others hold more. No file is downloaded for that alone.
    """
    kind, lanes, is_local = text_file_format(paths[0]), config.batch.lanes, not any(map(is_remote, paths))
    assert kind is not None, paths[0]
    is_even = True
    if is_local:
        lane_bytes = [sum(map(os.path.getsize, paths[lane::lanes])) for lane in range(lanes)]
        is_even = len(paths) < lanes or max(lane_bytes) <= LARGEST_LANE_RATIO * min(lane_bytes)
        if kind == "text":
            return TextShards(paths, None if is_even else min(len(paths), lanes * SHARDS_PER_LANE))
    streamed = _load(kind, paths, config)
    if is_local or streamed.num_shards < lanes:
        streamed = streamed.reshard()  # asks for the row groups of every file
    if streamed.num_shards < lanes or not is_even:
        rows = _load(kind, paths, config, streaming=False)
        if len(rows):
            streamed = rows.to_iterable_dataset(num_shards=min(len(rows), lanes * SHARDS_PER_LANE))
    return StreamedShards(streamed)


def _quiet_datasets() -> Any:
    """The library, which opens remote files through `recipe.data.remote_files`. To import it takes seconds."""
    import datasets

    from recipe.data.remote_files import use_checked_files

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it has to say is in our one line
    use_checked_files()
    return datasets


def _load(kind: str, paths: list[str], config: Config, *, streaming: bool = True) -> Any:
    from recipe.data.remote_files import name_for_datasets

    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read at import: nothing is counted for these files
    # A .txt file is one document; bytes that are not UTF-8 become U+FFFD.
    options = {"text": {"sample_by": "document", "encoding_errors": "replace"}, "json": {"encoding_errors": "replace"}}
    try:
        return _quiet_datasets().load_dataset(
            kind,
            # Each is taken for a pattern; of an address `recipe.data.remote_files` takes none.
            data_files=[name_for_datasets(path) if is_remote(path) else glob.escape(path) for path in paths],
            split="train",
            streaming=streaming,
            cache_dir=str(config.cache_directory / "datasets"),
            **options.get(kind, {}),
        )
    except Exception as error:
        name, reason = paths[0] if len(paths) == 1 else f"{len(paths)} files", reason_of(error)
        raise RecipeError(f"cannot read {reason if 'http' in reason else f'{name}: {reason}'}") from error


def _hub_dataset(config: Config) -> StreamedShards:
    with _opening(config.data):
        documents = _builder(config).as_streaming_dataset(split=config.data.split)
        return StreamedShards(documents if documents.num_shards >= config.batch.lanes else documents.reshard())


def _builder(config: Config) -> Any:
    """What `datasets` opens a dataset with. The same each time: what is recorded of it is what is read."""
    data = config.data
    with _opening(data):
        return _load_builder(data.repository, data.configuration, data.revision)


@functools.cache
def _load_builder(repository: str, configuration: str | None, revision: str | None) -> Any:
    return _quiet_datasets().load_dataset_builder(repository, configuration, revision=revision)


@contextmanager
def _opening(data: DataConfig) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"cannot open data.dataset = {data.dataset!r} (NAME or NAME:CONFIGURATION, data.split = {data.split!r}): {reason}; "
            "for text on this machine use --data.text_files"
        ) from error
