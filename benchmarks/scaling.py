"""How well runs scale over ranks, by the plan's model: `python -m benchmarks.scaling`, seconds, and no GPU.

Three runs on 8 to 512 H100 behind two networks, in the largest micro-batches that fit; and an update of 134 M tokens on 1 to
65,536 ranks, of which every block of every micro-batch is counted. A model, no measurement: docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.results import command_line, table, write_result
from recipe.commands.plan import planned
from recipe.errors import RecipeError, run_command
from recipe.format import percent
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import LINK_SHARE, RANKS_OF_A_HOST
from recipe.plan.scaling import WAYS
from recipe.report.charts import library

GPU = "h100"
GPUS = (8, 16, 32, 64, 128, 256, 512)
FOUR_MILLION = {"batch.tokens_per_update": 4_194_304, "batch.lanes": 2048}
RUNS = {
    "1.3B, 524,288 tokens": {"batch.lanes": 256},
    "1.3B, 4,194,304 tokens": FOUR_MILLION,
    "7B, 4,194,304 tokens": {"model.n_layer": 32, "model.n_embd": 4096, "model.n_head": 32, **FOUR_MILLION},
}
# Bus bandwidth between hosts: of an adapter of 400 Gb/s for each GPU, which the plan assumes, and of one for each host
NETWORKS = {"320 GB/s": None, "40 GB/s": LINK_SHARE * 50}  # --link_gb_per_second
COVERED = UpdatePlan(tokens_per_update=2**27, sequence_length=2048, lanes=2**16, world_size=1, micro_batch_size=4)
# `busy`: busy share, and blocks of a GPU; of each way: efficiency, and blocks of a micro-batch, or None if it does not fit
Found = Mapping[str, tuple[float, int] | None]
Models = Mapping[str, Mapping[str, Mapping[int, Found]]]  # by network, run and GPUs
RANKS = (1, 7, 8, 63, 64, 512, 1000, 4096, 10_000, 32_768, 40_000, 65_535, 65_536)


def modelled(run: str, gpus: int, link_gb_per_second: float | None) -> Found:
    """What the plan says of a run on so many GPUs; nothing if there are more of them than blocks."""
    settings: dict[str, object] = {**RUNS[run], "batch.micro_batch_size": "auto", "device": GPU, "world_size": gpus}
    settings["performance.sharding"] = "full"  # of the plan, since DDP does not hold 7B; the model has all ways
    if link_gb_per_second and gpus > RANKS_OF_A_HOST:
        settings["link_gb_per_second"] = link_gb_per_second
    if gpus > RUNS[run]["batch.lanes"]:
        return {}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    tables = json.loads(planned(["--config", "configs/gpt2-1.3b.yaml", *flags, "--json"]))
    numbers = {key: number["value"] for table in ("plan", "scaling_model") for key, number in tables[table].items()}
    found: dict[str, Any] = {"busy": (numbers["busy_share"], -(-numbers["blocks_per_update"] // gpus))}
    for way in WAYS:
        fits = numbers[f"{way}_efficiency"] is not None
        found[way] = (numbers[f"{way}_efficiency"], numbers[f"{way}_micro_batch_size"]) if fits else None
    return found


def covered(ranks: int) -> dict[str, Any]:
    """What an update of `COVERED` is on so many ranks, after every block of every rank was seen once, and in order.

    Raises:
        RecipeError: a block was not, or a rank has another number of steps.
    """
    update = replace(COVERED, world_size=ranks)
    seen, steps = 0, update.gradient_accumulation_steps
    for rank in range(ranks):
        micro_batches = update.micro_batches(rank)
        for blocks in micro_batches:
            if blocks.start != seen:
                raise RecipeError(f"rank {rank} of {ranks}: a micro-batch begins at block {blocks.start}, not {seen}")
            seen = blocks.stop
        if len(micro_batches) != steps:
            raise RecipeError(f"rank {rank} of {ranks} has {len(micro_batches)} steps instead of {steps}")
    if seen != update.blocks_per_update:
        raise RecipeError(f"{ranks} ranks have {seen} blocks instead of {update.blocks_per_update}")
    return {"steps": steps, "largest share": update.largest_share, "busy": update.busy_share}


def chart(models: Models) -> Any:
    """Efficiency over GPUs: a panel for each run and network, a line for each way."""
    import altair as alt
    import pandas as pd

    panels = []
    for network, runs in models.items():
        for run, of_run in runs.items():
            points = [
                {"GPUs": gpus, "way": way, "efficiency": pair[0]}
                for gpus, found in of_run.items()
                for way in WAYS
                if (pair := found.get(way))
            ]
            lines = (
                alt.Chart(pd.DataFrame(points))
                .mark_line(point=True, strokeWidth=2, opacity=0.8)
                .encode(
                    alt.X(
                        "GPUs:Q",
                        scale=alt.Scale(type="log", base=2, domain=[8, 512]),
                        axis=alt.Axis(values=list(GPUS), labelOverlap=False, labelFlush=False),
                    ),
                    alt.Y("efficiency:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"), title=None),
                    alt.Color("way:N", sort=list(WAYS), title=None),
                    alt.StrokeDash("way:N", sort=list(WAYS), legend=None),
                )
            )
            panels.append(
                lines.properties(title=alt.Title(run, subtitle=f"{network} between hosts"), width=250, height=200)
            )
    return alt.concat(*panels, columns=len(RUNS))


def report(models: Models, coverage: Sequence[Any]) -> str:
    """Markdown, for `benchmarks.results.write_result`."""

    def cell(found: Found, name: str) -> str:
        if not found:
            return "no block left"
        pair = found[name]
        return f"{percent(pair[0])} ({pair[1]})" if pair else "does not fit"

    sections = []
    for run in RUNS:
        rows = [
            {
                "GPUs": str(gpus),
                "busy": cell(next(iter(models.values()))[run][gpus], "busy"),
                **{f"{way}, {network}": cell(of[run][gpus], way) for network, of in models.items() for way in WAYS},
            }
            for gpus in GPUS
        ]
        sections.append(f"## {run}\n\n{table(rows)}")
    tokens, lanes = COVERED.tokens_per_update, COVERED.lanes
    return f"""How runs scale, by a model

A model, no measurement: the share of the time of an update in which GPUs compute, on {GPU.upper()}, {RANKS_OF_A_HOST} in a host
with 360 GB/s, at 40 % MFU, in the largest micro-batches that fit, their blocks in brackets. Between hosts 320 GB/s, of an
adapter of 400 Gb/s for each GPU, or 40 GB/s, of one for each host. `busy` is the share without the time of any link, with
the blocks of a GPU in brackets.

{chr(10).join(sections)}
## An update of {tokens:,} tokens in {lanes:,} lanes

Every block of every micro-batch of every rank was counted: each exactly once, in order, and all ranks have as many steps.

{table(coverage)}"""


def main() -> None:
    options = command_line("scaling", __doc__).parse_args()
    library()  # before anything is computed
    models = {
        network: {run: {gpus: modelled(run, gpus, link) for gpus in GPUS} for run in RUNS}
        for network, link in NETWORKS.items()
    }
    counted = {ranks: covered(ranks) for ranks in (RANKS[:6] if options.quick else RANKS)}
    rows = [
        {
            "ranks": f"{ranks:,}",
            "steps": f"{found['steps']:,}",
            "largest share, blocks": f"{found['largest share']:,}",
            "busy": percent(found["busy"]),
        }
        for ranks, found in counted.items()
    ]
    values = {"efficiency": models, "coverage": counted}
    write_result("scaling", options, values, report(models, rows), chart(models))


if __name__ == "__main__":
    run_command(main)
