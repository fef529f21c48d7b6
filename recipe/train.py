"""Train a GPT-2 from nothing: `accelerate launch recipe/train.py --config configs/quickstart.yaml`. Reads top to bottom."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Launched as a file, Python puts recipe/ first on its path: our folders would shadow installed packages of their names.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.errors import run_command

if TYPE_CHECKING:
    from recipe.checkpoint import ResumePoint
    from recipe.config.settings import Config


def main() -> None:
    """Parse the command line before anything heavy is imported, so that a mistake is answered at once."""
    from recipe.config.command_line import load_config

    train(load_config(sys.argv[1:]))


def train(config: Config) -> None:
    """The whole run, on each rank. Exits with 128 + n if signal n stopped it."""
    from recipe.run import NoiseColumns, Stopped, begin_run, claim_run_directory, start_run

    # ---- 1. The run: what can be refused is refused here -----------------------------------------------------------------
    run = start_run(config)
    config = run.config  # with what the launch says of sharding
    from recipe.checkpoint import CheckpointSaver, agree_on_resume_point, open_text, restore, roll_back
    from recipe.data.blocks import UpdateReader, make_lanes, next_update
    from recipe.data.tokenizer import load_tokenizer
    from recipe.evaluation.in_run import RunEvaluation, read_validation_sets
    from recipe.finish import end_stopped_run, finish_run, has_nothing_left
    from recipe.hub import Pusher, check_hub
    from recipe.model import build_model, build_optimizer, choose_kernels, prepare_model, set_learning_rate, whole_model
    from recipe.step import MicroBatches, SpikeDetector, check_parity, measure_update

    choose_kernels(run)
    run.on_main(lambda: claim_run_directory(run))
    point, planned_updates = agree_on_resume_point(run), run.plan.planned_updates
    if has_nothing_left(run, point.update):
        return run.accelerator.end_training()
    check_hub(run)

    # ---- 2. Data: documents -> tokenizer -> lanes; each rank opens only its own lanes ------------------------------------
    sources, init_from = open_text(run, point), config.model.init_from
    if init_from and point.checkpoint:
        init_from = str(point.checkpoint)  # it has weights and tokenizer
    tokenizer = load_tokenizer(config, sources, init_from, run)
    validation_sets = run.on_main(lambda: read_validation_sets(config, sources, tokenizer))

    # ---- 3. Model and optimizer: the only two things that accelerate prepares --------------------------------------------
    model = prepare_model(run, build_model(run, tokenizer, init_from))
    optimizer = run.accelerator.prepare(build_optimizer(model, config.optimizer, config.run.seed, run.precision))
    micro_batches = MicroBatches(run, model)

    # ---- 4. Begin, or go on from a checkpoint ----------------------------------------------------------------------------
    def begin(point: ResumePoint) -> tuple[UpdateReader, SpikeDetector, NoiseColumns]:
        """Put model, optimizer and lanes where `point` is, and start to read what comes after it."""
        lanes = make_lanes(run, sources, tokenizer)
        restore(run, point, model, optimizer, lanes)
        return UpdateReader(run, lanes, point.update), SpikeDetector(run, point.recent), NoiseColumns(run, point.noise)

    parity = None
    if config.run.parity_check and not point.checkpoint:
        first = next_update(make_lanes(run, sources, tokenizer), run.plan.update_at(1).blocks_per_lane, run.device)
        parity = check_parity(run, model, first.batch)
    (reader, spikes, noise), update = begin(point), point.update
    begin_run(run, update, point.checkpoint)  # from here on the files in the directory are this run's
    if parity:
        run.ledger.event("parity_check", update, **vars(parity))
    if point.checkpoint:
        run.ledger.event(point.event, update, **point.facts())
    pusher = Pusher(run, update)
    saver = CheckpointSaver(run, model, optimizer, tokenizer, on_saved=pusher.push)
    evaluation = RunEvaluation(run, validation_sets, model, tokenizer)

    # ---- 5. The loop -----------------------------------------------------------------------------------------------------
    model.train()
    try:
        evaluation.begin(update)
        run.console.start(update)
        while update < planned_updates:
            started = time.perf_counter()
            blocks = reader.next_update()
            learning_rate = set_learning_rate(run, optimizer, blocks.update)
            result = micro_batches.run_update(optimizer, blocks)  # accumulate, clip once, step once
            entry = noise.add_to(measure_update(run, result, blocks, learning_rate, started))
            spike = spikes.check(entry)
            if spike and config.stability.on_spike == "rollback":
                reader.close()
                saver.wait_and_discard()
                point = run.on_main(partial(roll_back, run, spike, blocks))
                (reader, spikes, noise), update = begin(point), point.update
                continue
            entry = evaluation.add_to(entry)  # once in a while: validation losses and samples
            saver.finish_update(entry, blocks, spikes.recent, noise.sums)  # the ledger's line, at times a checkpoint
            run.console.progress(entry)
            pusher.poll()
            update = entry.update
    except Stopped:  # all ranks have abandoned the open update; the one before it is saved
        pass
    run.console.finish()
    saver.finish()
    if run.stop.is_agreed:
        end_stopped_run(run, pusher, saver)
    finish_run(run, whole_model(run, run.accelerator.unwrap_model(model)), tokenizer, evaluation)
    pusher.push(planned_updates, run.directory / "final")
    pusher.finish()  # no rank waits for this one any more
    saver.raise_failure()


if __name__ == "__main__":
    run_command(main)
