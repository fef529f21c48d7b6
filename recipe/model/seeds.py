"""Random numbers as a function of what they are for, so that no random state has to be saved."""

from hashlib import sha256

import torch


def seed_dropout(seed: int, update: int, rank: int) -> None:
    """Seed dropout, differently on each rank, since each has other blocks."""
    _seed_torch("dropout", seed, update, rank)


def seed_rounding(seed: int, steps: int) -> None:
    """Seed the rounding to bf16, alike on all ranks, since all have the same parameters."""
    _seed_torch("rounding", seed, steps)


def _seed_torch(*key: str | int) -> None:
    """Seed torch's generators, on all devices, by a hash of the key."""
    torch.manual_seed(int.from_bytes(sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1)
