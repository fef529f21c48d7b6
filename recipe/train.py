"""Train a GPT-2 from nothing: `accelerate launch recipe/train.py --config configs/quickstart.yaml`. Reads top to bottom."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# Launched as a file, Python puts recipe/ first on its path, where evaluate.py would stand for an installed `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.command_line import flat_dictionary, load_config
from recipe.config import Config
from recipe.errors import run_command
from recipe.plan import make_plan

if TYPE_CHECKING:
    from recipe.evaluate import Evaluation


def main() -> None:
    """Parse the command line before anything heavy is imported, so that a mistake is answered at once."""
    train(load_config(sys.argv[1:]))


def train(config: Config) -> None:
    """The whole run, on each rank."""
    from recipe.launch import announced_world_size, choose_precision, device_type, start_accelerator

    plan = make_plan(config, announced_world_size())
    precision, why = choose_precision(config.precision, device_type())

    from recipe.console import Console
    from recipe.data import make_lanes, next_update, pack_validation, read_updates, split_into_micro_batches
    from recipe.evaluate import evaluate
    from recipe.export import export_model
    from recipe.generate import GenerateConfig, generate
    from recipe.ledger import Ledger, entry_of, peak_flops
    from recipe.model import build_model, build_optimizer, seed_dropout
    from recipe.parity import parity_receipt
    from recipe.run_directory import begin_run, make_run_directory, usage, write_summary
    from recipe.schedule import crosses, learning_rate
    from recipe.sources import open_source
    from recipe.tokenizer import load_tokenizer
    from recipe.update import run_update

    accelerator = start_accelerator(config, precision)
    rank, is_main, directory = accelerator.process_index, accelerator.is_main_process, Path(config.run.directory)
    console = Console(is_main, plan.planned_updates)
    console.section("plan", f"{plan}\n  precision           {precision}: {why}")
    if is_main:
        make_run_directory(config)
    accelerator.wait_for_everyone()

    # Data: documents -> tokenizer -> lanes; each rank opens only its own lanes.
    source = open_source(config)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(config, source)
    validation = pack_validation(
        source.validation_documents(), tokenizer, config.data.sequence_length, config.evaluation.tokens
    )
    lanes = make_lanes(config, plan.update, rank, source, tokenizer)
    updates = read_updates(lanes, plan.update.blocks_per_lane, plan.planned_updates)

    # Model and optimizer: the only two things accelerate prepares.
    model = build_model(config, len(tokenizer), tokenizer.eos_token_id)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optimizer))
    if is_main and (previous := begin_run(config)):
        console.say(f"the earlier run in {directory} is now in {previous}")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("token-budget-recipe", config=flat_dictionary(config))
    ledger = Ledger(directory / "ledger.jsonl", accelerator)
    peak = peak_flops(accelerator.device, precision)

    receipt = None
    if config.run.parity_receipt:
        first = next_update(make_lanes(config, plan.update, rank, source, tokenizer), plan.update.blocks_per_lane)
        receipt = parity_receipt(
            model, first.blocks, plan.update, accelerator=accelerator, scaling=config.batch.scaling, precision=precision
        )

    def validate(update: int) -> Evaluation | None:
        if validation is None:
            return None
        evaluation = evaluate(model, validation, accelerator=accelerator, rows=config.batch.micro_batch_size)
        console.say(f"validation after {update:,} updates: {evaluation}")
        return evaluation

    if validation is None:
        console.say(f"no validation: none of the documents of {source.name} is held out")
    before = after = validate(0)

    model.train()
    console.start()
    for update in range(1, plan.planned_updates + 1):
        started = time.perf_counter()
        blocks = next(updates)
        tokens = update * plan.update.tokens_per_update
        rate = learning_rate(tokens, plan.total_tokens, config.optimizer, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if config.model.dropout:
            seed_dropout(config.run.seed, update, rank)
        result = run_update(
            model,
            optimizer,
            split_into_micro_batches(blocks.blocks, plan.update, rank, accelerator.device),
            accelerator=accelerator,
            scaling=config.batch.scaling,
            max_grad_norm=config.optimizer.max_grad_norm,
            target_tokens=plan.update.tokens_per_update,  # packed blocks have no masked target
        )
        entry = entry_of(
            update,
            result,
            blocks,
            accelerator=accelerator,
            plan=plan,
            learning_rate=rate,
            started=started,
            peak=peak,
        )
        is_last = update == plan.planned_updates
        if is_last or crosses(tokens - plan.update.tokens_per_update, tokens, config.evaluation.every_tokens):
            after = validate(update)
            if after:
                entry = replace(entry, validation_loss=after.loss, bits_per_byte=after.bits_per_byte)
        ledger.write(entry)
        console.progress(entry)
    console.finish()
    ledger.close()

    if is_main:
        gpt2 = accelerator.unwrap_model(model).gpt2.eval()
        export_model(gpt2, tokenizer, directory / "final")
        write_summary(directory / "summary.json", plan, precision, before, after, receipt)
        sampling = GenerateConfig(config.evaluation.prompt, config.evaluation.sample_tokens, seed=config.run.seed)
        if before and after:
            console.section("validation", f"  before  {before}\n  after   {after}")
        console.section("sample", generate(gpt2, tokenizer, sampling))
        if receipt:
            console.section("parity receipt", receipt)
        console.section("finished model", usage(directory / "final"))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
