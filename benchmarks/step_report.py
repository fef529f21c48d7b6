"""The result of `benchmarks.step` as Markdown, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.limit import attention_flops, linear_flops
from benchmarks.measure import circumstances, ratio, spread, table
from benchmarks.worker import Setting
from recipe.config.settings import ModelConfig
from recipe.plan.run_plan import flops_per_token
from recipe.report.charts import library, theme

OURS, PRODUCTS = "this recipe", "matrix products alone"
RANK_STEPS = 2  # micro-batches of an update in the comparison of ranks
Result = dict[str, Any]


def report(result: Result, picture_name: str) -> str:
    """Markdown."""
    setting = Setting(**{**result["setting"], "nanogpt": ""})
    sections = result["sections"]
    texts = [WRITERS[name](sections[name], setting) for name in sections]
    return f"""# What an update costs ({result["machine"]["time_utc"][:10]})

`{result["command"]}` at {circumstances(result["machine"])}.

{setting.n_layer} layers x {setting.n_embd} wide, {setting.n_head} heads, vocabulary {setting.vocabulary:,}; updates of \
{setting.steps} micro-batches x {setting.micro_batch_size} blocks x {setting.sequence_length} tokens, in fp32; threads of a
process: {setting.threads}. A table says where it is otherwise.
Every training is a process of its own, with the same random tokens. They take turns, update by update, in another order each
round, and wait without work in between. Medians (smallest..largest) over the rounds, without each process's first update;
ratios are taken within a round. {result["wall_seconds"] / 60:.0f} minutes in all.

![tokens per second]({picture_name})

{"".join(texts)}"""


def share_of_limit(training: Result, limit: Result) -> list[float]:
    """Seconds of the bare matrix products, with half of attention's, over those of an update, round by round."""
    products = [parts["linear"] + parts["attention"] / 2 for parts in limit["parts"]]
    return [limit / seconds for limit, seconds in zip(products, training["seconds"], strict=True)]


def thousand_tokens_per_second(training: Result, tokens: int) -> list[float]:
    """Thousands in each round."""
    return [tokens / seconds / 1000 for seconds in training["seconds"]]


def _peers(section: Result, setting: Setting) -> str:
    trainings = section["trainings"]
    ours, limit = trainings[OURS], trainings[PRODUCTS]
    rows = []
    for name, training in trainings.items():
        if name == PRODUCTS:
            continue
        rows.append(
            [
                name,
                ratio(training["seconds"], ours["seconds"]),
                f"{training['peak_memory_bytes'] / ours['peak_memory_bytes']:.2f}",
                spread(share_of_limit(training, limit)),
                spread(thousand_tokens_per_second(training, setting.tokens)),
                f"{training['peak_memory_bytes'] / 1e6:,.0f}",
                f"{training['first_update_seconds']:.1f}",
                f"{training['parameters'] / 1e6:.2f}",
            ]
        )
    header = [
        "",
        "this recipe is faster by",
        "memory",
        "share of the limit",
        "thousand tokens/s",
        "peak MB",
        "first s",
        "million",
    ]
    linear = [linear_flops(setting) / parts["linear"] / 1e9 for parts in limit["parts"]]
    by_torch = [linear_flops(setting) / parts["linear by torch.mm"] / 1e9 for parts in limit["parts"]]
    attention = [attention_flops(setting) / parts["attention"] / 1e9 for parts in limit["parts"]]
    missing = "".join(f"Not measured: {name} ({reason}).\n" for name, reason in section["missing"].items())
    idle = max(training["idle_share"] for training in trainings.values())
    return f"""## Against peers

{table(header, rows)}
Memory: peak resident set over this recipe's. First: seconds from the start of the process to the end of its first update.
Million: parameters. The limit: the same matrix products alone, each by the faster of `torch.mm` and oneDNN, at the
same shapes, forward and backward, with half of attention's time, since a causal kernel may leave out half. They reached
{spread(linear)} GFLOP/s in the linear layers and the output layer ({spread(by_torch)} by `torch.mm` alone),
{spread(attention)} in attention. A process that waited used at most {idle:.1%} of a core.
Load average before a round, this command's own included: {spread(section["load"])}.
{missing}
What each is, and which of its defaults are left, is said in `benchmarks/peers.py`. Composer is left out: it needs a torch
before 2.7.1.

"""


def _accumulation(section: Result, setting: Setting) -> str:
    rounds = section["trainings"][OURS]["parts"]
    rows = []
    for count in rounds[0]:
        update, alone, fresh, step = (
            [parts[count][name] for parts in rounds]
            for name in ("update", "forward and backward", "into no gradient", "step")
        )
        without_step = [whole - end for whole, end in zip(update, step, strict=True)]
        added = [int(count) * seconds for seconds in alone]
        rows.append(
            [count, ratio(without_step, added), ratio(update, added), *map(spread, (update, alone, fresh, step))]
        )
    header = [
        "micro-batches",
        "update without step",
        "update",
        "s",
        "forward and backward, s",
        "into no gradient, s",
        "step, s",
    ]
    return f"""## Accumulation

Seconds of an update of N micro-batches of one block over N times those of one forward and backward alone, which adds to a
gradient that is there. Into no gradient, autograd keeps the new one instead of adding it. The step: clip, AdamW, forget the
gradient.

{table(header, rows)}
"""


def _costs(section: Result, setting: Setting) -> str:
    parts = section["trainings"][OURS]["parts"]
    update = [part["update"] for part in parts]
    names = {
        "waiting": "an update waits for data",
        "logging": "entry, ledger and console, of each update",
        "evaluation": "evaluation of as many tokens as an update has",
        "checkpoint stall": "a checkpoint: training stands still",
        "checkpoint written": "a checkpoint: from its start until it is on the disk, beside training",
    }
    rows = [
        [text, ratio([part[name] for part in parts], update), spread([part[name] for part in parts])]
        for name, text in names.items()
    ]
    return f"""## What is done beside updates

{table(["", "ratio to an update", "seconds"], rows)}
"""


def _growth(section: Result, setting: Setting) -> str:
    rows = []
    for argument, comparison in section.items():
        point = Setting(**json.loads(argument))
        ours, limit = comparison["trainings"][OURS], comparison["trainings"][PRODUCTS]
        rows.append(
            [
                f"{point.n_layer} x {point.n_embd}, {point.micro_batch_size} x {point.sequence_length} tokens",
                spread(share_of_limit(ours, limit)),
                spread(thousand_tokens_per_second(ours, point.tokens)),
                f"{_model_flops(point) / 1e6:.3g}",
                spread([_model_flops(point) * point.tokens / seconds / 1e9 for seconds in ours["seconds"]]),
                f"{ours['peak_memory_bytes'] / 1e6:,.0f}",
            ]
        )
    header = [
        "layers x width, micro-batch",
        "share of the limit",
        "thousand tokens/s",
        "MFLOP/token",
        "GFLOP/s",
        "peak MB",
    ]
    return f"""## How it grows

Updates of one micro-batch. MFLOP/token: 6 N + 12 L d T.

{table(header, rows)}
"""


def _ranks(section: Result, setting: Setting) -> str:
    trainings = section["trainings"]
    names = list(trainings)
    tokens = replace(setting, steps=RANK_STEPS).tokens
    rows = [
        [
            name,
            ratio(trainings[names[0]]["seconds"], trainings[name]["seconds"]),
            spread(thousand_tokens_per_second(trainings[name], tokens)),
            f"{trainings[name]['peak_memory_bytes'] / 1e6:,.0f}",
        ]
        for name in names
    ]
    return f"""## Ranks

The same updates of {tokens:,} tokens. Peak MB: of all ranks.

{table(["", f"times {names[0]}", "thousand tokens/s", "peak MB"], rows)}
"""


def _compiled(section: Result, setting: Setting) -> str:
    trainings = section["trainings"]
    tokens = replace(setting, steps=1).tokens
    rows = [
        [
            name,
            ratio(training["seconds"], trainings[OURS]["seconds"]),
            f"{training['peak_memory_bytes'] / trainings[OURS]['peak_memory_bytes']:.2f}",
            spread(thousand_tokens_per_second(training, tokens)),
            f"{training['first_update_seconds']:.1f}",
        ]
        for name, training in trainings.items()
    ]
    missing = "".join(f"Not measured: {name} ({reason}).\n" for name, reason in section["missing"].items())
    return f"""## Compiled

Updates of one micro-batch by models under torch.compile, unless a row says otherwise. First: seconds from the start of the
process to the end of its first update, with an empty cache unless the row says otherwise.

{table(["", "this recipe, compiled, is faster by", "memory", "thousand tokens/s", "first s"], rows)}
{missing}
"""


def _start(section: Result, setting: Setting) -> str:
    reference = next(iter(section.values()))
    rows = [[name, ratio(values, reference), spread(values)] for name, values in section.items()]
    return f"""## To the first update

`recipe/train.py --config configs/quickstart.yaml`, without the parity check, from the launch until its first update is in the
ledger. Cold: neither the tokenizer nor compiled kernels are there. What is imported may be in the page cache.

{table(["", "ratio to the first", "seconds"], rows)}
"""


WRITERS: dict[str, Callable[[Result, Setting], str]] = {
    "peers": _peers,
    "accumulation": _accumulation,
    "costs": _costs,
    "growth": _growth,
    "ranks": _ranks,
    "compiled": _compiled,
    "start": _start,
}


def picture(result: Result) -> bytes:
    """PNG: tokens per second of each training, and of ours by sequence length and size with its share of the limit."""
    setting = Setting(**{**result["setting"], "nanogpt": ""})
    sections, panels = result["sections"], []
    if "peers" in sections:
        trainings = {n: t for n, t in sections["peers"]["trainings"].items() if n != PRODUCTS}
        values = {name: thousand_tokens_per_second(training, setting.tokens) for name, training in trainings.items()}
        panels.append(_bars("thousand tokens per second", values))
    if "growth" in sections:
        shares = {
            _name(Setting(**json.loads(argument))): share_of_limit(*(c["trainings"][n] for n in (OURS, PRODUCTS)))
            for argument, c in sections["growth"].items()
        }
        panels.append(_bars("share of what the matrix products alone reach", shares))
    spec = {"vconcat": panels or [_bars("nothing", {})], "spacing": 32, "padding": 16, "config": theme("light")}
    png: bytes = library().vegalite_to_png(spec, scale=2)
    return png


def _bars(title: str, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A bar for each name: the median, and a line from the smallest to the largest."""
    rows = [
        {"name": name, "median": median(some), "smallest": min(some), "largest": max(some)}
        for name, some in values.items()
    ]
    y = {"field": "name", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 300}}
    x = {"type": "quantitative", "axis": {"title": None}}
    color = {"condition": {"test": f"datum.name == '{OURS}'", "value": "#2563c9"}, "value": "#9aa3b0"}
    return {
        "title": {"text": title},
        "width": 520,
        "height": {"step": 26},
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "bar"}, "encoding": {"y": y, "x": {**x, "field": "median"}, "color": color}},
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"y": y, "x": {**x, "field": "smallest"}, "x2": {"field": "largest"}},
            },
        ],
    }


def _name(point: Setting) -> str:
    return f"{point.n_layer} x {point.n_embd}, sequence {point.sequence_length}"


def _model_flops(point: Setting) -> int:
    """Of a token, forward and backward."""
    model = ModelConfig(n_layer=point.n_layer, n_embd=point.n_embd, n_head=point.n_head, vocab_size=point.vocabulary)
    return flops_per_token(model, point.sequence_length, point.sequence_length)
