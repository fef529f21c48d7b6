"""Quick access to one of many shards of documents. `datasets` copies the list of all files for each shard that is taken out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SPLIT_AT_ONCE = 64  # shards of a part from which `datasets` takes one out


class StreamedShards:
    """The shards of a streaming dataset of `datasets`, found by halving it; halves are kept."""

    def __init__(self, dataset: Any) -> None:
        self.num_shards = int(dataset.num_shards)
        self._dataset, self._halves = dataset, dict[tuple[int, int], Any]()

    def shard(self, index: int) -> Any:
        """One shard as a streaming dataset of its own, with its own `state_dict()`."""
        part, first, count = self._dataset, 0, self.num_shards
        while count > _SPLIT_AT_ONCE:
            half = (count + 1) // 2  # the first is the larger one
            is_second = index >= first + half
            first, count = (first + half, count - half) if is_second else (first, half)
            if (first, count) not in self._halves:
                self._halves[first, count] = part.shard(num_shards=2, index=int(is_second))
            part = self._halves[first, count]
        return part.shard(num_shards=count, index=index - first)


class TextShards:
    """Local .txt files, each one document: as `datasets` reads them, without the milliseconds that it needs for each."""

    def __init__(self, paths: Sequence[str], num_shards: int | None = None) -> None:
        self.paths, self.num_shards = paths, num_shards or len(paths)

    def shard(self, index: int) -> "TextReader":
        """One of `num_shards` contiguous parts, of which the first ones have one file more."""
        size, larger = divmod(len(self.paths), self.num_shards)
        start = size * index + min(index, larger)
        return TextReader(self.paths[start : start + size + (index < larger)])


class TextReader:
    """Reads such files in order, from a state on."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths, self._start, self._read = paths, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """How many documents have been read."""
        return {"documents": self._read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin behind the documents of `state`."""
        if "documents" in state:
            self._start = state["documents"]
        else:  # in an older checkpoint, where `datasets` has counted them
            counts = state["examples_iterable"]
            self._start = counts["batch_idx"] or counts["examples_iterable"]["shard_example_idx"]

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Bytes that are not UTF-8 become U+FFFD, line ends become `\\n`."""
        for read, path in enumerate(self.paths[self._start :], self._start + 1):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            self._read = read
            yield {"text": text}
