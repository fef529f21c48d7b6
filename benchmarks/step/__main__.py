"""What an update costs, against peers and the machine's matrix products: `python -m benchmarks.step`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import command_line, ratio, spread, table, write_result
from benchmarks.step.turns import Setting, Worker, compare
from recipe.errors import RecipeError, run_command
from recipe.plan.run_plan import flops_per_token
from recipe.run.ledger import LEDGER, read_lines

OURS, PRODUCTS = "this recipe", "matrix products alone"
PEERS = {
    "transformers.Trainer": "trainer",
    "accelerate's loop": "accelerate",
    "accelerate's loop, fused AdamW": "accelerate_fused",
    "nanoGPT": "nanogpt",
    "nanoGPT, fused AdamW": "nanogpt_fused",
    "litgpt": "litgpt",
}
COMPILED = {"nanoGPT": "nanogpt_fused", "litgpt": "litgpt", "transformers.Trainer": "trainer"}
QUICK = Setting(n_layer=2, n_embd=32, n_head=2, vocab_size=320, sequence_length=32, micro_batch_size=2, steps=2)
# (sequence length, blocks in a micro-batch): always 2,048 tokens; (layers, width, heads)
LENGTHS = ((128, 16), (256, 8), (512, 4), (1024, 2))
SIZES = ((4, 256, 4), (6, 384, 6), (8, 512, 8))
RANK_STEPS = 2  # micro-batches of an update in the comparison of ranks
Result = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How much is measured; a method for each section of the report.

    Args:
        setting: of the comparison with peers.
        rounds: turns of each training.
        is_quick: one point of each kind, to see that it works.
    """

    setting: Setting
    rounds: int
    is_quick: bool

    def peers(self) -> dict[str, Any]:
        """The same model and text by the recipe, by its peers, and as bare matrix products."""
        return self._compare({OURS: "ours", **PEERS, PRODUCTS: "matrix_products"}, self.setting)

    def accumulation(self) -> dict[str, Any]:
        """Updates of 1, 4, 16 and 64 micro-batches of one block."""
        few = replace(self, rounds=min(self.rounds, 3))
        return few._compare({OURS: "accumulation"}, replace(self.setting, micro_batch_size=1, steps=1))

    def costs(self) -> dict[str, Any]:
        """Logging, evaluation, checkpoint beside an update."""
        return self._compare({OURS: "costs"}, self.setting)

    def noise(self) -> dict[str, Any]:
        """Updates with and without the gradient noise scale, of the quickstart's shape and, in fewer turns, of this one."""
        small = replace(self.setting, n_layer=4, n_embd=128, n_head=4, vocab_size=2048, micro_batch_size=4, threads=1)
        few = replace(self, rounds=min(self.rounds, 2))
        return {
            f"{p.n_layer} x {p.n_embd}, {p.steps} micro-batches of {p.micro_batch_size} x {p.sequence_length} tokens": {
                "setting": asdict(p),
                **benchmark._compare({OURS: "noise"}, p),
            }
            for benchmark, p in [(self, small)] * (not self.is_quick) + [(few, self.setting)]
        }

    def growth(self) -> dict[str, Any]:
        """Updates of one micro-batch of other sequence lengths and other sizes of the model."""
        lengths, sizes = (LENGTHS[:1], ()) if self.is_quick else (LENGTHS, SIZES)
        one = replace(self.setting, steps=1, nanogpt="")
        points = [replace(one, sequence_length=length, micro_batch_size=blocks) for length, blocks in lengths]
        points += [replace(one, n_layer=layers, n_embd=width, n_head=heads) for layers, width, heads in sizes]
        names = {OURS: "ours", PRODUCTS: "matrix_products"}
        return {
            f"{p.n_layer} x {p.n_embd}, {p.micro_batch_size} x {p.sequence_length} tokens": {
                "setting": asdict(p),
                **self._compare(names, p),
            }
            for p in dict.fromkeys(points)
        }

    def ranks(self) -> dict[str, Any]:
        """The same update on one rank and on two, with one thread each, and on one with two threads."""
        one, two = (replace(self.setting, steps=RANK_STEPS, threads=threads) for threads in (1, 2))
        starts: dict[str, Callable[[], Worker]] = {
            "1 rank, 1 thread": partial(Worker, "ours", one),
            "2 ranks, 1 thread each": partial(Worker, "ours", one, ranks=2),
            "1 rank, 2 threads": partial(Worker, "ours", two),
        }
        return compare(starts, self.rounds)

    def compiled(self) -> dict[str, Any]:
        """Updates of one micro-batch by compiled models, and by ours as it is; the compiler's cache is empty at first."""
        eager = replace(self.setting, steps=1)
        compiled = replace(eager, compile=True)
        names = {OURS: ("ours", compiled), f"{OURS}, from the cache": ("ours", compiled)}
        names |= {f"{OURS}, not compiled": ("ours", eager), **{n: (f, compiled) for n, f in COMPILED.items()}}
        with tempfile.TemporaryDirectory() as cache:
            starts = {n: partial(Worker, *of_name, TORCHINDUCTOR_CACHE_DIR=cache) for n, of_name in names.items()}
            return compare(starts, self.rounds)

    def start(self) -> dict[str, Any]:
        """Seconds from a launch of `recipe/train.py` on the quickstart to its first update in the ledger."""
        seconds: dict[str, list[float]] = {}
        for is_compiled in (False, True)[: 1 if self.is_quick else 2]:
            with tempfile.TemporaryDirectory() as root:
                for cache in ("cold", "warm"):
                    name = f"{'compiled' if is_compiled else 'not compiled'}, {cache}"
                    seconds[name] = [_launch(Path(root), cache, is_compiled, self.setting.threads)]
        return seconds

    def _compare(self, names: dict[str, str], setting: Setting) -> dict[str, Any]:
        starts = {name: partial(Worker, function, setting) for name, function in names.items()}
        return compare(starts, self.rounds)


def _launch(root: Path, name: str, is_compiled: bool, threads: int) -> float:
    run = root / name
    command = [sys.executable, "recipe/train.py", "--config", "configs/quickstart.yaml"]
    command += ["--run.directory", str(run), "--data.cache_directory", str(root / "cache")]
    command += ["--performance.compile", str(is_compiled).lower(), "--run.parity_check", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        while not any(line["update"] > 0 for line in read_lines(run / LEDGER)):
            if process.poll() is not None:
                log.seek(0)
                raise RecipeError(f"{' '.join(command)} made no update: {log.read()[-2000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def report(result: Result) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    setting, sections = Setting(**result["setting"]), result["sections"]
    return f"""What an update costs
{setting.n_layer} layers x {setting.n_embd} wide, {setting.n_head} heads, vocabulary {setting.vocab_size:,}; updates of \
{setting.steps} micro-batches x {setting.micro_batch_size} blocks x {setting.sequence_length} tokens, in fp32;
threads of a process: {setting.threads}. A section says what it has otherwise.
Every training is a process of its own, with the same random tokens. They take turns, update by update, in another order each
round, and wait without work in between. Medians (smallest..largest) over {result["rounds"]} rounds, without each process's
first update; ratios are taken within a round. Memory: peak resident set over that of the first row. First: seconds from the
start of the process to the end of its first update. {result["wall_seconds"] / 60:.0f} minutes in all.

{"".join(WRITERS[name](section, setting) for name, section in sections.items())}"""


def _share_of_limit(name: str, section: Result) -> list[float]:
    """Seconds of the bare matrix products, with half of attention's, over those of an update, round by round."""
    products = [parts["linear"] + parts["attention"] / 2 for parts in section["trainings"][PRODUCTS]["parts"]]
    updates = section["trainings"][name]["seconds"]
    return [limit / seconds for limit, seconds in zip(products, updates, strict=True)]


def _compared(section: Result, tokens: int, column: str, is_speed: bool = False) -> dict[str, dict[str, str]]:
    """A row for each training: the ratio of its seconds to those of the first, or of its speed, and what all tables have."""
    reference, *_ = section["trainings"].values()
    rows = {}
    for name, training in section["trainings"].items():
        both = training["seconds"], reference["seconds"]
        rows[name] = {
            "": name,
            column: ratio(*reversed(both)) if is_speed else ratio(*both),
            "memory": f"{training['peak_memory_bytes'] / reference['peak_memory_bytes']:.2f}",
            "thousand tokens/s": spread([tokens / seconds / 1000 for seconds in training["seconds"]]),
            "peak MB": f"{training['peak_memory_bytes'] / 1e6:,.0f}",
            "first s": f"{training['first_update_seconds']:.1f}",
        }
    return rows


def _section(title: str, text: str, rows: Sequence[Mapping[str, str]], section: Result) -> str:
    missing = [f"Not measured: {name} ({reason}).\n" for name, reason in section.get("missing", {}).items()]
    return f"## {title}\n\n{text}\n\n{table(rows)}\n{''.join(missing)}\n"


def _peers(section: Result, setting: Setting) -> str:
    trainings = section["trainings"]
    rows = _compared(section, setting.tokens, "this recipe is faster by")
    del rows[PRODUCTS]
    for name, row in rows.items():
        row["share of the limit"] = spread(_share_of_limit(name, section))
        row["million parameters"] = f"{trainings[name]['parameters'] / 1e6:.2f}"
    products = trainings[PRODUCTS]
    rates = {
        name: spread([flops / parts[name] / 1e9 for parts in products["parts"]])
        for name, flops in products["flops"].items()
    }
    text = f"""The limit: the same matrix products alone, each by the faster of `torch.mm` and oneDNN, at the same shapes,
forward and backward, with half of attention's time, since a causal kernel may leave out half. They reached {rates["linear"]}
GFLOP/s in the linear layers and the output layer ({rates["linear by torch.mm"]} by `torch.mm` alone), {rates["attention"]}
in attention. A process that waited used at most {max(training["idle_share"] for training in trainings.values()):.1%} of a core.
Load average before a round, this command's own included: {spread(section["load"])}.
`benchmarks/step/peers.py` says what each peer is, and which of its defaults are left. Composer is left out: it needs a torch
before 2.7.1."""
    return _section("Against peers", text, list(rows.values()), section)


def _accumulation(section: Result, setting: Setting) -> str:
    rounds, rows = section["trainings"][OURS]["parts"], []
    for count in rounds[0]:
        parts = {name: [of_round[count][name] for of_round in rounds] for name in rounds[0][count]}
        added = [int(count) * seconds for seconds in parts["forward and backward"]]
        without_step = [update - step for update, step in zip(parts["update"], parts["step"], strict=True)]
        ratios = {"update without step": ratio(without_step, added), "update": ratio(parts["update"], added)}
        seconds = {f"{name}, s": spread(values) for name, values in parts.items()}
        rows.append({"micro-batches": count, **ratios, **seconds})
    text = """An update of N micro-batches of one block over N times the seconds of one forward and backward alone, which adds
to a gradient that is there. Into no gradient, autograd keeps the new one instead of adding it. The step: clip, AdamW, clear
the gradient."""
    return _section("Accumulation", text, rows, section)


def _costs(section: Result, setting: Setting) -> str:
    rounds = section["trainings"][OURS]["parts"]
    parts = {name: [part[name] for part in rounds] for name in rounds[0]}
    update = parts.pop("update")
    rows = [{"": name, "ratio to an update": ratio(s, update), "seconds": spread(s)} for name, s in parts.items()]
    return _section("What is done beside updates", "The evaluation has as many tokens as an update.", rows, section)


def _noise(section: Result, setting: Setting) -> str:
    rows = []
    for size, comparison in section.items():
        rounds = comparison["trainings"][OURS]["parts"]
        parts = {name: [part[name] for part in rounds] for name in rounds[0]}
        seconds = {f"{name}, s": spread(values) for name, values in parts.items()}
        rows.append({"layers x width": size, "measured / not measured": ratio(*parts.values()), **seconds})
    text = """The same number of updates with the gradient noise scale (`log.noise_scale_every: 1`) and without it, in turns.
Of more than 16 micro-batches 16 are measured."""
    return _section("The gradient noise scale", text, rows, section)


def _growth(section: Result, setting: Setting) -> str:
    rows = []
    for size, comparison in section.items():
        point: Any = Setting(**comparison["setting"])
        ours = comparison["trainings"][OURS]
        flops = flops_per_token(point, point.sequence_length)
        row = _compared(comparison, point.tokens, "")[OURS]
        rows.append(
            {
                "layers x width, micro-batch": size,
                "share of the limit": spread(_share_of_limit(OURS, comparison)),
                "MFLOP/token": f"{flops / 1e6:.3g}",
                "GFLOP/s": spread([flops * point.tokens / seconds / 1e9 for seconds in ours["seconds"]]),
                **{column: row[column] for column in ("thousand tokens/s", "peak MB")},
            }
        )
    return _section("How it grows", "Updates of one micro-batch. MFLOP/token: 6 N + 12 L d T.", rows, section)


def _ranks(section: Result, setting: Setting) -> str:
    tokens = replace(setting, steps=RANK_STEPS).tokens
    rows = _compared(section, tokens, "speed over the first", is_speed=True)
    return _section(
        "Ranks", f"The same updates of {tokens:,} tokens. Peak MB: of all ranks.", list(rows.values()), section
    )


def _compiled(section: Result, setting: Setting) -> str:
    rows = _compared(section, replace(setting, steps=1).tokens, "this recipe, compiled, is faster by")
    text = "Updates of one micro-batch by models under torch.compile, with an empty cache unless a row says otherwise."
    return _section("Compiled", text, list(rows.values()), section)


def _start(section: Result, setting: Setting) -> str:
    reference = next(iter(section.values()))
    rows = [{"": n, "ratio to the first": ratio(v, reference), "seconds": spread(v)} for n, v in section.items()]
    text = """`recipe/train.py --config configs/quickstart.yaml`, without the parity check, from the launch until its first
update is in the ledger. Cold: neither the tokenizer nor compiled kernels are there. Imports may be in the page cache."""
    return _section("To the first update", text, rows, section)


SECTIONS = (_peers, _accumulation, _costs, _noise, _growth, _ranks, _compiled, _start)
WRITERS: dict[str, Callable[[Result, Setting], str]] = {writer.__name__[1:]: writer for writer in SECTIONS}


def main() -> None:
    parser = command_line("step", __doc__)
    parser.add_argument("--rounds", type=int, help="updates of each training that are compared (5; with --quick 2)")
    parser.add_argument("--only", nargs="+", choices=WRITERS, help="sections to measure (all; --quick: not compiled)")
    parser.add_argument("--nanogpt", type=Path, help="nanoGPT's model.py; without it nanoGPT is left out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    setting = QUICK if options.quick else Setting(threads=os.cpu_count() or 1)
    setting = replace(setting, nanogpt=str(options.nanogpt.resolve()) if options.nanogpt else "")
    benchmark = Benchmark(setting, options.rounds or (2 if options.quick else 5), options.quick)
    result = {"setting": asdict(setting) | {"nanogpt": ""}, "rounds": benchmark.rounds}
    began, sections = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as root:
        os.environ["TMPDIR"] = root  # for whatever the trainings leave behind
        for name in options.only or [name for name in WRITERS if not (options.quick and name == "compiled")]:
            print(f"{time.perf_counter() - began:5.0f} s  {name}", flush=True)
            sections[name] = getattr(benchmark, name)()
    result |= {"sections": sections, "wall_seconds": time.perf_counter() - began}
    write_result("step", options, result, report(result))


if __name__ == "__main__":
    run_command(main)
