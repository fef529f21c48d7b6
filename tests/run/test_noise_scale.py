"""The gradient noise scale from known gradients: unbiased, inside its interval as often as it says, resumed exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from recipe.config.settings import Config
from recipe.run.ledger import LedgerEntry
from recipe.run.noise_scale import GroupSums, NoiseColumns, Smoothed, student
from recipe.step.frozen_noise import from_products
from tests.support.runs import make_run

DIMENSIONS = 64
_DEVIATIONS = 1 / np.sqrt(np.arange(1, DIMENSIONS + 1))
DEVIATIONS = _DEVIATIONS / np.linalg.norm(_DEVIATIONS)  # of a block's gradient: variances 1/i, their sum is 1


def draw(random: np.random.Generator, blocks: int, scale: float) -> np.ndarray:
    """Gradients of blocks whose noise scale is `scale` blocks; some are many times as large as others, as text has them."""
    sizes = np.exp(0.6 * random.standard_normal(blocks) - 0.6**2)[:, None]
    noise = DEVIATIONS * random.standard_normal((blocks, DIMENSIONS))
    return sizes * noise + math.sqrt(1 / scale / DIMENSIONS)


def measure(gradients: np.ndarray, cuts: list[int], sampled: list[int], ranks: int) -> dict[str, float]:
    """The columns of an update of these blocks, one target each, in groups from cut to cut."""
    sums, sizes = np.add.reduceat(gradients, cuts[:-1]), np.diff(cuts)
    targets = len(gradients)
    squares = (sums**2).sum(axis=1) * (ranks / targets) ** 2 / sizes  # as hooks see them
    groups = GroupSums(squares[sampled].sum(), sizes[sampled].sum(), len(sampled), squares[0], sizes[0])
    return groups.columns(float(np.linalg.norm(gradients.mean(axis=0))), targets, ranks)


@pytest.mark.parametrize(("cuts", "sampled"), [([0, 3, 5, 12, 16], [0, 1, 2, 3]), ([0, 1, 7, 9, 16], [0, 2])])
def test_both_estimates_are_right_in_the_mean_for_unequal_groups_and_a_sample_of_them(
    cuts: list[int], sampled: list[int]
) -> None:
    """Also the one from the first group; of 2,000 updates, within 4 standard errors of the mean."""
    random = np.random.default_rng(0)
    found = [measure(draw(random, 16, 10.0), cuts, sampled, ranks=2) for _ in range(2000)]
    for column, truth in (("noise_s2", 1.0), ("noise_first_s2", 1.0), ("noise_g2", 0.1)):
        values = np.array([columns[column] for columns in found])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), column
    first, all_groups = (np.std([c[name] for c in found]) for name in ("noise_first_s2", "noise_s2"))
    assert first > 1.2 * all_groups, "what the hooks are for"


@pytest.mark.parametrize(("scale", "updates"), [(10.0, 4), (10.0, 40), (150.0, 40)])
def test_the_interval_holds_the_truth_as_often_as_it_says(scale: float, updates: int) -> None:
    """200 runs of updates of 16 blocks: 95 %, less 2 % for heavy tails, give or take what 200 runs can tell (5 %)."""
    random, cuts = np.random.default_rng(1), [0, 4, 8, 12, 16]
    inside = open_ended = 0
    for _ in range(200):
        smoothed = Smoothed()
        for update in range(1, updates + 1):
            columns = measure(draw(random, 16, scale), cuts, [0, 1, 2, 3], ranks=1)
            smoothed = smoothed.add(update, columns["noise_s2"], columns["noise_g2"], half_life_tokens=8)
        found = smoothed.scale()
        assert found is not None
        inside += (found.low or math.inf) <= scale <= (found.high or math.inf)
        open_ended += found.high is None
    assert 0.88 <= inside / 200 <= 0.98
    if scale == 150:
        assert open_ended > 20, "an update is a tenth of the scale: often all that is known is a lower end"
    elif updates == 40:
        assert open_ended == 0


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_the_interval_at_frozen_weights_holds_the_truth_as_often_as_it_says(scale: float) -> None:
    random, inside = np.random.default_rng(2), 0
    for _ in range(300):
        gradients = draw(random, 128, scale)
        noise = from_products((gradients**2).sum(axis=1), gradients @ gradients.sum(axis=0), tokens=1)
        inside += (noise.scale.low or math.inf) <= scale <= (noise.scale.high or math.inf)
    assert 0.90 <= inside / 300 <= 0.99


def test_the_mean_of_ratios_would_be_wrong() -> None:
    """Which is why both means are taken first: at an update of a quarter of the scale."""
    random = np.random.default_rng(3)
    found = [measure(draw(random, 16, 64.0), [0, 4, 8, 12, 16], [0, 1, 2, 3], ranks=1) for _ in range(500)]
    s2, g2 = (np.array([columns[name] for columns in found]) for name in ("noise_s2", "noise_g2"))
    assert s2.mean() / g2.mean() == pytest.approx(64, rel=0.2)
    assert abs(np.median(s2 / g2) - 64) > 15


def test_students_quantile() -> None:
    for degrees, quantile in ((2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)):
        assert student(degrees) == pytest.approx(quantile, rel=0.05 if degrees == 2 else 0.01)


def test_columns_go_on_exactly_leave_out_what_is_skipped_and_say_when_nothing_is_known() -> None:
    run = make_run(Config())
    measured = [
        LedgerEntry(
            n, 524_288 * n, 3.0, 1.0, target_tokens=524_288, noise_s2=1e5 + 1e4 * (n % 3), noise_g2=0.5 + n / 10
        )
        for n in range(1, 13)
    ]
    measured[4] = replace(measured[4], loss=math.nan)  # skipped
    measured[6] = replace(measured[6], noise_s2=None, noise_g2=None)  # one group, or not measured
    whole = NoiseColumns(run)
    entries = [whole.add_to(entry) for entry in measured]
    assert [e.gradient_noise_scale_tokens is None for e in entries] == [n in (0, 1, 4, 6) for n in range(12)]
    begun = NoiseColumns(run)
    for entry in measured[:8]:
        begun.add_to(entry)
    resumed = NoiseColumns(run, begun.sums)
    assert [resumed.add_to(entry) for entry in measured[8:]] == entries[8:]
    last = entries[-1]
    assert last.gradient_noise_scale_tokens
    assert last.gradient_noise_scale_tokens_low
    assert last.gradient_noise_scale_tokens_low < last.gradient_noise_scale_tokens
    assert last.gradient_snr == pytest.approx(524_288 / last.gradient_noise_scale_tokens)
    assert last.expected_cosine == pytest.approx((1 + last.gradient_noise_scale_tokens / 524_288) ** -0.5)
    assert NoiseColumns(run).sums == []

    unknown = NoiseColumns(run)
    for entry in measured[:4]:
        last = unknown.add_to(replace(entry, noise_g2=-0.1 if entry.update % 2 else 0.09))
    assert last.gradient_noise_scale_tokens is last.gradient_noise_scale_tokens_high is last.gradient_snr is None
    assert last.gradient_noise_scale_tokens_low, "above this"


def test_one_group_has_no_noise() -> None:
    columns = GroupSums(1.0, 64.0, 1.0, 1.0, 64.0).columns(1.0, 64, 1)
    assert columns == {"noise_s2": None, "noise_g2": None, "noise_groups": 1, "noise_first_s2": None}
    columns = GroupSums(0.0, 0.0, 0.0, 0.0, 0.0).columns(1.0, 64, 1)
    assert columns["noise_groups"] is None, "not measured"


def test_an_older_update_counts_half_after_each_half_life() -> None:
    smoothed = Smoothed().add(100, 4.0, 1.0, 50.0).add(150, 8.0, 3.0, 50.0)
    assert (smoothed.s2, smoothed.g2, smoothed.weight) == (10.0, 3.5, 1.5)
    assert smoothed.tokens == 150
