"""What an update costs, against peers and the machine's matrix products, in one run: `python -m benchmarks.step`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from benchmarks.step_report import OURS, PRODUCTS, RANK_STEPS, picture, report
from benchmarks.turns import Worker, compare
from benchmarks.worker import Setting
from recipe.errors import RecipeError, run_command
from recipe.report.charts import library

PEERS = {
    "transformers.Trainer": "trainer",
    "accelerate's loop": "accelerate",
    "accelerate's loop, fused AdamW": "accelerate_fused",
    "nanoGPT": "nanogpt",
    "nanoGPT, fused AdamW": "nanogpt_fused",
    "litgpt": "litgpt",
}
COMPILED = {"nanoGPT": "nanogpt_fused", "litgpt": "litgpt", "transformers.Trainer": "trainer"}
QUICK = Setting(
    n_layer=2, n_embd=32, n_head=2, vocabulary=320, sequence_length=32, micro_batch_size=2, steps=2, threads=1
)
# (sequence length, blocks in a micro-batch): always 2,048 tokens; (layers, width, heads)
LENGTHS = ((128, 16), (256, 8), (512, 4), (1024, 2))
SIZES = ((4, 256, 4), (6, 384, 6), (8, 512, 8))
START_SECONDS = 300  # after which a launch has failed


@dataclass(frozen=True)
class Benchmark:
    """How much is measured.

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
        setting = replace(self.setting, micro_batch_size=1, steps=1)
        return self._compare({OURS: "accumulation"}, setting, rounds=min(self.rounds, 3))

    def costs(self) -> dict[str, Any]:
        """Logging, evaluation, checkpoint beside an update."""
        return self._compare({OURS: "costs"}, self.setting)

    def growth(self) -> dict[str, Any]:
        """Updates of one micro-batch of other sequence lengths and other sizes of the model."""
        lengths, sizes = (LENGTHS[:1], ()) if self.is_quick else (LENGTHS, SIZES)
        one = replace(self.setting, steps=1, nanogpt="")
        points = [replace(one, sequence_length=length, micro_batch_size=blocks) for length, blocks in lengths]
        points += [replace(one, n_layer=layers, n_embd=width, n_head=heads) for layers, width, heads in sizes]
        return {
            point.as_argument(): self._compare({OURS: "ours", PRODUCTS: "matrix_products"}, point, at_once=True)
            for point in dict.fromkeys(points)
        }

    def ranks(self) -> dict[str, Any]:
        """The same update on one rank and on two, with one thread each, and on one with two threads."""
        one, two = (replace(self.setting, steps=RANK_STEPS, threads=threads) for threads in (1, 2))
        starts: dict[str, Callable[[], Worker]] = {
            "1 rank, 1 thread": partial(Worker, "ours", one),
            "2 ranks, 1 thread each": partial(Worker, "ours", one, ranks=2),
            "1 rank, 2 threads": partial(Worker, "ours", two),
        }
        return compare(starts, self.rounds, at_once=True)

    def compiled(self) -> dict[str, Any]:
        """Updates of one micro-batch by compiled models, and by ours as it is; the compiler's cache is empty at first."""
        one = replace(self.setting, steps=1)
        with tempfile.TemporaryDirectory() as cache:

            def start(name: str, setting: Setting) -> Callable[[], Worker]:
                return partial(Worker, name, setting, TORCHINDUCTOR_CACHE_DIR=cache)

            with_compiler = replace(one, compile=True)
            starts = {
                OURS: start("ours", with_compiler),
                f"{OURS}, from the cache": start("ours", with_compiler),
                f"{OURS}, not compiled": start("ours", one),
                **{name: start(function, with_compiler) for name, function in COMPILED.items()},
            }
            return compare(starts, self.rounds, at_once=False)

    def start(self) -> dict[str, Any]:
        """Seconds from a launch of `recipe/train.py` on the quickstart to its first update in the ledger."""
        seconds: dict[str, list[float]] = {}
        for is_compiled in (False, True)[: 1 if self.is_quick else 2]:
            with tempfile.TemporaryDirectory() as root:
                for cache in ("cold", "warm"):
                    name = f"{'compiled' if is_compiled else 'not compiled'}, {cache}"
                    seconds[name] = [_launch(Path(root), cache, is_compiled, self.setting.threads)]
        return seconds

    def _compare(
        self, names: dict[str, str], setting: Setting, *, rounds: int | None = None, at_once: bool = False
    ) -> dict[str, Any]:
        starts = {name: partial(Worker, function, setting) for name, function in names.items()}
        return compare(starts, rounds or self.rounds, at_once=at_once or self.is_quick)


SECTIONS: dict[str, Callable[[Benchmark], dict[str, Any]]] = {
    "peers": Benchmark.peers,
    "accumulation": Benchmark.accumulation,
    "costs": Benchmark.costs,
    "growth": Benchmark.growth,
    "ranks": Benchmark.ranks,
    "compiled": Benchmark.compiled,
    "start": Benchmark.start,
}


def _launch(root: Path, cache: str, is_compiled: bool, threads: int) -> float:
    run = root / cache
    command = [sys.executable, "recipe/train.py", "--config", "configs/quickstart.yaml"]
    command += ["--run.directory", str(run), "--data.cache_directory", str(root / "cache")]
    command += ["--performance.compile", str(is_compiled).lower(), "--run.parity_check", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while not _has_update(run / "ledger.jsonl"):
                if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    log.seek(0)
                    raise RecipeError(f"{' '.join(command)} made no update:\n{log.read()[-2000:]}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def _has_update(ledger: Path) -> bool:
    if not ledger.exists():
        return False
    lines = ledger.read_text(encoding="utf-8").split("\n")[:-1]
    return any("event" not in json.loads(line) for line in lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works")
    parser.add_argument("--rounds", type=int, help="updates of each training that are compared (5; with --quick 2)")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), help="sections to measure (all; --quick: not compiled)"
    )
    parser.add_argument(
        "--nanogpt", type=Path, help="nanoGPT's model.py, which is no package; without it nanoGPT is left out"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process (all cores)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the result")
    options = parser.parse_args()
    library()  # before anything is measured
    warnings.simplefilter("ignore")
    setting = QUICK if options.quick else Setting(threads=options.threads)
    if options.nanogpt:
        setting = replace(setting, nanogpt=str(options.nanogpt.resolve()))
    benchmark = Benchmark(setting, options.rounds or (2 if options.quick else 5), options.quick)
    names = options.only or [name for name in SECTIONS if not (options.quick and name == "compiled")]
    began = time.perf_counter()
    machine = _machine()
    sections = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as root:
        os.environ["TMPDIR"] = root  # whatever the trainings leave behind
        for name in names:
            print(f"{time.perf_counter() - began:5.0f} s  {name}", flush=True)
            sections[name] = SECTIONS[name](benchmark)
    command = "python -m benchmarks.step" + " --quick" * options.quick + f" --rounds {benchmark.rounds}"
    command += " --nanogpt model.py" * bool(options.nanogpt) + (f" --only {' '.join(names)}" if options.only else "")
    result = {
        "command": command,
        "machine": machine,
        "setting": json.loads(setting.as_argument()) | {"nanogpt": options.nanogpt and options.nanogpt.name},
        "sections": sections,
        "wall_seconds": time.perf_counter() - began,
    }
    path = options.out / f"{machine['time_utc'][:10]}-step"
    text = report(result, picture_name=path.with_suffix(".png").name)
    write_result(path, text, result)
    path.with_suffix(".png").write_bytes(picture(result))
    print(text)


def _machine() -> dict[str, Any]:
    from recipe.run.launch import start_accelerator

    from recipe.config.command_line import load_config
    from recipe.run.environment import describe_machine

    config = load_config(["--config", "configs/quickstart.yaml"])
    return describe_machine(start_accelerator(config, "fp32"), "fp32", None)


if __name__ == "__main__":
    run_command(main)
