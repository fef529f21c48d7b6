"""What one GPU makes of gpt2-1.3b: `benchmarks/gpu.sh`. Its limits, each option on and off, parity, and whole updates.

Needs torch, transformers, accelerate and numpy, no text and no network: the blocks are random. The most telling rows come
first, each is written down when it is done, and the output names what does not fit into `--minutes`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu.limits import measure_limits
from benchmarks.gpu.machine import CUDA_ATTENTION, OutOfTime, deadline, describe_machine, free_memory, nvidia_smi
from benchmarks.gpu.profile import profile_update
from benchmarks.gpu.trial import Row, Trial
from benchmarks.results import write_json
from benchmarks.training import Training, read_preset, start_quietly, with_settings
from recipe.config.settings import Config, flat_fields, value_of
from recipe.errors import RecipeError, run_command
from recipe.plan.run_plan import make_plan
from recipe.run.environment import device_type, peak_flops
from recipe.run.ledger import utc_now
from recipe.run.stop import DoesNotFit
from recipe.step import check_parity
from recipe.step.parity import TOLERANCE, relative_difference
from recipe.step.update import is_out_of_memory

PRESET = "configs/gpt2-1.3b.yaml"
VOCABULARY = 50_257  # GPT-2's; the embedding has 50,304 rows
# Largest relative differences to the baseline's loss, and to its gradient of the weights that make queries, keys and values.
# With 24 layers in bf16 on a CPU other kernels, fp32 and bf16 weights gave up to 6e-3 for values and 2e-2 for the others (at
# initialisation they are small differences of large numbers). Attention that is not causal gave 0.7 and 0.7, a wrong scale
# 0.08 and 7, and a loss that leaves out one target in 16 gave 0.1 and 0.1, and 0.06 of the loss.
LARGEST = {"loss": 1e-3, "query": 0.2, "key": 0.2, "value": TOLERANCE["bf16"]}
CHECK_BLOCKS = 32  # whose loss and gradient each row is compared in
LEAVE_SECONDS = 15  # for writing, and for the interpreter to end
COMPILE = {"performance.compile": True}
CHECKPOINTED = {"performance.activation_checkpointing": 1}


def of_size(size: int, compiled: bool = False) -> Row:
    """The preset with another micro-batch."""
    settings = (COMPILE if compiled else {}) | {"batch.micro_batch_size": size}
    return Row(f"{'compiled, ' if compiled else ''}micro-batch {size}", settings, on_best=False)


# The most telling first. Compiled is what the recipe does on a GPU; to compile takes most of a row's time.
FIRST = [
    Row("baseline", on_best=False),
    Row("compiled", COMPILE, on_best=False),
    of_size(8),
    of_size(8, compiled=True),
    of_size(16),
]
LATER = [
    *(Row(f"attention {name}", attention=name, is_candidate=False) for name in ("cudnn", "flash", "mem_efficient")),
    of_size(16, compiled=True),
    Row("activation checkpointing", CHECKPOINTED),
    Row("sharded over one", {"performance.sharding": "full"}, on_best=False, is_candidate=False),
    Row("bf16 state", {"optimizer.state": "bf16"}, is_candidate=False),
    Row("activation checkpointing, twice the micro-batch", CHECKPOINTED, factor=2),
    *map(of_size, (2, 1, 32)),
]
PADDING = 3  # rows of the embedding without a token, in small models
# Small, but deep and wide enough for each kernel to do real work; without TF32.
PARITY = {
    "model": {"n_layer": 4, "n_embd": 512, "n_head": 4, "vocab_size": 8192},
    "data.sequence_length": 512,
    "batch": {"tokens_per_update": 64 * 512, "lanes": 64},
    "performance.tf32": False,
}
# A small model for a machine without a GPU: the same rows, to see that each of them runs.
DRY_RUN = {
    "model": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512},
    "data.sequence_length": 32,
    "batch": {"tokens_per_update": 1024, "lanes": 32},
    "schedule": {"total_tokens": 1024 * 1000, "warmup_tokens": 1024 * 10},
}


def differences(config: Config, preset: Config) -> dict[str, Any]:
    """Dotted names of what is not as in the preset, with their values."""
    values = {name: value_of(config, name) for name, _ in flat_fields(Config)}
    return {name: value for name, value in values.items() if value != value_of(preset, name)}


class Benchmark:
    """The rows one after the other, and what they gave. Without a GPU a dry run: a small model, to see that everything runs.

    Args:
        path: of the JSON.
        minutes: for everything, from the start of the process.
        settings: that differ from the preset's.
    """

    def __init__(self, path: Path, minutes: float, settings: Mapping[str, Any] | None = None) -> None:
        self.device = torch.device(device_type())
        self.path, self.is_dry = path, self.device.type != "cuda"
        self.ends = started() + minutes * 60 - (0 if self.is_dry else LEAVE_SECONDS)
        changes = {"performance.compile": False, **(DRY_RUN if self.is_dry else {}), **(settings or {})}
        self.directory = tempfile.TemporaryDirectory(prefix="benchmark-gpu-")
        self.preset = read_preset(PRESET, changes | {"run.directory": self.directory.name})
        self.vocabulary = self.preset.model.vocab_size - PADDING if self.is_dry else VOCABULARY
        self.base = self.preset  # what rows start from
        self.best: tuple[Config, dict[str, Any]] | None = None  # settings and measurements of the fastest row
        self.reference: dict[str, torch.Tensor] | None = None  # loss and gradient of the baseline
        self.out_of_memory: list[int] = []
        self.peak = peak_flops(self.device, self.preset.precision)
        self.values: dict[str, Any] = {"is_dry_run": self.is_dry, "preset": PRESET, "preset_changes": changes}
        self.values |= {
            "minutes": minutes,
            "peak_flops_is": "the device's data sheet",
            "rows": [],
            "tolerance": LARGEST,
        }

    def run(self) -> None:
        """Everything, the most telling first."""
        machine = self.values["machine"] = describe_machine(start_quietly(self.preset))
        say(f"{machine['device']}, {', '.join(map(' '.join, machine['versions'].items()))}")
        self.part("limits", self.limits)
        for row in FIRST:
            self.row(row)
        self.base = self.best[0] if self.best else self.preset
        self.part("parity", self.parity)
        for row in LATER:
            self.row(row)
        self.values["best"] = self.fastest()
        self.values["seconds"] = time.perf_counter() - started()
        write_json(self.path, self.values)

    def part(self, name: str, action: Callable[[], Any]) -> None:
        """Something that is no row: its result, or why there is none."""
        self.values[name] = self.attempt(action)
        write_json(self.path, self.values)
        if "status" in self.values[name]:
            say(f"{name}: {self.values[name]['status']}: {self.values[name]['reason']}")

    def attempt(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `action`, or `status` and `reason` if there is none. Whatever happens, memory is free afterwards."""
        seconds_left = self.ends - time.perf_counter()
        if seconds_left <= 0:
            return {"status": "skipped", "reason": "the time is over"}
        try:
            with deadline(seconds_left):
                return action()
        except OutOfTime:
            result = {"status": "cut off", "reason": "the time is over"}
        except RecipeError as error:
            result = {"status": "refused", "reason": str(error)}
        except Exception as error:
            is_memory = isinstance(error, DoesNotFit) or is_out_of_memory(error)
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            status = "out of memory" if is_memory else "failed"
            result = {"status": status, "reason": f"{type(error).__name__}: {reason}"}
        finally:
            free_memory(self.device)  # the frames of an exception hold a model until now, or until the next row
        return result

    def limits(self) -> dict[str, Any]:
        """What bounds the rows below, and the peak if no data sheet is known."""
        found = measure_limits(self.preset, self.device)
        if self.peak is None:
            self.peak = max(rate["flops_per_second"] for rate in (*found["matrix_products"], found["square_product"]))
            self.values["machine"]["peak_flops"] = self.peak
            self.values["peak_flops_is"] = "the fastest matrix product measured here"
        free = found["tokens_per_second_if_all_else_were_free"]
        found["mfu_if_all_else_were_free"] = {name: self.mfu(value) for name, value in free.items()}
        shares = [f"{name.replace('_', ' ')} {share(self.mfu(value))}" for name, value in free.items()]
        say(f"limits: MFU if all else were free: {', '.join(shares)}")
        return found

    def parity(self) -> dict[str, Any]:
        """The recipe's own check on this device, in each precision: of a small model, whose gradients can be compared whole.

        Raises:
            RecipeError: gradients that have to agree do not.
        """
        found = {}
        for precision in ("fp32", "bf16"):
            config = with_settings(self.preset, {"precision": precision} | ({} if self.is_dry else PARITY))
            training = Training(config, config.model.vocab_size - PADDING)
            check = check_parity(training.run, training.model, training.first_blocks().batch)
            found[precision] = asdict(check)
            say(f"parity, {precision}: largest difference {check.largest:.1e}, tolerance {check.tolerance:.0e}")
        return found

    def row(self, row: Row) -> None:
        """Measure one combination and write it down."""
        config = with_settings(self.base if row.on_best else self.preset, row.settings)
        size = int(config.batch.micro_batch_size) * row.factor
        config = with_settings(config, {"batch.micro_batch_size": size})
        entry: dict[str, Any] = {
            "name": row.name,
            "settings": differences(config, self.preset),
            "micro_batch_size": size,
            "attention": row.attention,
        }
        reason = None
        if self.is_dry and row.attention in CUDA_ATTENTION:
            reason = "needs CUDA"
        elif size > CHECK_BLOCKS:
            reason = f"only {CHECK_BLOCKS} blocks are compared with the baseline"
        elif row.name.startswith("micro-batch") and any(size > too_large for too_large in self.out_of_memory):
            reason = f"micro-batches of {min(self.out_of_memory)} ran out of memory"
        found: dict[str, Any] = {}  # filled step by step: what was measured before something failed stays
        outcome = {"status": "unavailable", "reason": reason}
        if not reason:
            outcome = self.attempt(lambda: self.measured(row, config, found))
        entry |= found | outcome
        if entry["status"] == "out of memory" and not row.settings.keys() - {"batch.micro_batch_size"}:
            self.out_of_memory.append(size)
        self.values["rows"].append(entry)
        write_json(self.path, self.values)
        say(line(entry))

    def measured(self, row: Row, config: Config, found: dict[str, Any]) -> dict[str, Any]:
        """Build, measure, compare with the baseline; whole updates of a row that becomes the best; profile. Fills `found`."""
        trial = Trial(config, self.vocabulary, row)
        values, first = trial.measure(CHECK_BLOCKS, seconds=0.1 if self.is_dry else 2.4)
        found |= values | {"mfu": self.mfu(values["tokens_per_second"])}
        if not self.is_dry:
            found["device_state"] = nvidia_smi("clocks.sm,power.draw,temperature.gpu")
        if row.name == "baseline":
            self.reference = first
        found |= self.compared(first)
        is_best = not self.best or values["tokens_per_second"] > self.best[1]["tokens_per_second"]
        if is_best and row.is_candidate and found["agrees"]:
            updates = [update | {"mfu": self.mfu(update["tokens_per_second"])} for update in trial.whole_updates(2)]
            found["whole_updates"] = updates
            self.best = config, {"name": row.name, **found}
        found["profile"] = profile_update(lambda: (trial.accumulate(2), trial.step()), self.device)
        found["profile"]["micro_batches"] = min(2, values["micro_batches_per_update"])
        return {"status": "measured"}

    def compared(self, first: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Whether the first loss and gradient are the baseline's."""
        if self.reference is None:
            return {"differences": None, "agrees": False}
        differences = {name: relative_difference([value], [self.reference[name]]) for name, value in first.items()}
        agrees = all(differences[name] <= largest for name, largest in LARGEST.items())  # False if one is not a number
        return {"differences": differences, "agrees": agrees}

    def fastest(self) -> dict[str, Any]:
        """The fastest row that the recipe can be set to, in its faster whole update."""
        if self.best is None:
            return {"status": "skipped", "reason": "no row was measured"}
        config, found = self.best
        settings = differences(config, self.preset)
        update = max(found["whole_updates"], key=lambda update: update["tokens_per_second"])
        say(
            f"best: {found['name']}: {update['tokens_per_second']:,.0f} tokens/s, {share(update['mfu'])} MFU in whole updates, "
            f"{found['peak_memory_bytes'] / 2**30:.1f} GiB; settings {settings or 'of the preset'}"
        )
        kept = {name: found[name] for name in ("name", "peak_memory_bytes", "whole_updates")}
        return {"settings": settings, **kept, **update}

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation; None before the peak is known."""
        return make_plan(self.preset, 1).flops_per_token * tokens_per_second / self.peak if self.peak else None


def line(entry: Mapping[str, Any]) -> str:
    """A row for a person."""
    parts = [f"{entry['name']:<48} micro-batch {entry['micro_batch_size']:>2}"]
    if "agrees" in entry:
        parts.append(f"{entry['tokens_per_second']:>9,.0f} tokens/s  {share(entry['mfu']):>6} MFU")
        planned = f" of {entry['planned_memory_bytes'] / 2**30:.1f} planned" if "peak_reserved_bytes" in entry else ""
        parts.append(f"{entry['peak_memory_bytes'] / 2**30:5.1f} GiB{planned}")  # a CPU's peak is that of the process
        parts += [] if entry["agrees"] else ["DOES NOT AGREE with the baseline"]
    if entry["status"] != "measured":
        return "  ".join([*parts, f"{entry['status']}: {entry['reason']}"])
    profiled = entry["profile"]
    total = sum(profiled["seconds_by_kind"].values()) or 1.0
    mask = " with a MASK" if profiled["mask_reached_attention"] else ""
    shares = [f"{'+'.join(profiled['attention_ran']) or 'unknown'} attention{mask}"]
    shares += [f"{kind} {seconds / total:.0%}" for kind, seconds in list(profiled["seconds_by_kind"].items())[:4]]
    shares += [] if profiled["idle_share"] is None else [f"idle {profiled['idle_share']:.0%}"]
    return "  ".join([*parts, f"({', '.join(shares)})"])


def share(value: float | None) -> str:
    """A percentage, or that it is not known."""
    return "unknown" if value is None else f"{value:.1%}"


@cache
def started() -> float:
    """When the process began, on the clock of `time.perf_counter`: the imports count too."""
    return time.perf_counter() - (time.time() - psutil.Process().create_time())


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - started():5.0f} s] {text}", flush=True)


def main() -> None:
    """Measure on the GPU; without one, or with --dry_run, see on the CPU that everything runs."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the JSON")
    parser.add_argument("--dry_run", action="store_true", help="a small model on the CPU: does every row run?")
    options = parser.parse_args()
    is_dry = options.dry_run or device_type() != "cuda"
    if is_dry:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
        say("a dry run with a small model on the CPU, to see that every row runs; no number counts")
    path = options.out / f"{utc_now()[:10]}-gpu{'-dry-run' if is_dry else ''}.json"
    benchmark = Benchmark(path, options.minutes)
    benchmark.run()
    say(f"written to {path}")
    if any(row["status"] == "cut off" for row in benchmark.values["rows"]):
        benchmark.directory.cleanup()
        os._exit(0)  # a compiler that was interrupted may keep threads that nobody ends
    if benchmark.values["parity"].get("status") == "refused":
        raise RecipeError(benchmark.values["parity"]["reason"], exit_code=1)


if __name__ == "__main__":
    run_command(main)
