"""The pictures of the study, and the rows that they draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.batch.analysis import SMOOTH_SHARE, best_runs, curve, smoothed
from benchmarks.batch.study import Study, factors_of, rate_name
from benchmarks.trials import Outcome, final_loss

Rows = list[dict[str, Any]]
POINTS_OF_A_CURVE = 120  # a line of more has the same look


def final_rows(study: Study, outcomes: Mapping[str, Outcome]) -> Rows:
    """(a) Final loss of every seed, with beta2's memory in tokens kept, and with beta2 fixed."""
    rows: Rows = [
        {"budget": budget, "loss": final_loss(run), "rule": "beta2 by half-life in tokens"}
        for budget, of in best_runs(study, outcomes).items()
        for run in of
    ]
    fixed = {budget: outcomes.get(f"beta2-{budget}") for budget in study.fixed_beta2_budgets}
    name = f"beta2 {study.fixed_beta2:g} for all"
    rows += [{"budget": budget, "loss": final_loss(run), "rule": name} for budget, run in fixed.items() if run]
    return [row for row in rows if math.isfinite(row["loss"])]


def curve_rows(study: Study, outcomes: Mapping[str, Outcome]) -> Rows:
    """(b), (c) The smoothed loss of each size, of its first seed, by tokens and by updates."""
    rows = []
    for budget, (first, *_) in best_runs(study, outcomes).items():
        of = curve(first)
        points = list(zip(of.updates, of.tokens, smoothed(of, SMOOTH_SHARE * study.total_tokens), strict=True))
        every = max(1, len(points) // POINTS_OF_A_CURVE)
        kept = points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])
        rows += [{"budget": f"{budget:,}", "updates": u, "tokens": t, "loss": loss} for u, t, loss in kept]
    return rows


def cost_rows(cost: Mapping[str, Any], noise: Mapping[str, float] | None) -> tuple[Rows, Rows, Rows]:
    """(d) What each size needed, the hyperbola through them, and lines of one size: the hyperbola's and the noise scale's."""
    points, hyperbola = cost["points"], cost["hyperbola"]
    if not points:
        return [], [], []
    most = max(point["updates"] for point in points)
    line, rays = [], []
    if hyperbola:
        least = hyperbola["least_updates"]
        steps = [least * (1.03 * (most / least / 1.03) ** (i / 60)) for i in range(61)]
        line = [{"updates": s, "tokens": hyperbola["least_tokens"] / (1 - least / s)} for s in steps]
        line = [row for row in line if row["tokens"] < 1.5 * max(point["tokens"] for point in points)]
    few, many = min(point["tokens"] for point in points) * 0.9, max(point["tokens"] for point in points) * 1.1
    sizes = [("critical batch of the hyperbola", hyperbola["critical_tokens"])] if hyperbola else []
    if noise:
        sizes.append(("measured noise scale", noise["tokens"]))
        sizes += [("its band", noise[end]) for end in ("low", "high") if 0 < noise[end] < math.inf]
    for what, size in sizes:
        rays += [{"what": what, "line": size, "updates": t / size, "tokens": t} for t in (few, many)]
    return points, line, rays


def roughness_rows(roughness: Mapping[int, float]) -> Rows:
    """(e) Roughness against 1 / sqrt(B), and the line of slope 1 through it: their root mean square ratio."""
    if not roughness:
        return []
    factor = math.exp(sum(math.log(value * math.sqrt(size)) for size, value in roughness.items()) / len(roughness))
    return [
        {"budget": size, "inverse_root": size**-0.5, "roughness": value, "expected": factor * size**-0.5}
        for size, value in sorted(roughness.items())
    ]


def rate_rows(study: Study, outcomes: Mapping[str, Outcome]) -> Rows:
    """(f) Final loss against the rate, of each size."""
    rows = []
    for budget in study.budgets:
        names = [rate_name(budget, factor) for factor in factors_of(study, budget, outcomes)] + [f"hot-{budget}"]
        for run in (outcomes[name] for name in names if name in outcomes):
            rate, loss = run["settings"]["optimizer.learning_rate"], final_loss(run)
            rows.append({"budget": f"{budget:,}", "rate": rate, "loss": loss})
    return [row for row in rows if math.isfinite(row["loss"])]


def pictures(study: Study, outcomes: Mapping[str, Outcome], found: Mapping[str, Any]) -> dict[str, Any]:
    """`curves` for README: the same runs by tokens and by updates; `all`: the six of the page."""
    import altair as alt
    import pandas

    order = [f"{budget:,}" for budget in study.budgets]
    below = alt.Legend(orient="bottom", labelFontSize=12, titleFontSize=12)
    size = alt.Color("budget:N", sort=order, title="tokens per update", scale=alt.Scale(scheme="viridis"), legend=below)
    log = alt.Scale(type="log", nice=False, padding=12)
    nats = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False))
    by_size = alt.X("budget:Q", title="tokens per update", scale=log, axis=alt.Axis(values=list(study.budgets)))

    def of(rows: Rows, title: str, subtitle: str) -> alt.Chart:
        heading = alt.Title(title, subtitle=subtitle)
        return alt.Chart(pandas.DataFrame(rows)).properties(title=heading, width=400, height=280)

    def curves() -> list[Any]:
        lines = of(
            curve_rows(study, outcomes), "By tokens", "training loss of each size with its best rate"
        ).mark_line()
        by_updates = lines.encode(alt.X("updates:Q", title="updates", scale=log), nats, size)
        return [
            lines.encode(alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(format="~s")), nats, size),
            by_updates.properties(title=alt.Title("By updates", subtitle="the same runs")),
        ]

    final = of(final_rows(study, outcomes), "After as many tokens", "validation loss, a point for each seed")
    rule = alt.Color("rule:N", title=None, scale=alt.Scale(scheme="category10"), legend=below)
    panels = [final.mark_point(filled=True, size=60).encode(by_size, nats, rule), *curves()]
    points, line, rays = cost_rows(found["cost"], _all_noise(found["noise"]))
    if points:
        x = alt.X("updates:Q", scale=log, title="updates")
        y = alt.Y("tokens:Q", scale=log, title="tokens", axis=alt.Axis(format="~s"))
        base = of(
            points, f"To {found['cost']['loss']:.2f} nats", "updates and tokens of each size; the line is a hyperbola"
        )
        label = {"text": alt.Text("budget:Q", format=","), "x": x, "y": y}
        layers = [
            base.mark_point(filled=True, size=70).encode(x, y),
            base.mark_text(dx=6, dy=-10, align="left").encode(**label),
        ]
        if line:
            layers.append(alt.Chart(pandas.DataFrame(line)).mark_line(clip=True).encode(x, y))
        if rays:
            what = alt.StrokeDash("what:N", title=None, legend=below)
            lines = alt.Chart(pandas.DataFrame(rays)).mark_line(opacity=0.7, clip=True)
            layers.append(lines.encode(x, y, what, detail="line:N"))
        panels.append(alt.layer(*layers))
    if rough := roughness_rows(found["roughness"]):
        x = alt.X("inverse_root:Q", title="1 / sqrt(tokens per update)", scale=log)
        base = of(rough, "Smoothness", "deviation of an update's loss from its trend; the line falls as 1 / sqrt")
        dots = base.mark_point(filled=True, size=70).encode(x, alt.Y("roughness:Q", scale=log, title="nats"))
        panels.append(dots + base.mark_line(strokeDash=[4, 3]).encode(x, alt.Y("expected:Q", scale=log)))
    rates = of(rate_rows(study, outcomes), "Learning rates", "validation loss, one seed").mark_line(point=True)
    panels.append(rates.encode(alt.X("rate:Q", title="peak learning rate", scale=log), nats, size))
    apart: dict[str, Any] = {"color": "independent", "strokeDash": "independent"}
    rows = [alt.hconcat(*panels[i : i + 2], spacing=40).resolve_scale(**apart) for i in range(0, len(panels), 2)]
    return {"all": alt.vconcat(*rows, spacing=30).resolve_scale(**apart), "curves": alt.hconcat(*curves(), spacing=40)}


def _all_noise(noise: Mapping[int, Mapping[str, float] | None]) -> Mapping[str, float] | None:
    """The scale of the middle size that has one: it does not depend on the size."""
    measured = [of for of in noise.values() if of]
    return measured[len(measured) // 2] if measured else None
