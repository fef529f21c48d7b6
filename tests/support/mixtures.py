"""Sources whose documents have letters of their own, so that a test sees of which source a token is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.config.settings import Config, MixtureSource
from recipe.data.documents import Source
from recipe.data.lanes import Lane
from recipe.data.sources import open_source
from recipe.data.streams import DocumentStream, LaneOrder
from tests.support.lanes import END, LENGTH, config_for, encode_bytes

LETTERS = ("abcdefgh", "ABCDEFGH", "01234567")  # of each source


class Mixed(NamedTuple):
    """A source to write: how long each of its documents is, in characters, and its weight."""

    lengths: Sequence[int]
    weight: float = 1.0
    files: int = 1
    max_passes: int | None = None


# Three times as many tokens of the first as of the second, whose documents are a hundred times as long.
LONG_AND_SHORT = (Mixed(range(3, 9), 3.0), Mixed([700, 300, 500]))


def write_source(directory: Path, number: int, mixed: Mixed, **more: Any) -> MixtureSource:
    """Documents as rows of JSON Lines, dealt to its files."""
    letters = LETTERS[number]
    texts = [
        "".join(letters[(7 * n + place) % len(letters)] for place in range(length))
        for n, length in enumerate(mixed.lengths)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{number}-{file}.jsonl" for file in range(mixed.files)]
    for file, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[file :: mixed.files]))
    return MixtureSource(
        text_files=tuple(map(str, paths)), weight=mixed.weight, name=f"s{number}", max_passes=mixed.max_passes, **more
    )


def config_of(directory: Path, mixture: Sequence[Mixed], lanes: int = 1, **data: Any) -> Config:
    sources = tuple(write_source(directory, number, mixed) for number, mixed in enumerate(mixture))
    return config_for(directory, lanes=lanes, dataset=None, sources=sources, **data)


def open_sources(config: Config) -> list[Source]:
    return [open_source(config, of) for of in config.data.mixture]


def mixture_of(directory: Path, mixture: Sequence[Mixed], lanes: int = 1, shuffled: int = 1) -> list[Lane]:
    """The lanes of a mixture, in which a token is a byte."""
    sources = open_sources(config_of(directory, mixture, lanes))
    order = LaneOrder(lanes, 3, shuffled)
    return [
        Lane([DocumentStream(source, encode_bytes, lane, order) for source in sources], LENGTH, END)
        for lane in range(lanes)
    ]


def sources_of(stream: np.ndarray) -> np.ndarray:
    """Of which source each token behind the first is; an end-of-text token is of the document before it."""
    found = np.select([np.isin(stream, list(letters.encode())) for letters in LETTERS], range(len(LETTERS)), -1)
    found = np.where(stream[1:] == END, found[:-1], found[1:])
    assert found.min() >= 0, "no document is empty"
    return found


def counts_of(block: np.ndarray, sources: int) -> list[int]:
    """Targets of a block from each source."""
    counts: list[int] = np.bincount(sources_of(block), minlength=sources).tolist()
    return counts


def read_stream(lane: Lane, blocks: int) -> np.ndarray:
    """The tokens of so many unshuffled blocks, one behind the other."""
    return np.concatenate([np.zeros(0, np.int32), *(block[:-1] for block in lane.next_blocks(blocks))])


def check_shares(lanes: Sequence[Lane], blocks: int = 150) -> None:
    """At every token of a lane, each source has its share: a document of its own more at most, and so a document of each
    other source less at most.

    Raises:
        AssertionError: it has not.
    """
    for lane in lanes:
        shares = np.array([stream.source.weight for stream in lane.streams])
        shares = shares / shares.sum()
        longest = np.array([1 + max(map(len, stream.source.training_documents())) for stream in lane.streams])
        over, under = longest * (1 - shares), (longest * (1 - shares)).sum() - longest * (1 - shares)
        sources = sources_of(read_stream(lane, blocks))
        taken = np.cumsum(np.eye(len(shares))[sources], axis=0)
        wanted = np.arange(1, len(taken) + 1)[:, None] * shares
        rounding = 1 + 1e-6  # the first token of a lane is no target
        assert (taken - wanted <= over + rounding).all()
        assert (wanted - taken <= under + rounding).all()
