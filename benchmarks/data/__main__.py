"""Tokens a second to int64 tensors, against other libraries and the machine's limits: `python -m benchmarks.data`. Linux.

Of the peers, `datasets` is there; what is not installed is left out. The others want old versions of what the recipe has, for
more than tokens need: `pip install --no-deps --target DIRECTORY litdata mosaicml-streaming lightning-utilities boto3 botocore
jmespath s3transfer tifffile obstore python-snappy cramjam zstd catalogue`, and PYTHONPATH=DIRECTORY.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data.corpus import read_flat, tokenizer_of, write_litdata, write_mds, write_text, write_tokens
from benchmarks.data.readers import SOURCES, Job, settings_of
from benchmarks.data.worker import take_turns
from benchmarks.results import command_line, ratio, spread, table, write_result
from benchmarks.text_memory import gpt2_tokenizer
from benchmarks.training import with_settings
from recipe.config.settings import Config
from recipe.data.prepare import Wanted
from recipe.data.prepare import prepare as prepare_tokens
from recipe.errors import run_command
from recipe.run.ledger import LEDGER, read_lines

LANES = (8, 64)
BARE, RAW = "the tokenizer alone, its limit", "a memory map cast to int64, its limit"
PREPARED_SECONDS = 5.0  # which the fast do not need for all tokens
Result = dict[str, Any]


def on_the_fly(job: Job, options: argparse.Namespace) -> Result:
    """Text to tensors. Ours reads four times as much: it holds tokens that it has made and not packed, which nobody counts."""
    little = replace(job, root=f"{job.root}/fly")
    more = replace(job, most_tokens=4 * len(read_flat(little.path / "tokens")))
    jobs = {BARE: ("bare_tokenizer", little)}
    jobs |= {f"this recipe, {lanes} lanes": ("ours_from_text", replace(more, lanes=lanes)) for lanes in LANES}
    for processes in (1, 2):
        name = f"`datasets`, map and group, num_proc {processes}"
        jobs[name] = ("map_and_group", replace(little, processes=processes))
    return take_turns(jobs, options.rounds)


def memory(job: Job, options: argparse.Namespace) -> Result:
    """Ten times as much text, and all tokens."""
    little, jobs = replace(job, root=f"{job.root}/fly"), dict[str, Any]()
    more = replace(job, most_tokens=10 * len(read_flat(little.path / "tokens")))
    for source, found in {"text": more, "flat": job, "prepared": job, "parquet": job}.items():
        jobs |= {
            f"{source}, little": (f"ours_from_{source}", little),
            f"{source}, much": (f"ours_from_{source}", found),
        }
    return take_turns(jobs, 1)


def prepared(job: Job, options: argparse.Namespace) -> Result:
    """Tokens to tensors."""
    jobs = {RAW: ("raw_memmap", job)}
    files = {"flat": "a flat file", "prepared": "of `recipe prepare`", "parquet": "Parquet in 1,024 row groups"}
    for source, name in files.items():
        for lanes in LANES:
            jobs[f"this recipe, {name}, {lanes} lanes"] = (f"ours_from_{source}", replace(job, lanes=lanes))
    jobs |= {"nanoGPT, random blocks": ("nanogpt", job), "`datasets`, streamed": ("datasets_stream", job)}
    jobs |= {"litdata, TokensLoader": ("litdata", job), "mosaicml-streaming": ("mosaicml", job)}
    return take_turns(jobs, options.rounds, most_seconds=PREPARED_SECONDS)


def training_thread(job: Job, options: argparse.Namespace) -> Result:
    """The training's thread while the reader works."""
    return _of_sources(job, "training_thread", min(options.rounds, 2), ("text", "flat"), seconds=options.seconds)


def resume(job: Job, options: argparse.Namespace) -> Result:
    """A window again."""
    return _of_sources(job, "resume", 1, SOURCES)


def limits(job: Job, options: argparse.Namespace) -> Result:
    """The machine."""
    return take_turns({"limits": ("limits", job)}, 1)


def quickstart(job: Job, options: argparse.Namespace) -> Result:
    """The ledger of configs/quickstart.yaml: how long its updates waited."""
    directory = job.path / "quickstart"
    command = [sys.executable, "recipe/train.py", "--config", "configs/quickstart.yaml"]
    command += ["--run.directory", str(directory), "--evaluation.sample_tokens", "null"]
    updates = 10 if options.quick else 80
    command += ["--schedule.total_tokens", str(updates * 4096), "--schedule.warmup_tokens", "4096"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = [line for line in read_lines(directory / LEDGER) if line["update"] > 1]
    return {name: [line[name] for line in ledger] for name in ("data_wait_seconds", "update_seconds")}


SECTIONS: dict[str, Callable[[Job, argparse.Namespace], Result]] = {
    section.__name__: section for section in (limits, prepared, on_the_fly, memory, resume, training_thread, quickstart)
}


def prepare(job: Job, options: argparse.Namespace) -> int:
    """Write what is read: all of the text, and a little of it in `fly`. Returns the tokens of all."""
    tokenizer = tokenizer_of(Path(gpt2_tokenizer(job.path / "tokenizer")))
    tokens = 0
    for directory, megabytes in ((job.path / "fly", options.fly_megabytes), (job.path, options.megabytes)):
        directory.mkdir(exist_ok=True)
        write_text(directory / "text", megabytes * 1e6)
        tokens = write_tokens(directory / "tokens", megabytes * 1e6, tokenizer)
    (job.path / "fly/tokenizer").symlink_to(job.path / "tokenizer")
    for directory in (job.path / "fly", job.path):
        write_prepared(replace(job, root=str(directory), lanes=max(LANES)))
    for name, write in (("litdata", write_litdata), ("mds", write_mds)):
        with suppress(ImportError):
            write(job.path / name, job.path / "tokens", job.length)
    return tokens


def write_prepared(job: Job) -> None:
    """What `recipe prepare` makes of the flat file."""
    config = with_settings(Config(), settings_of(job, "flat"))
    prepare_tokens(Wanted(config, job.path / "prepared", "parquet"), processes=2, say=lambda _: None)


def _of_sources(job: Job, experiment: str, rounds: int, sources: Iterable[str], **arguments: Any) -> Result:
    found = dict[str, Any]()
    for source in sources:
        for lanes in LANES:
            jobs = {f"{source}, {lanes} lanes": (experiment, replace(job, lanes=lanes))}
            found |= take_turns(jobs, rounds, source=source, **arguments)
    return found


def report(result: Mapping[str, Any]) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    job, sizes, sections = Job(**result["job"]), result["sizes"], result["sections"]
    text = f"""From text or tokens to tensors
{sizes["megabytes"]:g} MB of text, the files of Python's standard library again and again, each time with another first line:
{sizes["tokens"]:,} tokens of GPT-2's vocabulary. Batches of {job.blocks} blocks of {job.length:,} tokens, int64.
Each reader is a process of its own; they take turns, in another order each round;
medians (smallest..largest), {result["rounds"]} rounds. Tokens/s are those behind the first tensors,
and in all of `datasets`' map, whose work comes before. Seconds are from before anything is opened, behind the imports.
Memory: peak of the resident set, memory-mapped files included, over what is there after the imports.
`benchmarks/data/readers.py` says what each is.
"""
    writers: dict[str, Callable[[Result, Mapping[str, Any]], str]] = {
        "limits": _limits,
        "prepared": _prepared,
        "on_the_fly": _on_the_fly,
        "memory": _memory,
        "resume": _resume,
        "training_thread": _training_thread,
        "quickstart": _quickstart,
    }
    return text + "".join(write(sections[name], result) for name, write in writers.items() if name in sections)


def _speeds_of(found: Result) -> list[float]:
    """Tokens a second behind the first tensors; in all of what does its work before these."""
    rounds = found["rounds"]
    is_late = any(one["first_seconds"] > 0.8 * one["seconds"] for one in rounds)
    return [
        one["read_tokens"] / one["seconds"] if is_late else _later_tokens(one) / (one["seconds"] - one["first_seconds"])
        for one in rounds
    ]


def _later_tokens(one: Result) -> int:
    """Read behind the first tensors."""
    return int(one["read_tokens"] - one["first_read_tokens"])


def _speeds(section: Result, limit: str, unit: float) -> list[dict[str, str]]:
    """A row for each reader."""
    rows, reference = [], _speeds_of(section[limit])
    for name, found in section.items():
        if "missing" in found:
            rows.append({"": name, "tokens/s": found["missing"], **dict.fromkeys(_COLUMNS, "")})
            continue
        values = _speeds_of(found)
        cells = (
            ratio(values, reference),
            spread([one["first_seconds"] for one in found["rounds"]]),
            f"{_megabytes(found):,.0f}",
        )
        rows.append(
            {"": name, "tokens/s": spread([v / unit for v in values]), **dict(zip(_COLUMNS, cells, strict=True))}
        )
    return rows


_COLUMNS = ("of the limit", "s to the first tensors", "MB")


def _limits(section: Result, result: Mapping[str, Any]) -> str:
    found = section["limits"]["rounds"][0]
    ns = {name: found[f"{name}_seconds_per_token"] * 1e9 for name in ("cast", "hash", "tensor")}
    total = sum(ns.values())
    moved = 2 + 2 * 4 + 3 * 2 * 8  # bytes: uint16 read, int32 written and hashed, int64 written and read three times
    bandwidth, sha256 = found["copied_bytes_per_second"], found["sha256_bytes_per_second"]
    return f"""
## What the machine allows

A copy in memory: {bandwidth / 1e9:.1f} GB/s. SHA-256 on one core: {sha256 / 1e9:.2f} GB/s.
What each token of ours needs, in ns on one core: from uint16 to int32 {ns["cast"]:.2f},
the hash of its block {ns["hash"]:.2f}, inputs and targets {ns["tensor"]:.2f};
together {total:.2f}, so that {1e3 / total:,.0f} M tokens/s is the most, and the hash is {ns["hash"] / total:.0%} of it.
About {moved} bytes are moved for a token, which the memory can do for {bandwidth / moved / 1e6:,.0f} M tokens/s.
"""


def _prepared(section: Result, result: Mapping[str, Any]) -> str:
    rows = _speeds(section, RAW, 1e6)
    for row, found in zip(rows, section.values(), strict=True):
        # none of these readers has processes of its own
        values = [_later_tokens(one) / one["processor_seconds"] / 1e6 for one in found.get("rounds", ())]
        row["per processor second"] = spread(values) if values else ""
    hashed, ours = (
        "",
        [found for name, found in section.items() if name.startswith("this") and "rounds" in found],
    )
    if ours and "limits" in result["sections"]:
        seconds = result["sections"]["limits"]["limits"]["rounds"][0]["hash_seconds_per_token"]
        shares = [seconds * median(_speeds_of(found)) for found in ours]
        hashed = f"The ledger's hashes are {', '.join(f'{share:.0%}' for share in shares)} of the time of its rows."
    return f"""
## Prepared tokens, in millions a second

This recipe shuffles shards and blocks, holds documents out and hashes every block; nanoGPT draws blocks with replacement; the
limit reads in order. A reader has {PREPARED_SECONDS:g} s in a round, and all cores. litdata and `datasets` use two, which a
training would miss, so the last column counts the processors' time. {hashed}

{table(rows)}"""


def _on_the_fly(section: Result, result: Mapping[str, Any]) -> str:
    return f"""
## On the fly, in thousands a second

{result["sizes"]["fly_megabytes"]:g} MB of the text. The limit has documents in memory and gives numpy arrays.
Ours is endless, and reads four times as much: it counts what it has packed, and what is in the windows of its lanes, but not
what it has tokenized beyond that.

{table(_speeds(section, BARE, 1e3))}"""


def _memory(section: Result, result: Mapping[str, Any]) -> str:
    rows = []
    for source in SOURCES:
        little, much = (section[f"{source}, {size}"] for size in ("little", "much"))
        if "rounds" in little and "rounds" in much:
            row = {"": source}
            for name, found in {"little": little, "much": much}.items():
                row |= {
                    f"{name}: tokens": f"{found['rounds'][0]['read_tokens']:,}",
                    f"{name}: MB": f"{_megabytes(found):,.0f}",
                }
            rows.append(row)
    return "\n## Memory of more text\n\n8 lanes.\n\n" + table(rows) if rows else ""


def _megabytes(found: Result) -> float:
    return float(max(one["peak_bytes"] - one["base_bytes"] for one in found["rounds"]) / 1e6)


def _resume(section: Result, result: Mapping[str, Any]) -> str:
    rows = []
    for name, found in section.items():
        if "missing" in found:
            continue
        (one,) = found["rounds"]
        rows.append({"": name, "s": f"{one['seconds']:.2f}", "tokens read again": f"{one['tokens']:,}"})
    return (
        "\n## To go on\n\nLanes read the window again in which they were, at its full size.\n\n" + table(rows)
        if rows
        else ""
    )


def _training_thread(section: Result, result: Mapping[str, Any]) -> str:
    rows = []
    for name, found in section.items():
        if "missing" in found:
            continue
        rounds, row = found["rounds"], {"": name}
        for phase in ("one H100", "flat out"):
            lost = [100 * (r[phase]["step_seconds"] / r["no reading"]["step_seconds"] - 1) for r in rounds]
            asleep = [100 * (r[phase]["asleep_share"] - r["no reading"]["asleep_share"]) for r in rounds]
            row |= {
                f"{phase}: slower by %": spread(lost),
                f"{phase}: without the lock, %": spread(asleep),
            }
        row["flat out: thousand tokens/s"] = spread([r["flat out"]["tokens_per_second"] / 1e3 for r in rounds])
        rows.append(row)
    text = """
## Taking turns with the training's thread

A Python thread launches 2,000 small operations of torch a step, as one that feeds a GPU does, on a core of its own; the
reader's threads have the other core. It reads as fast as one H100 trains the 1.3B preset (60,000 tokens/s), or
flat out. `without the lock`: the share of the
time in which the thread slept, since another had the interpreter's lock, over that without reading, by Linux's count.

"""
    return text + table(rows) if rows else ""


def _quickstart(section: Result, result: Mapping[str, Any]) -> str:
    waited, total = sum(section["data_wait_seconds"]), sum(section["update_seconds"])
    return f"""
## The quickstart

`data_wait_seconds` of {len(section["update_seconds"])} updates, the first apart: {waited:.4f} s of {total:.1f} s,
{waited / total:.3%}.
"""


def chart(result: Mapping[str, Any]) -> Any:
    """Bars of the tokens a second of each reader, of prepared tokens and on the fly; None without either."""
    import altair as alt
    import pandas as pd

    charts = []
    for section, title in (("prepared", "Prepared tokens"), ("on_the_fly", "Text, tokenized on the fly")):
        found = result["sections"].get(section, {})
        speeds = {name: _speeds_of(one) for name, one in found.items() if "rounds" in one}
        if RAW in speeds:  # beside it the others could not be told apart
            title += f" ({RAW}: {median(speeds.pop(RAW)) / 1e6:,.0f})"
        if speeds:
            data = pd.DataFrame({"reader": [*speeds], "speed": [median(v) / 1e6 for v in speeds.values()]})
            bars = (
                alt.Chart(data)
                .mark_bar()
                .encode(
                    alt.X(
                        "speed:Q",
                        title="million tokens a second",
                    ),
                    alt.Y("reader:N", sort=None, title=None, axis=alt.Axis(labelLimit=320)),
                )
            )
            charts.append(bars.properties(title=title, width=420))
    return alt.vconcat(*charts) if charts else None


def main() -> None:
    parser = command_line("data", __doc__)
    parser.add_argument("--megabytes", type=float, default=200.0, help="of text")
    parser.add_argument(
        "--fly_megabytes", type=float, default=8.0, help="of it, that are tokenized on the fly in a round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each phase of the training's thread")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    options = parser.parse_args()
    job = Job("")
    if options.quick:
        options.megabytes, options.fly_megabytes, options.rounds, options.seconds = 8.0, 3.0, 1, 0.3
        job = Job("", blocks=64, length=256)
    began, sections = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as root:
        os.environ["TMPDIR"] = root
        job = replace(job, root=root)
        tokens = prepare(job, options)
        for name in options.only:
            print(f"{time.perf_counter() - began:5.0f} s  {name}", flush=True)
            sections[name] = SECTIONS[name](job, options)
    sizes = {"megabytes": options.megabytes, "fly_megabytes": options.fly_megabytes, "tokens": tokens}
    result = {"job": asdict(replace(job, root="")), "rounds": options.rounds, "sizes": sizes, "sections": sections}
    result["wall_seconds"] = time.perf_counter() - began
    write_result("data", options, result, report(result), chart(result))


if __name__ == "__main__":
    run_command(main)
