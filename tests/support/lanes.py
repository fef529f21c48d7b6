"""Lanes whose tokens are bytes, so that a test can read a block; what must hold of every lane and of its states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe.config.settings import BatchConfig, Config, DataConfig, ModelConfig, RunConfig
from recipe.data.blocks import UpdateReader, make_lanes, next_update
from recipe.data.documents import Source
from recipe.data.lanes import Lane
from recipe.data.sources import open_source
from recipe.data.streams import DocumentStream, LaneOrder
from recipe.data.tokenizer import load_tokenizer
from recipe.plan.budget import UpdatePlan
from recipe.run.run import Run
from tests.helpers import write_texts
from tests.support.runs import make_run, stand_in

CPU = torch.device("cpu")
END = 256  # the end-of-text token
LENGTH = 32


def encode_bytes(texts: list[str]) -> Sequence[np.ndarray]:
    """A token for each byte."""
    return [np.array([*text.encode("utf-8", "replace")], dtype=np.int32) for text in texts]


def config_for(tmp_path: Path, *patterns: str, lanes: int = 1, **data: Any) -> Config:
    settings: dict[str, Any] = {"text_files": patterns, "validation_one_in": None, "sequence_length": LENGTH, **data}
    return Config(
        run=RunConfig(directory=str(tmp_path / "run")),
        batch=BatchConfig(lanes=lanes),
        data=DataConfig(**settings),
        model=ModelConfig(vocab_size=400),
    )


def run_on(config: Config, blocks: int, rank: int = 0, ranks: int = 1) -> Run:
    """A rank of a run whose updates have so many blocks."""
    plan = UpdatePlan(blocks * LENGTH, LENGTH, config.batch.lanes, ranks, 3)
    return make_run(config, stand_in(rank, ranks), plan)


def lane_of(source: Source, index: int = 0, lanes: int = 1, shuffled: int = 1, seed: int = 3) -> Lane:
    """Unshuffled if not told otherwise: then a lane's blocks, one after the other, are its documents."""
    return Lane([DocumentStream(source, encode_bytes, index, LaneOrder(lanes, seed, shuffled))], LENGTH, END)


def documents_of(tokens: np.ndarray) -> list[bytes]:
    """Split a stream of byte tokens at the end-of-text tokens; the last, unfinished document is left out."""
    ends = np.flatnonzero(tokens == END)
    return [bytes(part[part != END].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def texts_of(lane: Lane) -> list[str]:
    """The documents of its shards, in the order of the source."""
    return [str(text) for shard in lane.streams[0].shards for text, _ in lane.streams[0].source.training.read(shard)]


def read_epoch(lane: Lane) -> np.ndarray:
    """The tokens of the lane's whole first epoch (and the rest of the block that ends it)."""
    stream = [lane.next_blocks(1)[0]]
    while lane.state_dict()["streams"][0]["epoch"] == 0:
        block = lane.next_blocks(1)[0]
        assert block[0] == stream[-1][-1], "neighbours share one token"
        stream.append(block[1:])
    return np.concatenate(stream)


def check_conservation(lanes: Sequence[Lane], texts: Sequence[str]) -> None:
    """Every document once per epoch, in one lane, whole, followed by one end-of-text token.

    Raises:
        AssertionError: a token is lost, added or moved.
    """
    seen: Counter[bytes] = Counter()
    for lane in lanes:
        epoch = documents_of(read_epoch(lane))
        own = [text.encode() for text in texts_of(lane)]
        assert Counter(epoch[: len(own)]) == Counter(own)
        seen.update(epoch[: len(own)])
    assert seen == Counter(text.encode() for text in texts)


def check_conservation_of_files(directory: Path, lanes: int) -> None:
    """The same, on real text that is written to `directory`."""
    texts = write_texts(directory)
    source = open_source(config_for(directory, f"{directory}/*.txt", lanes=lanes))
    check_conservation([lane_of(source, i, lanes) for i in range(lanes)], texts)


def check_states_of_updates(directory: Path) -> None:
    """The background thread reads ahead; the states that come with an update, which a checkpoint would hold, are its own.

    Raises:
        AssertionError: reading from them does not give the update's blocks.
    """
    write_texts(directory)
    config = config_for(directory, f"{directory}/*.txt", lanes=4, tokenizer=None)
    source = open_source(config)
    tokenizer = load_tokenizer(config, [source])
    run = run_on(config, 8, rank=1, ranks=2)
    reader = UpdateReader(run, make_lanes(run, [source], tokenizer))
    updates = [reader.next_update() for _ in range(12)]
    reader.close()
    assert [update.update for update in updates] == list(range(1, 13))
    for stop in (0, 4, 10):
        lanes = make_lanes(run, [source], tokenizer)
        for lane, state in zip(lanes, updates[stop].lane_states, strict=True):
            lane.load_state_dict(state)
        for update in updates[stop : stop + 2]:
            np.testing.assert_array_equal(next_update(lanes, 2, CPU).blocks, update.blocks)
