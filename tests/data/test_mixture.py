"""Several sources: each has its share of the tokens in each lane, whatever its documents are like; every position is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipe.data.blocks import UpdateBlocks, combine_hashes, make_lanes, next_update
from recipe.data.lanes import Lane
from recipe.data.tokenizer import load_tokenizer
from recipe.errors import RecipeError
from tests.support.lanes import CPU, END, LENGTH, run_on
from tests.support.mixtures import (
    LONG_AND_SHORT,
    Mixed,
    check_shares,
    config_of,
    counts_of,
    mixture_of,
    open_sources,
    read_stream,
    sources_of,
)

MIXTURES = {
    "long and short": LONG_AND_SHORT,
    "lengths that vary": (Mixed([1, 300, 2, 90] * 2, 0.7), Mixed([400, 3, 200, 8] * 3, 0.3)),
    "three": (Mixed([5] * 9, 5.0), Mixed([90] * 5), Mixed([1, 40] * 4, 3.0)),
    "a trace": (Mixed([5] * 9, 0.999), Mixed([90] * 5, 0.001)),
    "even": (Mixed([1] * 6), Mixed([2] * 6), Mixed([3] * 6)),
    "several files": (Mixed([30] * 12, 2.0, files=3), Mixed([9, 50] * 4, files=2)),
}


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("name", MIXTURES)
def test_each_source_has_its_share_of_the_tokens_of_each_lane(name: str, lanes: int, tmp_path: Path) -> None:
    """Over many passes of each source, so that nothing changes where one is at its end."""
    check_shares(mixture_of(tmp_path, MIXTURES[name], lanes))


def of_source(stream: np.ndarray, number: int) -> bytes:
    """The tokens of one source in a stream that begins with a document; `.` is the end of one."""
    own = stream[1:][sources_of(stream) == number]
    return bytes(np.where(own == END, ord("."), own).astype(np.uint8).tolist())


@pytest.mark.parametrize("files", [1, 2, 6])
def test_what_a_source_gives_does_not_depend_on_the_others_nor_on_their_files(files: int, tmp_path: Path) -> None:
    """In each lane it is what the source gives alone: the same documents in the same order. How the files of a source are cut
    decides which documents are in which lane, and nothing else."""
    first, second = Mixed([20, 50, 90, 10, 70, 30] * 2, 2.0), Mixed([40, 8, 60, 25] * 3, files=files)
    lanes, alone = mixture_of(tmp_path / "both", (first, second), 2), mixture_of(tmp_path / "one", (first,), 2)
    for lane, expected in zip(lanes, alone, strict=True):
        stream = read_stream(lane, 200)
        mine, whole = of_source(stream, 0), of_source(read_stream(expected, 200), 0)
        assert len(mine) == pytest.approx(len(stream) * 2 / 3, abs=91)
        assert len(mine) > 3 * sum(first.lengths)
        assert whole.startswith(mine)


def test_a_source_that_runs_out_repeats_and_its_passes_are_counted(tmp_path: Path) -> None:
    (lane,) = mixture_of(tmp_path, (Mixed([30] * 40, 3.0), Mixed([4, 9, 2], files=3)))
    stream, found = [], []
    for _ in range(200):
        found.append(lane.passes)
        block = lane.next_blocks(1)[0]
        stream.append(block[:-1])
    tokens = np.concatenate(stream)
    sources = sources_of(tokens)
    for number, documents in ((0, 40), (1, 3)):
        ends = np.concatenate([[0], np.cumsum((tokens[1:] == END) & (sources == number))])
        assert [passes[number] for passes in found] == [
            ends[max(LENGTH * block - 1, 0)] // documents for block in range(200)
        ]
    assert found[-1] == [3, 88]
    assert mixed_epochs(of_source(tokens, 1)) > 2, "a new order in each pass"


def mixed_epochs(text: bytes) -> int:
    documents = text.split(b".")[:-1]
    return len({tuple(documents[n : n + 3]) for n in range(0, len(documents) - 2, 3)})


def test_blocks_are_shuffled_after_mixing_and_their_tokens_are_counted(tmp_path: Path) -> None:
    """A window is a permutation of what the lane gives without shuffling; what a call has given of each source is exact."""
    (packed,), (lane,) = (mixture_of(tmp_path, LONG_AND_SHORT, shuffled=shuffled) for shuffled in (1, 20))
    expected, found = [], []
    for window in (8, 16, 20, 20):
        blocks, given = packed.next_blocks(window), []
        for count in (1, 3, window - 4):
            given.append(lane.next_blocks(count))
            found.append(lane.source_tokens.tolist())
            assert lane.passes == packed.passes, "up to the end of the window"
            expected.append(np.sum([counts_of(block, 2) for block in given[-1]], axis=0).tolist())
        shuffled = np.concatenate(given)
        assert sorted(map(bytes, shuffled)) == sorted(map(bytes, blocks))
        assert (shuffled != blocks).any()
    assert found == expected
    assert [sum(counts) for counts in found] == [
        count * LENGTH for window in (8, 16, 20, 20) for count in (1, 3, window - 4)
    ]
    assert len({tuple(counts) for counts in found}) > 5


def test_a_state_is_exact_at_every_block_over_three_resumes(tmp_path: Path) -> None:
    """Inside documents and windows, over several passes; the state goes through JSON. Also the counts are the same."""

    def lane() -> Lane:
        return mixture_of(tmp_path, MIXTURES["three"], 2, shuffled=11)[1]

    def read(lane: Lane) -> tuple[bytes, list[int], list[int]]:
        block = lane.next_blocks(1)[0]
        return block.tobytes(), lane.source_tokens.tolist(), lane.passes

    whole, expected, states = lane(), [], []
    for _ in range(150):
        states.append(json.dumps(whole.state_dict()))
        expected.append(read(whole))
    assert max(len(state) for state in states) < 600, "a few integers"
    assert min(expected[-1][2]) >= 2
    again = lane()
    for stop, state in enumerate(states):
        for place in range(stop, min(stop + (1 if stop % 5 else 3), 150)):
            again.load_state_dict(json.loads(state))
            assert read(again) == expected[place]
            state = json.dumps(again.state_dict())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_same_blocks_and_count_their_tokens(ranks: int, tmp_path: Path) -> None:
    """Of a tokenizer with a token for each byte."""
    config = config_of(tmp_path, MIXTURES["lengths that vary"], 4, tokenizer=None, shuffle_blocks=5)
    config = replace(config, model=replace(config.model, vocab_size=257))
    sources = open_sources(config)
    tokenizer = load_tokenizer(config, sources)
    names = tokenizer.convert_ids_to_tokens(range(257))
    letters = np.array([ord(name) if len(name) == 1 else END for name in names])

    def updates(rank: int, ranks: int) -> list[UpdateBlocks]:
        lanes = make_lanes(run_on(config, 12, rank, ranks), sources, tokenizer)
        return [next_update(lanes, 3, CPU) for _ in range(5)]

    shares = zip(*[updates(rank, ranks) for rank in range(ranks)], strict=True)
    for whole, of_ranks in zip(updates(0, 1), shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([share.blocks for share in of_ranks]), whole.blocks)
        assert combine_hashes(np.concatenate([share.sha256 for share in of_ranks])) == combine_hashes(whole.sha256)
        counts = np.sum([counts_of(block, 2) for block in letters[whole.blocks]], axis=0).tolist()
        assert (
            np.sum([share.source_tokens for share in of_ranks], axis=0).tolist() == list(whole.source_tokens) == counts
        )
        assert sum(counts) == 12 * LENGTH
        assert tuple(map(max, *[share.source_passes for share in of_ranks] * 2)) == whole.source_passes


def test_a_source_too_small_for_the_lanes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"1-0\.jsonl has 2 documents, fewer than batch\.lanes = 3"):
        mixture_of(tmp_path, (Mixed([9] * 9), Mixed([9] * 2)), 3)
