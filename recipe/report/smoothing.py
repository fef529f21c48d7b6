"""Long columns made short enough to look at."""

from __future__ import annotations

import numpy as np


def thin(values: np.ndarray, buckets: int) -> np.ndarray:
    """Rows of the smallest and the largest finite value of each of `buckets` equal parts, so that no spike is lost.

    Also the first and the last. All finite rows where there are no more than two for each bucket.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= 2 * buckets:
        return finite
    rows = [finite[:1], finite[-1:]]
    for bucket in np.array_split(finite, buckets):
        rows.append(bucket[[values[bucket].argmin(), values[bucket].argmax()]])
    return np.unique(np.concatenate(rows))


def smoothing_window(values: np.ndarray) -> int:
    """Updates that a smoothed curve takes together: a twentieth of the run, 200 at most, an odd number."""
    return min(int(np.isfinite(values).sum()) // 20, 200) // 2 * 2 + 1


def running_median(values: np.ndarray, window: int, rows: np.ndarray) -> np.ndarray:
    """Median of the finite values among the `window` around each of `rows`, fewer at both ends; NaN where there is none."""
    medians = []
    for row in rows.tolist():
        around = values[max(0, row - window // 2) : row + window // 2 + 1]
        around = around[np.isfinite(around)]
        medians.append(np.median(around) if len(around) else np.nan)
    return np.array(medians)
