"""The study of update sizes: what it trains, how it reads the outcomes, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.batch.__main__ import QUICK, _higher_rates, report
from benchmarks.batch.analysis import (
    Curve,
    best_runs,
    compare,
    cost_of_a_loss,
    curve,
    fit_hyperbola,
    loss_after,
    pooled_deviation,
    roughness,
    slope,
    smoothed,
    summary,
    usable_rates,
)
from benchmarks.batch.pictures import cost_rows, curve_rows, final_rows, rate_rows, roughness_rows
from benchmarks.batch.study import PARTS, Study, best_rates, factors_of
from benchmarks.trials import NOISE, Outcome, Trial, Trials, outcome_of
from tests.helpers import run

STUDY = Study()
BEST = {size: STUDY.rate_of(size, 1.0) for size in STUDY.budgets}


def made_outcome(
    size: int, final: float, *, noise: float = 0.0, scale: float | None = None, rate: float = 5e-3
) -> Outcome:
    """A run of `STUDY.total_tokens` whose loss falls from 8 nats to `final` in a straight line over the tokens."""
    steps, draw = STUDY.total_tokens // size, random.Random(size)
    tokens = [size * step for step in range(1, steps + 1)]
    losses = [8 - (8 - final) * t / STUDY.total_tokens + draw.gauss(0, noise) for t in tokens]
    measured = {} if scale is None else {NOISE: scale, f"{NOISE}_low": scale / 2, f"{NOISE}_high": 2 * scale}
    settings = {"optimizer.learning_rate": rate}
    return {"settings": settings, "tokens": tokens, "losses": losses, "validation_loss": final, "noise": measured}


def made_study(final_of: dict[int, float], deviation: float = 0.01, **more: Any) -> dict[str, Outcome]:
    """All runs but the schedules: the middle rate is best, seeds differ by `deviation`."""
    outcomes = {}
    for size, final in final_of.items():
        for factor, worse in ((0.5, 0.1), (1.0, 0.0), (2.0, 0.05)):
            rate = STUDY.rate_of(size, factor)
            outcomes[f"rate-{size}-{factor:g}"] = made_outcome(size, final + worse, rate=rate, **more)
        for seed, sign in ((2, 1), (3, -1)):
            outcomes[f"seed-{size}-{seed}"] = made_outcome(size, final + sign * deviation, **more)
    for size in STUDY.fixed_beta2_budgets:
        outcomes[f"beta2-{size}"] = made_outcome(size, final_of[size] + (0.2 if size < 4096 else 0.0), **more)
    for size in STUDY.hot_budgets:
        outcomes[f"hot-{size}"] = made_outcome(size, final_of[size] + 1, rate=4 * BEST[size], **more)
    return outcomes


WORSE_WHEN_LARGE = {1024: 3.8, 2048: 3.79, 4096: 3.9, 8192: 4.1, 16_384: 4.5, 32_768: 5.0}


def test_the_study_is_42_runs_that_differ_in_what_they_say() -> None:
    outcomes = made_study(WORSE_WHEN_LARGE)
    trials = [trial for part in PARTS.values() for trial in part(STUDY, outcomes)]
    assert len(trials) == len({trial.name for trial in trials}) == 42
    assert [len(list(part(STUDY, outcomes))) for part in PARTS.values()] == [18, 12, 4, 2, 6]
    assert len({json.dumps(trial.settings) for trial in trials}) == 42
    assert {trial.settings["batch.lanes"] for trial in trials} == {4}
    assert not any(trial.settings["run.parity_check"] for trial in trials)
    rates = {trial.name: trial.settings["optimizer.learning_rate"] for trial in trials}
    assert rates["rate-4096-2"] == 0.01
    assert rates["rate-1024-0.5"] == pytest.approx(2.5e-3 * 0.25**0.35, rel=1e-3)
    assert rates["hot-2048"] == pytest.approx(4 * BEST[2048], rel=1e-3)
    memory = {trial.name: trial.settings.get("optimizer.beta2_half_life_tokens") for trial in trials}
    assert [name for name, tokens in memory.items() if tokens is None] == [
        f"beta2-{s}" for s in STUDY.fixed_beta2_budgets
    ]
    (steps,) = [trial for trial in trials if trial.name == "two steps-1"]
    assert steps.settings["batch.tokens_per_update"] == 2048
    assert steps.settings["batch.schedule"] == [
        {"from_tokens": 327_680, "tokens_per_update": 8192},
        {"from_tokens": 655_360, "tokens_per_update": 32_768},
    ]


def test_rates_go_on_until_the_best_is_neither_the_smallest_nor_the_largest() -> None:
    outcomes = {f"rate-4096-{factor:g}": made_outcome(4096, 3 + factor) for factor in (0.25, 0.5, 1.0, 2.0)}
    outcomes["rate-4096-0.125"] = made_outcome(4096, 3.5)
    assert factors_of(STUDY, 4096, {}) == [0.5, 1, 2]
    assert factors_of(STUDY, 4096, outcomes) == [0.125, 0.25, 0.5, 1, 2]
    assert best_rates(STUDY, outcomes) == {4096: STUDY.rate_of(4096, 0.25)}
    del outcomes["rate-4096-0.125"]
    assert factors_of(STUDY, 4096, outcomes) == [0.125, 0.25, 0.5, 1, 2], "it is asked for"
    assert best_rates(STUDY, outcomes) == {}, "and the best not known without it"
    rising = {f"rate-4096-{2.0**n:g}": made_outcome(4096, 3 - n / 10) for n in range(-1, 9)}
    assert factors_of(STUDY, 4096, rising)[-1] == STUDY.furthest[1], "no further"


def test_half_life_is_beta2_0_95_at_the_preset_s_size() -> None:
    assert 0.5 ** (4096 / STUDY.half_life_tokens) == pytest.approx(0.95, abs=1e-6)


def test_a_difference_counts_above_two_deviations_of_seeds() -> None:
    deviation = pooled_deviation([[1.0, 1.02], [3.0, 3.0, 3.06], [5.0], [math.inf, 1.0]])
    assert deviation == pytest.approx(math.sqrt((2e-4 + 2.4e-3) / 3)), "(n - 1)-weighted; single values say nothing"
    assert compare([4.0], [4.1], 0.04) == -1
    assert compare([4.1, 4.1], [4.0], 0.04) == 1
    assert compare([4.0], [4.07], 0.04) == 0, "no more than two"
    assert compare([math.inf], [4.0], 0.04) == 1
    assert compare([4.0], [math.inf], 0.04) == -1
    assert compare([4.0], [5.0], None) is None, "without seeds nothing is claimed"


def test_smoothed_losses_are_means_over_as_many_tokens() -> None:
    of = Curve(updates=[1, 2, 3, 4], tokens=[10, 20, 30, 40], losses=[8.0, 6.0, 4.0, 2.0])
    assert smoothed(of, 20) == [8.0, 7.0, 5.0, 3.0]
    assert smoothed(of, 5) == of.losses
    assert loss_after(of, 3) == 6.0
    assert loss_after(of, 5) is None
    assert curve({"tokens": [10, 20], "losses": [None, 1.0]}) == Curve([2], [20], [1.0])


def test_roughness_finds_the_deviation_and_not_the_trend() -> None:
    draw = random.Random(0)
    losses = [8 - 0.001 * step + draw.gauss(0, 0.1) for step in range(4000)]
    of = Curve(list(range(4000)), list(range(4000)), losses)
    assert roughness(of) == pytest.approx(0.1, rel=0.05)
    assert roughness(replace(of, losses=[8 - 0.001 * step for step in range(4000)])) == pytest.approx(0, abs=1e-9)
    assert roughness(replace(of, losses=[1.0, 2.0, 3.0])) is None
    assert slope([(1, 1), (4, 0.5), (16, 0.25)]) == pytest.approx(-0.5)
    assert slope([(1, 1)]) is None
    rows = roughness_rows({1024: 0.4, 4096: 0.2})
    assert [row["expected"] for row in rows] == pytest.approx([0.4, 0.2])


def test_the_hyperbola_through_its_own_points() -> None:
    """(S / 100 - 1)(E / 200,000 - 1) = 1: a critical batch of 2,000 tokens."""
    points = [(100 * (1 + 2000 / size), 200_000 * (1 + size / 2000)) for size in (500, 2000, 8000)]
    found = fit_hyperbola(points)
    assert found == pytest.approx(
        {"least_updates": 100, "least_tokens": 200_000, "critical_tokens": 2000, "misfit": 0}, abs=1e-9
    )
    assert fit_hyperbola(points[:2]) is None
    assert fit_hyperbola([(100, 1e5), (200, 2e5), (400, 4e5)]) is None, "all of one size"
    cost = {"loss": 4.0, "points": [{"budget": 1, "updates": s, "tokens": e} for s, e in points], "hyperbola": found}
    _, line, rays = cost_rows(cost, {"tokens": 500.0, "low": 250.0, "high": math.inf})
    assert all((row["updates"] / 100 - 1) * (row["tokens"] / 200_000 - 1) == pytest.approx(1) for row in line)
    assert [row["what"] for row in rays[::2]] == ["critical batch of the hyperbola", "measured noise scale", "its band"]
    assert [row["tokens"] / row["updates"] for row in rays] == pytest.approx([2000, 2000, 500, 500, 250, 250])
    assert cost_rows({"loss": None, "points": [], "hyperbola": None}, None) == ([], [], [])


def test_what_each_size_needs_to_the_loss_that_all_reach() -> None:
    outcomes = made_study(dict.fromkeys(STUDY.budgets, 4.0))
    cost = cost_of_a_loss(STUDY, best_runs(STUDY, outcomes))
    assert [point["budget"] for point in cost["points"]] == list(STUDY.budgets)
    assert cost["loss"] == pytest.approx(4.0, abs=0.15)
    for point in cost["points"]:  # as many tokens, so as many fewer updates as they are larger
        assert point["tokens"] == pytest.approx(STUDY.total_tokens, rel=0.05)
        assert point["updates"] == pytest.approx(point["tokens"] / point["budget"], rel=0.01)


def test_the_largest_rate_that_loses_nothing_is_at_least_the_largest_that_was_tried() -> None:
    outcomes = made_study(WORSE_WHEN_LARGE)
    assert best_rates(STUDY, outcomes) == BEST
    strict = usable_rates(STUDY, outcomes, 0.01)
    assert {size: rate for size, (rate, _) in strict.items()} == BEST
    loose = usable_rates(STUDY, outcomes, 0.03)
    assert loose[2048] == (STUDY.rate_of(2048, 2.0), False), "four times the best was tried, and is worse"
    assert loose[4096] == (STUDY.rate_of(4096, 2.0), True)
    assert usable_rates(STUDY, outcomes, None) == {}


def test_rows_of_the_pictures() -> None:
    outcomes = made_study(WORSE_WHEN_LARGE)
    assert len(final_rows(STUDY, outcomes)) == 6 * 3 + 4
    assert {row["rule"] for row in final_rows(STUDY, outcomes)} == {
        "beta2 by half-life in tokens",
        "beta2 0.95 for all",
    }
    lines = curve_rows(STUDY, outcomes)
    ends = {row["budget"]: row for row in lines}
    assert {size: row["updates"] for size, row in ends.items()} == {
        f"{size:,}": STUDY.total_tokens // size for size in STUDY.budgets
    }
    assert {row["tokens"] for row in ends.values()} == {STUDY.total_tokens}
    assert max(sum(row["budget"] == size for row in lines) for size in ends) <= 140
    assert len(rate_rows(STUDY, outcomes)) == 6 * 3 + 2
    outcomes["hot-2048"]["validation_loss"] = None
    assert len(rate_rows(STUDY, outcomes)) == 6 * 3 + 1, "one that diverged is no point"


def page(outcomes: dict[str, Outcome]) -> str:
    return report(STUDY, outcomes, summary(STUDY, outcomes))


def test_the_page_says_what_the_rule_says_whichever_way_it_comes_out() -> None:
    worse = page(made_study(WORSE_WHEN_LARGE, noise=0.05, scale=5000.0))
    assert "equal tokens **false**" in worse
    assert "equal to the best by the rule: 1,024, 2,048;" in worse
    assert "5,000 (2,500 to 10,000)" in worse
    assert "The signal is 0.2 at 1,024 and 6.6 at 32,768 tokens times the noise." in worse
    assert "Higher stable rates: true, up to 32,768 tokens" in worse
    falling = {size: (4e-3 / 2**place, size == 1024) for place, size in enumerate(STUDY.budgets)}
    assert "stable rates: false.**" in _higher_rates(STUDY, {}, {"usable_rates": falling, "best_rates": {}})
    rising = {size: (4e-3 * 2**place, size == 1024) for place, size in enumerate(STUDY.budgets)}
    assert "not determined, since at 1,024" in _higher_rates(STUDY, {}, {"usable_rates": rising, "best_rates": {}})
    assert "4.000, worse |" in worse, "beta2 fixed at small sizes"
    endless = made_study(WORSE_WHEN_LARGE, scale=5000.0)
    for outcome in endless.values():
        outcome["noise"][f"{NOISE}_high"] = None
    assert "5,000 (above 2,500)" in page(endless)
    better = page(made_study(dict(zip(STUDY.budgets, reversed(WORSE_WHEN_LARGE.values()), strict=True))))
    assert "equal tokens **true**" in better
    middle = page(made_study({1024: 4.0, 2048: 3.9, 4096: 3.8, 8192: 3.8, 16_384: 3.9, 32_768: 4.0}))
    assert "equal tokens **neither the smallest nor the largest is best**" in middle
    equal = page(made_study(dict.fromkeys(STUDY.budgets, 4.0)))
    assert "equal tokens **no difference**" in equal
    no_seeds = {name: of for name, of in made_study(WORSE_WHEN_LARGE).items() if not name.startswith("seed")}
    assert "equal tokens **not determined**" in page(no_seeds)
    assert "It was not measured in these runs." in page(no_seeds)


def test_a_run_that_diverged_is_infinitely_bad_and_no_traceback() -> None:
    outcomes = made_study(WORSE_WHEN_LARGE)
    outcomes["hot-32768"] |= {"validation_loss": None, "losses": [None] * 30}
    outcomes["rate-1024-2"] = {
        **outcomes["rate-1024-2"],
        **outcome_of([]),
        "settings": {"optimizer.learning_rate": 1.0},
    }
    text = page(outcomes)
    assert "Four times the best rate at 32,768 tokens: it diverged." in text
    assert "| 3.900 | 3.800 | inf |" in text


def test_what_is_kept_of_a_ledger() -> None:
    lines = [
        {"update": 0, "tokens": 0, "loss": None, "validation/held_out/loss": 7.6},
        {"update": 1, "tokens": 8, "loss": 7.123456, "validation/held_out/loss": None, "update_seconds": 2.5},
        {"update": 2, "tokens": 16, "loss": 7.0, "validation/held_out/loss": 6.9, NOISE: 100.0, f"{NOISE}_high": None},
    ]
    assert outcome_of(lines) == {
        "tokens": [8, 16],
        "losses": [7.12346, 7.0],
        "validation_loss": 6.9,
        "noise": {NOISE: 100.0, f"{NOISE}_high": None},
        "train_seconds": 2.5,
    }


def test_an_outcome_counts_only_with_its_settings(tmp_path: Path) -> None:
    results, (trial, *_) = Trials("benchmarks/plain.yaml", tmp_path), PARTS["rates"](STUDY, {})
    assert results.read(trial) is None
    (tmp_path / f"{trial.name}.json").write_text(json.dumps({"settings": trial.settings}))
    assert results.read(trial) is not None
    assert results.read(Trial(trial.name, {**trial.settings, "run.seed": 9})) is None


def trained(output: str) -> list[str]:
    """The trials whose lines are there."""
    return re.findall(r"^\w+ \d+/\d+: ([^,]+), [\d.]+ nats, \d+ s$", output, re.MULTILINE)


@pytest.mark.slow
def test_the_study_goes_on_where_it_was_stopped_and_writes_its_page(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.batch", "--quick", "--runs", str(runs), "--out", str(out)]
    early = run([*command, "--only", "seeds"])
    assert (early.returncode, early.stderr.count("\n")) == (2, 1)
    assert "run --only rates first" in early.stderr
    done = run(command, timeout=1500)
    assert done.returncode == 0, done.stderr
    trials = 9 + 6 + 1 + 1 + 3
    assert len(trained(done.stdout)) == trials
    assert len(list(runs.glob("*.json"))) == trials
    assert not list(runs.glob("*.run"))
    (runs / "seed-512-2.json").unlink()
    again = run(command, timeout=300)
    assert again.returncode == 0, again.stderr
    assert trained(again.stdout) == ["seed-512-2"]
    (page,) = out.glob("*-batch.md")
    assert "## Sizes that grow" in page.read_text(encoding="utf-8")
    values = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(values["summary"]["finals"]) == {str(size) for size in QUICK.budgets}
    assert all(math.isfinite(loss) for of in values["summary"]["finals"].values() for loss in of)
    assert (page.with_suffix(".png")).stat().st_size > 10_000
    (curves,) = out.glob("*-batch-curves.png")
    assert curves.stat().st_size > 10_000
