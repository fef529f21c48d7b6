"""Where documents come from: a Hub dataset, local files, or Python's standard library; all read through `datasets`."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from recipe.config import STANDARD_LIBRARY, Config
from recipe.errors import DATA_EXIT_CODE, USER_ERROR_EXIT_CODE, RecipeError
from recipe.text_files import expand_text_files, text_file_format

# A local file that cannot be split is copied into this many shards per lane, so that shard order shuffles something.
SHARDS_PER_LANE = 16
# One standard-library file in this many is held out, whatever data.validation_one_in says for other sources.
STANDARD_LIBRARY_VALIDATION_ONE_IN = 50
# Local files are streamed in place where the largest lane holds at most this many times the bytes of the smallest.
LARGEST_LANE_RATIO = 2
_NOT_TRAINED_ON = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Documents in shards, some of them held out for validation.

    Args:
        name: what the user called it.
        training: streaming dataset with at least as many shards as lanes.
        text_column: the column that holds the document.
        validation_one_in: documents of `training` held out by hash of their text, one in this many; 0 for none.
        validation: streaming dataset of held-out documents, where they are not in `training`.
        retry_seconds: how long reading is tried again where it fails; 0 for local files.
    """

    name: str
    training: Any
    text_column: str
    validation_one_in: int = 0
    validation: Any = None
    retry_seconds: float = 0.0

    @property
    def num_shards(self) -> int:
        """Shards of the training documents."""
        return int(self.training.num_shards)

    def shard(self, index: int) -> Any:
        """One shard as a streaming dataset of its own, with its own `state_dict()`."""
        return self.training.shard(num_shards=self.num_shards, index=index)

    def text(self, row: dict[str, Any]) -> str:
        """The document of a row; an empty string where it is null.

        Raises:
            RecipeError: no such column, or not text.
        """
        if self.text_column not in row:
            raise RecipeError(
                f"{self.name} has no column {self.text_column!r}: set --data.text_column to one of {list(row)}"
            )
        value = row[self.text_column]
        if value is not None and not isinstance(value, str):
            raise RecipeError(
                f"column {self.text_column!r} of {self.name} holds {type(value).__name__}, not text: set --data.text_column"
            )
        return value or ""

    def is_held_out(self, text: str) -> bool:
        """True where a document of `training` belongs to validation: the same answer on every rank and in every epoch."""
        return self.validation_one_in > 0 and _hash(text.encode("utf-8", "surrogatepass")) % self.validation_one_in == 0

    def training_documents(self) -> Iterator[str]:
        """The training documents, once, in the order of the source."""
        return (text for text in self._read(self.training) if not self.is_held_out(text))

    def validation_documents(self) -> Iterator[str]:
        """The held-out documents, once, in the order of the source."""
        if self.validation is not None:
            return self._read(self.validation)
        if not self.validation_one_in:
            return iter(())
        return (text for text in self._read(self.training) if self.is_held_out(text))

    def _read(self, documents: Any) -> Iterator[str]:
        try:
            for row in documents:
                yield self.text(row)
        except RecipeError:
            raise
        except Exception as error:
            raise unreadable(self.name, error) from error


def unreadable(name: str, error: Exception, *, on_this_rank_only: bool = False) -> RecipeError:
    """The error for a source that `datasets` could not read; its own exceptions come from many libraries."""
    reason = str(error.__cause__ or error).strip().splitlines()
    return RecipeError(
        f"cannot read {name}: {reason[0] if reason else type(error).__name__}",
        on_this_rank_only=on_this_rank_only,
        exit_code=DATA_EXIT_CODE if on_this_rank_only else USER_ERROR_EXIT_CODE,
    )


def open_source(config: Config) -> Source:
    """Open the documents that `config.data` names, in at least `config.batch.lanes` shards.

    Raises:
        RecipeError: a source that cannot be opened, or has fewer shards or documents than lanes.
    """
    data = config.data
    if data.text_files or data.dataset == STANDARD_LIBRARY:
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read at import: nothing is counted for local files
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it has to say is in our one line
    if data.text_files:
        paths = expand_text_files(data.text_files)
        name = paths[0] if len(paths) == 1 else f"{len(paths)} files"
        training = _local_files(paths, config)
        source = Source(name, training, data.text_column, data.validation_one_in)
    elif data.dataset == STANDARD_LIBRARY:
        root, files = standard_library_files()
        held_out = {f for f in files if _hash(f.as_posix().encode()) % STANDARD_LIBRARY_VALIDATION_ONE_IN == 0}
        training = _load("text", [str(root / f) for f in files if f not in held_out], config)
        validation = _load("text", [str(root / f) for f in files if f in held_out], config)
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
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    return root, sorted(
        path for path in files if not _NOT_TRAINED_ON.intersection(path.parts) and (root / path).is_file()
    )


def _local_files(paths: list[str], config: Config) -> Any:
    """Streamed in place where the files have shards enough for the lanes, and lanes would get about as much text each.

    Otherwise a memory-mapped copy is split by rows: each lane gives the same number of blocks to an update, so the text of a
    lane that holds little would be repeated as often as the others hold more.
    """
    kind = text_file_format(paths[0])
    assert kind is not None, paths[0]
    streamed = _load(kind, paths, config).reshard()
    lanes = config.batch.lanes
    lane_bytes = [sum(Path(path).stat().st_size for path in paths[lane::lanes]) for lane in range(lanes)]
    is_even = len(paths) < lanes or max(lane_bytes) <= LARGEST_LANE_RATIO * min(lane_bytes)
    if streamed.num_shards >= lanes and is_even:
        return streamed
    rows = _load(kind, paths, config, streaming=False)
    return rows.to_iterable_dataset(num_shards=min(len(rows), lanes * SHARDS_PER_LANE)) if len(rows) else streamed


def _load(kind: str, paths: list[str], config: Config, *, streaming: bool = True) -> Any:
    import datasets

    # A .txt file is one document; bytes that are not UTF-8 become U+FFFD.
    options = {"text": {"sample_by": "document", "encoding_errors": "replace"}, "json": {"encoding_errors": "replace"}}
    try:
        return datasets.load_dataset(
            kind,
            data_files=[glob.escape(path) for path in paths],  # datasets takes each for a pattern
            split="train",
            streaming=streaming,
            cache_dir=str(config.cache_directory / "datasets"),
            **options.get(kind, {}),
        )
    except Exception as error:
        raise unreadable(paths[0] if len(paths) == 1 else f"{len(paths)} files", error) from error


def _hub_dataset(config: Config) -> Any:
    import datasets

    data = config.data
    try:
        documents = datasets.load_dataset(
            data.dataset, data.config_name, split=data.split, revision=data.revision, streaming=True
        )
        return documents if documents.num_shards >= config.batch.lanes else documents.reshard()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"cannot open data.dataset = {data.dataset!r} (data.config_name = {data.config_name!r}, data.split = "
            f"{data.split!r}, null for none): {reason}; for text on this machine use --data.text_files"
        ) from error


def _hash(value: bytes) -> int:
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "big")
