"""Train a GPT-2 from nothing: `accelerate launch recipe/train.py --config configs/quickstart.yaml`. Reads top to bottom."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Launched as a file, Python puts recipe/ first on its path, where evaluate.py would stand for an installed `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.config.command_line import load_config
from recipe.config.settings import Config
from recipe.errors import run_command
from recipe.plan.run_plan import make_plan

if TYPE_CHECKING:
    from recipe.checkpoint.resume import Start


def main() -> None:
    """Parse the command line before anything heavy is imported, so that a mistake is answered at once."""
    train(load_config(sys.argv[1:]))


def train(config: Config) -> None:
    """The whole run, on each rank. Exits with 128 + n where signal n stopped it."""
    from recipe.run.stop import StopRequest

    stop = StopRequest()

    from recipe.checkpoint.resume import find_resume_point, on_spike, restore, roll_back
    from recipe.checkpoint.saver import CheckpointSaver
    from recipe.data.blocks import UpdateReader, make_lanes, next_update
    from recipe.data.sources import open_source
    from recipe.data.tokenizer import load_tokenizer
    from recipe.evaluation.in_run import HELD_OUT, RunEvaluation, ledger_values, read_validation_sets
    from recipe.finish import finish_run
    from recipe.hub.background import Pusher, check_hub
    from recipe.model.gpt2 import build_model, build_optimizer, set_learning_rate
    from recipe.model.init_from import initial_model
    from recipe.model.kernels import compile_model, is_compiled, set_kernels
    from recipe.model.onednn import choose_matmul, use_onednn
    from recipe.model.seeds import seed_dropout
    from recipe.plan.memory import choose_loss
    from recipe.plan.schedule import crosses, learning_rate
    from recipe.run.console import Console
    from recipe.run.directory import begin_run, claim_run_directory, usage
    from recipe.run.environment import describe_machine
    from recipe.run.launch import (
        announced_world_size,
        choose_precision,
        device_type,
        on_main,
        start_accelerator,
        warm_up_ddp,
    )
    from recipe.run.ledger import Ledger, entry_of, peak_flops, start_trackers
    from recipe.step.fit import confirm, resolve_auto_micro_batch
    from recipe.step.micro_batches import MicroBatches
    from recipe.step.parity import parity_check
    from recipe.step.spikes import SpikeDetector
    from recipe.step.update import run_update

    plan = make_plan(config, announced_world_size())
    precision, why = choose_precision(config.precision, device_type())
    accelerator = start_accelerator(config, precision)
    stop.connect(accelerator.num_processes)
    set_kernels(config, accelerator.device, precision)
    loss = choose_loss(config.performance.loss, accelerator.device.type, precision)
    products = choose_matmul(config.performance, accelerator.device.type, precision)
    plan = resolve_auto_micro_batch(plan, config, accelerator, precision)
    rank, directory = accelerator.process_index, Path(config.run.directory)
    console = Console(accelerator.is_main_process, plan.planned_updates)
    console.section("plan", f"{plan}\n  precision           {precision}: {why}")

    # The run directory: held by these ranks alone, and new, or gone on with.
    held: list[object] = []
    on_main(accelerator, lambda: held.append(claim_run_directory(config)))
    start = on_main(accelerator, lambda: find_resume_point(config))
    if start.update >= plan.planned_updates and (directory / "final").is_dir():
        console.section("this run is complete; --resume fresh trains it again", usage(directory / "final"))
        return accelerator.end_training()
    on_main(accelerator, lambda: check_hub(config, console))

    # Data: documents -> tokenizer -> lanes; each rank opens only its own lanes.
    init_from = initial_model(config, start.checkpoint)
    source = open_source(config)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(config, source, init_from)
    validation_sets = read_validation_sets(config, source, tokenizer)

    # Model and optimizer: the only two things accelerate prepares.
    model = build_model(config, len(tokenizer), tokenizer.eos_token_id, init_from, loss=loss)
    if products == "onednn":
        use_onednn(model)
    if is_compiled(config.performance.compile, accelerator.device.type):
        compile_model(model)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optimizer, config.run.seed))
    warm_up_ddp(model, accelerator, config.data.sequence_length)
    plan = confirm(plan, config, model, accelerator, console)
    cut = plan.update

    def read_from(start: Start) -> UpdateReader:
        """Put model, optimizer and lanes where `start` is, and begin to read what comes after it."""
        lanes = make_lanes(config, cut, rank, source, tokenizer)
        if start.checkpoint:
            console.say(f"\n{start}")
            restore(start, model, optimizer, lanes, accelerator=accelerator, plan=cut, precision=precision)
        left = plan.planned_updates - start.update
        skipped = start.skipped_batches
        return UpdateReader(
            lanes,
            cut.blocks_per_lane,
            left,
            accelerator.device,
            done=start.update,
            skipped_batches=skipped,
            stop=stop,
            rank=rank,
        )

    parity = None
    if config.run.parity_check and not start.checkpoint:
        lanes = make_lanes(config, cut, rank, source, tokenizer)
        first = next_update(lanes, cut.blocks_per_lane, accelerator.device).batch
        parity = parity_check(
            model, first, cut, accelerator=accelerator, scaling=config.batch.scaling, precision=precision
        )
    updates = read_from(start)

    # From here on the files in the directory are this run's.
    if previous := on_main(accelerator, lambda: begin_run(config, start)):
        console.say(f"what this run takes the place of is now in {previous}")
    start_trackers(config, accelerator, start.update)
    ledger = Ledger(directory / "ledger.jsonl", accelerator, config.stability.max_skipped_updates)
    peak = peak_flops(accelerator.device, precision)
    machine = describe_machine(accelerator, precision, peak)
    on_main(accelerator, lambda: ledger.event("start", start.update, **machine, loss=loss, matmul=products))
    pusher = Pusher(config, ledger, console, is_main=accelerator.is_main_process, done=start.update)
    saver = CheckpointSaver(
        config, plan, model, optimizer, tokenizer, pusher, accelerator=accelerator, ledger=ledger, console=console
    )
    if start.checkpoint:
        ledger.event(
            "resume", start.update, checkpoint=str(start.checkpoint), changes=start.changes, skipped=start.skipped
        )
    memory = MicroBatches(cut, rank, stop=stop, ledger=ledger, console=console)
    spikes = SpikeDetector(config.stability, start.recent)

    if HELD_OUT not in validation_sets:
        console.say(f"no validation: none of the documents of {source.name} is held out")
    evaluation = RunEvaluation(
        config, validation_sets, model, tokenizer, accelerator=accelerator, stop=stop, ledger=ledger, console=console
    )
    before = after = evaluation.validate(start.update, memory.cut.micro_batch_size)

    model.train()
    console.start(start.update)
    update, is_stopped = start.update, bool(validation_sets) and not before
    while update < plan.planned_updates and not is_stopped:
        update += 1
        started = time.perf_counter()
        blocks = updates.next_update()
        if blocks is None:
            is_stopped = stop.should_stop()
            break
        tokens = update * cut.tokens_per_update
        rate = learning_rate(tokens, plan.total_tokens, config.optimizer, config.schedule)
        set_learning_rate(optimizer, rate)
        result = None
        while result is None and not is_stopped:
            seed_dropout(config.run.seed, update, rank)
            result = run_update(
                model,
                optimizer,
                memory.split(blocks.batch),
                accelerator=accelerator,
                scaling=config.batch.scaling,
                max_grad_norm=config.optimizer.max_grad_norm,
                target_tokens=cut.tokens_per_update,  # packed blocks have no masked target
                stop=stop,
            )
            is_stopped = result is None and not memory.shrink(update)  # else the same update again
        if result is None:
            break  # this update is abandoned; the one before it is saved below
        entry = entry_of(
            update,
            result,
            blocks,
            accelerator=accelerator,
            cut=memory.cut,
            flops_per_token=plan.flops_per_token,
            learning_rate=rate,
            started=started,
            peak=peak,
        )
        spike = spikes.check(entry.loss, entry.grad_norm)
        if spike:
            console.say(f"update {update:,}: {spike}")
            on_spike(config, spike, update, ledger)
        if spike and config.stability.on_spike == "rollback":
            updates.close()
            saver.settle()
            start = on_main(accelerator, partial(roll_back, config, spike, update, blocks.skipped_batches, ledger))
            updates, spikes = read_from(start), SpikeDetector(config.stability, start.recent)
            update = start.update
            continue
        is_last = update == plan.planned_updates
        if is_last or crosses(tokens - cut.tokens_per_update, tokens, config.evaluation.every_tokens):
            after = evaluation.validate(update, memory.cut.micro_batch_size)
            is_stopped = bool(validation_sets) and not after
            evaluation.sample(update)
            entry = replace(entry, **ledger_values(after))
        stall_seconds = saver.snapshot(update, blocks, entry.blocks_sha256, spikes.recent)
        ledger.write(replace(entry, checkpoint_stall_seconds=stall_seconds))
        saver.write()
        console.progress(entry)
    console.finish()
    saver.finish()
    if is_stopped:
        same = "the same command" if config.resume == "auto" else "the same command with --resume auto"
        console.say(f"stopped by {stop.reason}; {same} goes on from here")
        on_main(accelerator, lambda: pusher.finish(stop))
        accelerator.end_training()  # trackers send what they hold
        sys.exit(stop.exit_code)

    if accelerator.is_main_process:
        plain, samples = accelerator.unwrap_model(model), evaluation.samples
        finish_run(config, plan, plain, tokenizer, console, precision, before, after, samples, parity)
    accelerator.end_training()
    pusher.finished_model(plan.planned_updates, directory / "final")
    pusher.finish(stop)  # no rank waits for this one any more


if __name__ == "__main__":
    run_command(main)
