"""What shuffling the blocks of a lane does to the quickstart: `python -m benchmarks.shuffling`.

Trains it for each number of shuffled blocks and each seed, and prints the validation loss on the way; the largest rise of the
training loss, as a running median over 21 updates, after warm-up; and the noise of an update's gradient: its variance at one
model's weights, against that of as many blocks drawn independently of each other (1.0).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from benchmarks.results import command_line, table, write_result
from benchmarks.training import read_preset, start_quietly
from recipe.data.blocks import make_lanes, next_update
from recipe.data.sources import open_source
from recipe.data.tokenizer import load_tokenizer
from recipe.model.export import load_pretrained

PRESET = "benchmarks/plain.yaml"
SETTLED_UPDATE = 40  # the end of warm-up; windows have their size by then
MEASURED_UPDATES = 100  # whose gradients are taken
MEDIAN_OF = 21  # updates of the running median


def train(directory: Path, shuffle_blocks: int, seed: int) -> pd.DataFrame:
    """The ledger of a quickstart, which begins with the evaluation before it."""
    data = ["--data.shuffle_blocks", str(shuffle_blocks), "--data.cache_directory", str(directory.parent / "cache")]
    more = ["--run.seed", str(seed), "--run.parity_check", "false", "--evaluation.sample_tokens", "null"]
    command = [sys.executable, "recipe/train.py", "--config", PRESET, "--run.directory", str(directory), *data, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return pd.read_json(directory / "ledger.jsonl", lines=True)


def largest_rise(ledger: pd.DataFrame) -> float:
    """By how many nats the smoothed training loss gets above what it has been."""
    loss = ledger["loss"][ledger["update"] > SETTLED_UPDATE].rolling(MEDIAN_OF, center=True).median()
    return float((loss - loss.cummin()).max())


def noise_per_block(model: Path, shuffle_blocks: int, seed: int) -> float:
    """Blocks of an update times the variance of its gradient, over that of a block's gradient; 1.0: independent blocks."""
    settings = {"data.shuffle_blocks": shuffle_blocks, "run.seed": seed}
    config = read_preset(PRESET, {**settings, "data.cache_directory": str(model.parent.parent / "cache")})
    run, (gpt2, tokenizer) = start_quietly(config), load_pretrained(str(model))
    gpt2.eval()
    sources = [open_source(config)]
    assert load_tokenizer(config, sources).get_vocab() == tokenizer.get_vocab()
    lanes, per_lane = make_lanes(run, sources, tokenizer), run.plan.update.blocks_per_lane
    squares = {"block": 0.0, "update": 0.0}  # sums of squared norms
    total: Any = 0.0
    count = 0
    for update in range(SETTLED_UPDATE + MEASURED_UPDATES):
        blocks = next_update(lanes, per_lane, run.device)
        if update < SETTLED_UPDATE:  # until windows have their size
            continue
        of_update: Any = 0.0
        for inputs, targets in zip(*blocks.batch, strict=True):
            gpt2.zero_grad()
            loss = torch.nn.functional.cross_entropy(gpt2(inputs[None]).logits[0], targets)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in gpt2.parameters() if p.grad is not None]).double()
            squares["block"] += gradient.square().sum().item()
            of_update += gradient
            count += 1
        squares["update"] += (of_update / len(blocks.blocks)).square().sum().item()
        total += of_update
    true = (total / count).square().sum().item()
    of_block = (squares["block"] - count * true) / (count - 1)
    of_update = (squares["update"] - MEASURED_UPDATES * true) / (MEASURED_UPDATES - 1)
    return count / MEASURED_UPDATES * of_update / of_block


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> None:
    """Train, measure, write the result."""
    parser = command_line("shuffling", __doc__)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[1, 32, 128, 480], help="values of data.shuffle_blocks"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--runs", type=Path, help="directory of the trainings, which are kept and need not be done again"
    )
    options = parser.parse_args()
    rows, values = [], dict[str, Any]()
    with nullcontext(options.runs) if options.runs else TemporaryDirectory() as root:
        for blocks in options.blocks:
            ledgers = {seed: train(Path(root, f"{blocks}-{seed}"), blocks, seed) for seed in options.seeds}
            losses = [ledger.dropna(subset="validation/held_out/loss") for ledger in ledgers.values()]
            by_update = {
                int(update): [
                    float(loss.set_index("update").loc[update, "validation/held_out/loss"]) for loss in losses
                ]
                for update in losses[0]["update"][1:]
            }
            model = Path(root, f"{options.blocks[0]}-{options.seeds[0]}", "final")  # the same for all
            measured = {
                **{f"validation loss after {update}": found for update, found in by_update.items()},
                "largest rise of the training loss": [largest_rise(ledger) for ledger in ledgers.values()],
                "noise per block": [noise_per_block(model, blocks, seed) for seed in options.seeds],
            }
            values[str(blocks)] = measured
            rows.append({"shuffle_blocks": str(blocks), **{k: mean_and_spread(v) for k, v in measured.items()}})
            print(rows[-1], flush=True)
    text = "Blocks of a lane shuffled among themselves\n\n"
    text += (
        f"The quickstart, {len(options.seeds)} seeds: mean and standard deviation; losses in nats. See the module.\n\n"
    )
    write_result("shuffling", options, {"seeds": options.seeds, "measured": values}, text + table(rows))


if __name__ == "__main__":
    main()
