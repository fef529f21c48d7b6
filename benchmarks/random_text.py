"""A random text. Imports no torch, since a peer's first update is timed from the start of its process."""

from __future__ import annotations

import numpy as np


def random_block(number: int, vocabulary: int, sequence_length: int) -> np.ndarray:
    """Block `number` of independent tokens, int32 [sequence_length + 1]."""
    return np.random.default_rng(number).integers(vocabulary, size=sequence_length + 1, dtype=np.int32)
