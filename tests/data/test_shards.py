"""One of many shards is found without a look at all of them, and is the one that `datasets` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from recipe.data.shards import StreamedShards, TextShards
from tests.helpers import write_texts


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Real text, an empty file, line ends of every kind, a byte order mark, a NUL, and bytes that are not UTF-8."""
    root = tmp_path_factory.mktemp("texts")
    write_texts(root, count=12, largest=900)
    odd = [b"", b"\r\n a \r b \n", b"\xef\xbb\xbfmark", b"n\0l", b"caf\xe9 \xf0\x9f\x98", "naïve 😀".encode()]
    for number, data in enumerate(odd):
        (root / f"odd-{number}.txt").write_bytes(data)
    return sorted(map(str, root.glob("*.txt")))


def as_datasets_reads(paths: list[str], num_shards: int | None, cache: Path) -> Any:
    """Streamed in place, or `num_shards` of a memory-mapped copy."""
    files: Any = {"data_files": paths, "split": "train", "cache_dir": str(cache)}
    options: Any = {"sample_by": "document", "encoding_errors": "replace"}
    loaded = datasets.load_dataset("text", streaming=num_shards is None, **files, **options)
    return loaded if num_shards is None else loaded.to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize("num_shards", [None, 5])
def test_text_files_are_read_as_datasets_reads_them(paths: list[str], num_shards: int | None, tmp_path: Path) -> None:
    """From every state too: ours, and one of `datasets` in an old checkpoint."""
    expected, ours = as_datasets_reads(paths, num_shards, tmp_path), TextShards(paths, num_shards)
    assert ours.num_shards == expected.num_shards == (num_shards or len(paths))
    for index in range(ours.num_shards):
        reader = expected.shard(num_shards=ours.num_shards, index=index)
        rows = list(reader)
        assert list(ours.shard(index)) == rows
        stopped = ours.shard(index)
        for count, (theirs, mine) in enumerate(zip(reader, stopped, strict=True), start=1):
            assert theirs == mine
            for state in (reader.state_dict(), stopped.state_dict()):
                again = ours.shard(index)
                again.load_state_dict(state)
                assert list(again) == rows[count:]


def documents(names: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        yield from ({"text": f"{name} {i}"} for i in range(2))


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_each_shard_is_that_of_datasets(count: int) -> None:
    dataset = datasets.IterableDataset.from_generator(documents, gen_kwargs={"names": [str(i) for i in range(count)]})
    shards = StreamedShards(dataset)
    assert shards.num_shards == count
    for index in {*range(0, count, 7), count - 1}:
        reader = shards.shard(index)
        assert list(reader) == [{"text": f"{index} 0"}, {"text": f"{index} 1"}]
        next(iter(reader))
        again = dataset.shard(num_shards=count, index=index)
        again.load_state_dict(reader.state_dict())
        assert [row["text"] for row in again] == [f"{index} 1"]


def test_a_pass_over_many_shards_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` looks at every shard of what it takes one out of."""
    count, looked_at = 1024, [0]
    dataset = datasets.IterableDataset.from_generator(documents, gen_kwargs={"names": [str(i) for i in range(count)]})
    original = datasets.iterable_dataset._split_gen_kwargs

    def split(gen_kwargs: dict[str, Any], max_num_jobs: int) -> Any:
        looked_at[0] += max_num_jobs
        return original(gen_kwargs, max_num_jobs)

    monkeypatch.setattr(datasets.iterable_dataset, "_split_gen_kwargs", split)
    dataset.shard(num_shards=count, index=0)
    assert looked_at == [count]
    shards = StreamedShards(dataset)
    for index in range(count):
        shards.shard(index)
    assert looked_at[0] < 80 * count
