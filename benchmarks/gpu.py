"""What one GPU makes of gpt2-1.3b: `benchmarks/gpu.sh`. Its limits, each option on and off, parity, and whole updates.

Needs torch, transformers, accelerate and numpy, no text and no network: the blocks are made up. The most telling rows come
first, each is written down when it is done, and what does not fit into `--minutes` is said to be skipped.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from recipe.run.launch import device_type

from benchmarks.gpu_deadline import OutOfTime, deadline
from benchmarks.gpu_limits import measure_limits
from benchmarks.gpu_machine import machine, nvidia_smi
from benchmarks.gpu_parity import measure_parity
from benchmarks.gpu_profile import profile_update
from benchmarks.gpu_rows import COMPILED, EAGER, Row, unavailable
from benchmarks.gpu_trial import Trial, differences, free_memory, read_preset, synthetic_batch, with_settings
from benchmarks.measure import write_values
from recipe.config.settings import Config
from recipe.errors import RecipeError, run_command
from recipe.model.kernels import check_compiler
from recipe.plan.run_plan import make_plan
from recipe.run.environment import utc_now
from recipe.run.ledger import peak_flops
from recipe.step.parity import TOLERANCE, relative_difference
from recipe.step.update import is_out_of_memory

PRESET = "configs/gpt2-1.3b.yaml"
VOCABULARY = 50_257  # GPT-2's; the embedding has 50,304 rows
# Largest relative differences to the baseline's gradient of the weights that make queries, keys and values. With 24 layers in
# bf16 on a CPU other kernels, fp32 and lean weights gave up to 6e-3 for values and 2e-2 for the others (at initialisation
# they are small differences of large numbers). Attention that is not causal gave 0.7 and 0.7, a wrong scale 0.08 and 7, and a
# loss that leaves out one target in 16 gave 0.1 and 0.1, and 0.06 of the loss.
GRADIENT_TOLERANCE = {"query": 0.2, "key": 0.2, "value": TOLERANCE["bf16"]}
LOSS_TOLERANCE = 1e-3
LEAVE_SECONDS = 15  # for writing, and for the interpreter to end
# A small model for a machine without a GPU: the same rows, to see that each of them runs.
DRY_RUN = {
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.n_head": 2,
    "model.vocab_size": 512,
    "data.sequence_length": 32,
    "batch.tokens_per_update": 1024,
    "batch.lanes": 32,
    "schedule.total_tokens": 1024 * 1000,
    "schedule.warmup_tokens": 1024 * 10,
}


class Benchmark:
    """The rows one after the other, and what they gave.

    Args:
        preset: the settings to start from.
        vocabulary: tokens of the tokenizer that there would be.
        device: where.
        path: of the JSON.
        minutes: for everything, from the start of the process.
        is_dry: a small model, to see that everything runs.
    """

    def __init__(
        self, preset: Config, vocabulary: int, device: torch.device, path: Path, minutes: float, is_dry: bool
    ) -> None:
        self.preset, self.vocabulary, self.device, self.path, self.is_dry = preset, vocabulary, device, path, is_dry
        self.ends = started() + minutes * 60 - (0 if is_dry else LEAVE_SECONDS)
        self.batch = synthetic_batch(preset, vocabulary, device)
        self.check_blocks = 32
        self.base = preset  # what rows start from
        self.best: tuple[Config, dict[str, Any]] | None = None
        self.compile_seconds = 0.0
        self.reference: tuple[float, dict[str, torch.Tensor]] | None = None  # loss and gradient of the baseline
        self.out_of_memory: list[int] = []
        self.peak = peak_flops(device, preset.precision)
        self.values: dict[str, Any] = {
            "benchmark": "gpu",
            "is_dry_run": is_dry,
            "minutes": minutes,
            "preset": PRESET,
            "preset_changes": differences(preset, read_preset(PRESET)),
            "machine": {},
            "peak_flops_is": "the device's data sheet",
            "tolerance": {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE},
            "limits": None,
            "rows": [],
            "parity": None,
            "best": None,
        }

    @property
    def seconds_left(self) -> float:
        """Until the time is over."""
        return self.ends - time.perf_counter()

    def run(self) -> None:
        """Everything, in order of what it tells."""
        self.values["machine"] = machine(self.preset, self.device, self.peak)
        say(
            f"{self.values['machine']['device']}, {', '.join(map(' '.join, self.values['machine']['versions'].items()))}"
        )
        self.save()
        self.part("limits", self.limits, seconds=10)
        for row in EAGER:
            self.row(row)
            self.base = self.best[0] if self.best else self.preset
        self.part("parity", self.parity, seconds=20)
        for row in COMPILED:
            self.row(row)
        self.finish()
        self.values["seconds"] = time.perf_counter() - started()
        self.save()

    def part(self, name: str, action: Callable[[], Any], seconds: float) -> None:
        """Something that is no row: its result, or why there is none."""
        self.values[name] = self.attempt(action, seconds)
        self.save()
        if "status" in self.values[name]:
            say(f"{name}: {self.values[name]['status']}: {self.values[name]['reason']}")

    def attempt(self, action: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
        """The result of `action`; where there is none, `status` and `reason`. Whatever happens, memory is free afterwards."""
        if self.seconds_left < (0 if self.is_dry else seconds):
            return {
                "status": "skipped",
                "reason": f"takes {seconds:.0f} s and more, {max(0, self.seconds_left):.0f} left",
            }
        try:
            with deadline(self.seconds_left):
                return action()
        except OutOfTime:
            result = {"status": "cut off", "reason": "the time was over"}
        except RecipeError as error:
            result = {"status": "refused", "reason": str(error)}
        except Exception as error:
            is_memory = is_out_of_memory(error)
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            result = {
                "status": "out of memory" if is_memory else "failed",
                "reason": f"{type(error).__name__}: {reason}",
            }
        finally:
            free_memory(
                self.device
            )  # the frames of an exception hold a model; they are gone by now, or with the next row
        return result

    def limits(self) -> dict[str, Any]:
        """What bounds the rows below, and the peak where no data sheet is known."""
        found = measure_limits(self.preset, self.device, [4, 8])
        if self.peak is None:
            rates = [product["flops_per_second"] for sizes in found["matrix_products"] for product in sizes["products"]]
            self.peak = max(*rates, found["square_flops_per_second"])
            self.values["peak_flops_is"] = "the fastest matrix product measured here"
            self.values["machine"]["peak_flops"] = self.peak
        for of_size, bound in zip(found["matrix_products"], found["if_all_else_were_free"], strict=True):
            bounds = {n.removeprefix("tokens_per_second_"): v for n, v in bound.items() if n.startswith("tokens")}
            bound |= {f"mfu_{name}": self.mfu(value) for name, value in bounds.items()}
            shares = ", ".join(f"{name.replace('_', ' ')} {share(self.mfu(value))}" for name, value in bounds.items())
            say(
                f"limits, micro-batch {of_size['micro_batch_size']}: matrix products {of_size['flops_per_second'] / 1e12:.3g} "
                f"TFLOP/s; MFU if all else were free: {shares}"
            )
        traffic = found["weight_traffic"]
        say(
            f"limits: square product {found['square_flops_per_second'] / 1e12:.3g} TFLOP/s; weights cast "
            f"{traffic['cast_seconds'] * 1e3:.2f} ms, gradients summed {traffic['gradient_sum_seconds'] * 1e3:.2f} ms "
            "in each micro-batch"
        )
        return found

    def parity(self) -> dict[str, Any]:
        """Each way to the same gradient."""
        found = measure_parity(self.preset, self.device)
        for of_precision in found:
            numbers = [d for d in of_precision["differences"].values() if isinstance(d, float)]
            verdict = "agree" if of_precision["agree"] else "DO NOT AGREE"
            say(
                f"parity, {of_precision['precision']}: {len(numbers)} ways {verdict}: largest difference {max(numbers):.1e}, "
                f"tolerance {of_precision['tolerance']:.0e}"
            )
        return {"agree": all(of_precision["agree"] for of_precision in found), "precisions": found}

    def row(self, row: Row) -> None:
        """Measure one combination and write it down."""
        measured = {entry["name"] for entry in self.values["rows"] if entry["status"] == "measured"}
        if row.instead_of in measured:
            return
        config = with_settings(self.base if row.on_best else self.preset, row.settings)
        size = int(config.batch.micro_batch_size) * row.factor
        config = with_settings(config, {"batch.micro_batch_size": size})
        entry: dict[str, Any] = {
            "name": row.name,
            "settings": differences(config, self.preset),
            "micro_batch_size": size,
            "compiled": "whole" if config.performance.compile is True else "block by block" if row.by_block else "no",
            "compile_options": dict(row.compile_options),
        }
        if size > self.check_blocks:
            entry |= {
                "status": "unavailable",
                "reason": f"only {self.check_blocks} blocks are compared with the baseline",
            }
        elif row.name.startswith("micro-batch") and any(size > too_large for too_large in self.out_of_memory):
            entry |= {
                "status": "unavailable",
                "reason": f"micro-batches of {min(self.out_of_memory)} ran out of memory",
            }
        elif missing := unavailable(config, self.device.type):
            entry |= {"status": "unavailable", "reason": missing}
        else:
            seconds = max(row.seconds, self.compile_seconds + 20) if config.performance.compile is True else row.seconds
            found: dict[str, Any] = {}  # filled step by step: what was measured before something failed stays
            outcome = self.attempt(lambda: self.measured(row, config, found), seconds)
            entry |= found | outcome
        if entry["status"] == "out of memory" and not row.settings.keys() - {"batch.micro_batch_size"}:
            self.out_of_memory.append(size)
        self.values["rows"].append(entry)
        self.save()
        say(line(entry))

    def measured(self, row: Row, config: Config, found: dict[str, Any]) -> dict[str, Any]:
        """Build, measure, compare with the baseline; whole updates where it is the fastest; profile. Fills `found`."""
        options = dict(row.compile_options)
        if row.by_block:
            check_compiler(self.device.type, "compiling block by block")
        if self.is_dry:
            options = {"backend": "aot_eager"}  # the compiler that generates code takes minutes on a small CPU
        trial = Trial(config, self.vocabulary, self.batch, by_block=row.by_block, compile_options=options)
        values, gradient = trial.measure(self.check_blocks, seconds=0.1 if self.is_dry else 2.4)
        found |= values
        found["mfu"] = self.mfu(values["tokens_per_second"])
        if self.device.type == "cuda":
            found["device_state"] = nvidia_smi("clocks.sm,power.draw,temperature.gpu")
        if row.name == "baseline":
            self.reference = values["first_loss"], gradient
        found |= self.compared(values["first_loss"], gradient)
        if config.performance.compile is True:
            self.compile_seconds = values["first_seconds"]
        is_best = not self.best or values["tokens_per_second"] > self.best[1]["tokens_per_second"]
        if is_best and row.is_candidate and found["agrees"]:
            self.best = config, {"name": row.name, **found}
            if row.whole_updates:
                found["whole_updates"] = self.best[1]["whole_updates"] = self.whole(trial, row.whole_updates)
        found["profile"] = profile_update(lambda: (trial.accumulate(2), trial.step()), self.device)
        found["profile"]["micro_batches"] = min(2, values["micro_batches_per_update"])
        return {"status": "measured"}

    def compared(self, loss: float, gradient: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Whether the first loss and gradient are the baseline's."""
        if self.reference is None:
            return {"loss_difference": None, "gradient_differences": None, "agrees": False}
        reference_loss, reference = self.reference
        of_loss = abs(loss - reference_loss) / reference_loss
        of_gradient = {name: relative_difference([g], [reference[name]]) for name, g in gradient.items()}
        agrees = of_loss <= LOSS_TOLERANCE  # not where a difference is not a number
        agrees = agrees and all(of_gradient[name] <= largest for name, largest in GRADIENT_TOLERANCE.items())
        return {"loss_difference": of_loss, "gradient_differences": of_gradient, "agrees": agrees}

    def whole(self, trial: Trial, updates: int) -> list[dict[str, Any]]:
        """Whole updates with `run_update`."""
        done = trial.whole_updates(updates)
        return [values | {"mfu": self.mfu(values["tokens_per_second"])} for values in done]

    def finish(self) -> None:
        """The fastest row the recipe can be set to, with whole updates where there is time."""
        if self.best is None:
            self.values["best"] = {"status": "skipped", "reason": "no row was measured"}
            return
        config, found = self.best
        best = {
            "status": "measured",
            "name": found["name"],
            "settings": differences(config, self.preset),
            "peak_memory_bytes": found["peak_memory_bytes"],
            "estimate": {name: found[name] for name in ("tokens_per_second", "mfu", "update_seconds")},
        }

        def whole() -> dict[str, Any]:
            options = {"backend": "aot_eager"} if self.is_dry else {}
            return {"whole_updates": self.whole(Trial(config, self.vocabulary, self.batch, compile_options=options), 2)}

        whole_updates = found.get("whole_updates")
        if whole_updates is None:
            outcome = self.attempt(
                whole, max(25.0, self.compile_seconds + 20 if config.performance.compile is True else 0.0)
            )
            whole_updates = outcome.pop("whole_updates", None)
            best |= {f"whole_updates_{name}": why for name, why in outcome.items()}
        best["whole_updates"] = whole_updates
        fastest = (
            max(whole_updates, key=lambda update: update["tokens_per_second"]) if whole_updates else best["estimate"]
        )
        best |= {name: fastest[name] for name in ("tokens_per_second", "mfu", "update_seconds")}
        self.values["best"] = best
        what = "whole updates" if whole_updates else "micro-batches and a step"
        say(
            f"best: {best['name']}: {fastest['tokens_per_second']:,.0f} tokens/s, {share(fastest['mfu'])} MFU in {what}, "
            f"{best['peak_memory_bytes'] / 2**30:.1f} GiB; settings {best['settings'] or 'of the preset'}"
        )

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation; None before the peak is known."""
        return make_plan(self.preset, 1).flops_per_token * tokens_per_second / self.peak if self.peak else None

    def save(self) -> None:
        """Write what there is."""
        write_values(self.path, self.values)


def line(entry: Mapping[str, Any]) -> str:
    """A row for a person."""
    parts = [f"{entry['name']:<48} micro-batch {entry['micro_batch_size']:>2}"]
    if "agrees" in entry:
        memory = f"{entry['peak_memory_bytes'] / 2**30:5.1f} GiB"
        if entry["planned_memory_bytes"] and "peak_reserved_bytes" in entry:  # on a CPU the peak is that of the process
            memory += f" of {entry['planned_memory_bytes'] / 2**30:.1f} planned"
        parts.append(f"{entry['tokens_per_second']:>9,.0f} tokens/s  {share(entry['mfu']):>6} MFU  {memory}")
        parts += [] if entry["agrees"] else ["DOES NOT AGREE with the baseline"]
    if entry["status"] != "measured":
        return "  ".join([*parts, f"{entry['status']}: {entry['reason']}"])
    profiled = entry["profile"]
    total = sum(profiled["seconds_by_kind"].values()) or 1.0
    largest = [f"{kind} {seconds / total:.0%}" for kind, seconds in list(profiled["seconds_by_kind"].items())[:4]]
    idle = [] if profiled["idle_share"] is None else [f"idle {profiled['idle_share']:.0%}"]
    attention = f"{'+'.join(profiled['attention_ran']) or 'unknown'} attention"
    mask = [" with a MASK"] if profiled["mask_reached_attention"] else []
    return "  ".join([*parts, f"({', '.join([attention + ''.join(mask), *largest, *idle])})"])


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
    """Measure on the GPU; where there is none, or with --dry_run, see on the CPU that everything runs."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the JSON")
    parser.add_argument("--dry_run", action="store_true", help="a small model on the CPU: does every row run?")
    arguments = parser.parse_args()
    has_cuda = device_type() == "cuda"
    is_dry = arguments.dry_run or not has_cuda
    if is_dry:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
        say(
            "a dry run"
            if arguments.dry_run
            else "no CUDA device: a dry run with a small model on the CPU; no number counts"
        )
    preset = read_preset(PRESET)
    vocabulary = VOCABULARY
    if is_dry:
        preset = with_settings(preset, DRY_RUN)
        vocabulary = preset.model.vocab_size - 3
    path = arguments.out / f"{utc_now()[:10]}-gpu{'-dry-run' if is_dry else ''}.json"
    device = torch.device("cpu" if is_dry else "cuda:0")
    benchmark = Benchmark(preset, vocabulary, device, path, arguments.minutes, is_dry)
    benchmark.run()
    say(f"written to {path}")
    if any(row["status"] == "cut off" for row in benchmark.values["rows"]):
        os._exit(0)  # a compiler that was interrupted may keep threads that nobody ends
    if benchmark.values["parity"].get("agree") is False:
        raise RecipeError("gradients that have to agree do not: do not train with this installation", exit_code=1)


if __name__ == "__main__":
    run_command(main)
