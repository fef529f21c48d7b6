"""Chance as a function of what it is for, so that no random state has to be saved."""

from __future__ import annotations

from hashlib import sha256

import torch


def seed_torch(*key: str | int) -> None:
    """Seed torch's generators, on all devices, by a hash of the key."""
    torch.manual_seed(int.from_bytes(sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1)


def seed_dropout(seed: int, update: int, rank: int) -> None:
    """Ranks draw differently: each has other blocks."""
    seed_torch("dropout", seed, update, rank)


def seed_rounding(seed: int, steps: int) -> None:
    """Ranks draw alike: all have the same parameters."""
    seed_torch("rounding", seed, steps)
