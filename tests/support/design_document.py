"""The order of the data as docs/design.md has it, written from that page alone: nothing here imports the recipe."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Settings = dict[str, Any]  # config.yaml: section -> setting -> value
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


def h(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def divides(data: bytes, one_in: int | None) -> bool:
    return one_in is not None and int.from_bytes(h(data), "big") % one_in == 0


Shard = tuple[str, int, int]  # path, and the bytes of it from one place to before another


def read(shard: Shard) -> list[str]:
    path, start, end = shard
    data = Path(path).read_bytes()[start:end]
    if path.endswith(".jsonl"):
        return [json.loads(line)["text"] or "" for line in data.decode().split("\n") if line.strip()]
    return [data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")]


def files(patterns: Sequence[str]) -> list[str]:
    paths_of_file: dict[tuple[int, int], set[str]] = {}
    for pattern in patterns:
        found = [""]
        for part in Path(pattern).parts:
            found = [path for place in found for path in matches(place, part)]
        for path in filter(os.path.isfile, found):
            paths_of_file.setdefault((os.stat(path).st_dev, os.stat(path).st_ino), set()).add(path)
    return sorted(min(paths, key=lambda path: (links(path), path)) for paths in paths_of_file.values())


def matches(place: str, part: str) -> list[str]:
    path = os.path.join(place, part)
    return [path] if os.path.lexists(path) else glob.glob(os.path.join(glob.escape(place), part), recursive=True)


def links(path: str) -> int:
    return sum(os.path.islink(directory) for directory in map(str, (path, *Path(path).parents)))


def whole(path: str) -> Shard:
    return path, 0, os.path.getsize(path)


def shards_of_files(settings: Settings) -> list[Shard]:
    paths = files(settings["data"]["text_files"])
    lanes = settings["batch"]["lanes"]
    sizes = [sum(os.path.getsize(path) for path in paths[lane::lanes]) for lane in range(lanes)]
    if paths[0].endswith(".txt") or (len(paths) >= lanes and max(sizes) <= 2 * min(sizes)):
        return [whole(path) for path in paths]
    shards: list[Shard] = []
    for path in paths:
        size = os.path.getsize(path)
        count = max(1, round(16 * lanes * size / sum(sizes)))
        lines = [0, *(place + 1 for place, byte in enumerate(Path(path).read_bytes()) if byte == ord("\n"))]
        places = {min([line for line in lines if line >= size * n // count] or [size]) for n in range(1, count)}
        bounds = sorted({0, size} | places)
        shards += [(path, start, end) for start, end in pairwise(bounds)]
    return shards


def shards_of_the_standard_library() -> list[Shard]:
    root = sysconfig.get_path("stdlib")
    found: list[tuple[str, ...]] = []
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in LEFT_OUT]
        parts = Path(directory).relative_to(root).parts
        found += [(*parts, name) for name in names if name.endswith(".py")]
    return [whole(os.path.join(root, *parts)) for parts in sorted(found) if not divides("/".join(parts).encode(), 50)]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    chosen: list[str] = []
    size = 0
    for text in texts:
        chosen.append(text)
        size += len(text.encode())
        if size >= 64_000_000:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chosen, trainer)
    return tokenizer


class Source:
    """One of `data.sources`, or what the settings say without them."""

    def __init__(self, settings: Settings, data: dict[str, Any]) -> None:
        self.settings = {**settings, "data": {**settings["data"], **data}}
        self.weight: float = data.get("weight", 1.0)
        self.epochs_begun = 0
        is_library = not data["text_files"]
        self.shards = shards_of_the_standard_library() if is_library else shards_of_files(self.settings)
        self.one_in = None if is_library else settings["data"]["validation_one_in"]

    def documents(self, shard: int) -> Iterator[str]:
        return (text for text in read(self.shards[shard]) if not divides(text.encode(), self.one_in))

    def all_documents(self) -> Iterator[str]:
        return (text for shard in range(len(self.shards)) for text in self.documents(shard))

    def of_lane(self, lane: int) -> Iterator[str]:
        """Its endless documents."""
        seed = self.settings["run"]["seed"]
        for epoch in count():
            self.epochs_begun = max(self.epochs_begun, epoch + 1)
            own = range(lane, len(self.shards), self.settings["batch"]["lanes"])
            order = sorted(own, key=lambda shard: h(repr((seed, lane, epoch, "shard", shard)).encode()))
            for shard in order:
                yield from self.documents(shard)


class Order:
    """The data of a run with these settings; `tokenizer` is that of `data.tokenizer`, None: to be trained."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer | None = None) -> None:
        self.settings = settings
        self.sources = [Source(settings, data) for data in settings["data"]["sources"] or [settings["data"]]]
        self.tokenizer = tokenizer or train_tokenizer(self.training_documents(), settings["model"]["vocab_size"])
        self.tokenizer.encode_special_tokens = True

    def training_documents(self) -> Iterator[str]:
        """Of all sources, for the tokenizer."""
        readers = [source.all_documents() for source in self.sources]
        taken = [0.0 for _ in readers]
        while any(characters < math.inf for characters in taken):
            n = taken.index(min(taken))
            text = next(readers[n], None)
            taken[n] = math.inf if text is None else taken[n] + len(text) / self.sources[n].weight
            if text is not None:
                yield text

    def tokens(self, lane: int) -> Iterator[int]:
        """The endless stream of a lane."""
        end = self.tokenizer.token_to_id("<|endoftext|>")
        assert end is not None
        documents = [source.of_lane(lane) for source in self.sources]
        total = math.fsum(source.weight for source in self.sources)
        shares = [source.weight / total for source in self.sources]
        taken = [0 for _ in self.sources]
        while True:
            behind = [share * sum(taken) - tokens for share, tokens in zip(shares, taken, strict=True)]
            n = behind.index(max(behind))
            ids = self.tokenizer.encode(next(documents[n]), add_special_tokens=False).ids
            taken[n] += len(ids) + 1
            yield from ids
            yield end

    def blocks(self, lane: int) -> Iterator[list[int]]:
        """The endless shuffled blocks of a lane."""
        seed, length = self.settings["run"]["seed"], self.settings["data"]["sequence_length"]
        stream = self.tokens(lane)
        last = next(stream)  # the next block's first token
        for window in count():
            held = []
            for _ in range(min(8 * 2**window, self.settings["data"]["shuffle_blocks"])):
                held.append([last, *islice(stream, length)])
                last = held[-1][-1]
            for j in sorted(range(len(held)), key=lambda j: h(repr((seed, lane, "block", window, j)).encode())):
                yield held[j]

    def budgets(self) -> Iterator[int]:
        """Tokens of each update, for ever."""
        batch, seen = self.settings["batch"], 0
        while True:
            begun = [change["tokens_per_update"] for change in batch["schedule"] if change["from_tokens"] <= seen]
            yield [batch["tokens_per_update"], *begun][-1]
            seen += [batch["tokens_per_update"], *begun][-1]

    def kept(self, lane: int, left_out: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The shuffled blocks of a lane that no rollback has left out."""
        for k, block in enumerate(self.blocks(lane)):
            if not any(start <= k < stop for start, stop in left_out):
                yield block

    def hashes(self, left_out: Sequence[Sequence[int]] = ()) -> Iterator[str]:
        """blocks_sha256 of each update, for ever."""
        length, batch = self.settings["data"]["sequence_length"], self.settings["batch"]
        lanes = [self.kept(lane, left_out) for lane in range(batch["lanes"])]
        for tokens in self.budgets():
            blocks = [block for lane in lanes for block in islice(lane, tokens // (length * batch["lanes"]))]
            digests = [hashlib.sha256(as_bytes(block)).digest() for block in blocks]
            yield hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def as_bytes(tokens: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)
