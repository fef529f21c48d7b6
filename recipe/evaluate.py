"""Validation loss, perplexity and bits per byte. `python -m recipe.evaluate MODEL --data.text_files ...`."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from recipe.command_line import make_parser, parse
from recipe.config import BatchConfig, Config, DataConfig, check_bounds
from recipe.errors import RecipeError, run_command

if TYPE_CHECKING:
    from recipe.data import ValidationSet
    from recipe.stop import StopRequest


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a validation set.

    Args:
        loss: mean over the targets, in nats per token.
        bits_per_byte: total bits over the UTF-8 bytes of the text; comparable between tokenizers.
        tokens: targets.
        text_bytes: UTF-8 bytes.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte"


def evaluate(
    model: Any, validation: ValidationSet, *, accelerator: Any, rows: int, stop: StopRequest | None = None
) -> Evaluation | None:
    """Evaluate on all ranks, each with its share of the blocks; None where a rank was asked to stop meanwhile.

    Args:
        model: a prepared `CausalLanguageModel`; its train or eval mode is restored.
        validation: the blocks; the same on every rank.
        accelerator: says which share is this rank's.
        rows: blocks in one forward.
        stop: looked at between forwards.
    """
    import torch

    from recipe.data import to_tensors

    rank, ranks = accelerator.process_index, accelerator.num_processes
    blocks = validation.blocks
    share = blocks[len(blocks) * rank // ranks : len(blocks) * (rank + 1) // ranks]
    plain = accelerator.unwrap_model(model)  # keeps autocast, leaves DDP: ranks may hold unequal numbers of blocks
    was_training = plain.training
    plain.eval()
    losses = []
    with torch.no_grad():
        for first in range(0, len(share), rows):
            if stop is not None and stop.signal:
                break
            inputs, targets = to_tensors(share[first : first + rows], accelerator.device)
            losses.append(plain(inputs, targets).float())
    plain.train(was_training)
    if stop is not None and stop.agreed():
        return None
    local = torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device)
    nats = float(accelerator.reduce(local, reduction="sum"))
    return Evaluation(
        loss=nats / validation.tokens,
        bits_per_byte=nats / math.log(2) / validation.text_bytes,
        tokens=validation.tokens,
        text_bytes=validation.text_bytes,
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a finished model on text."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text: all of data.text_files, or the held-out part of data.dataset. The tokenizer and length are the model's."""
    tokens: int | None = None
    """Stop after this many tokens, rounded to whole documents. Null: all of the text."""
    micro_batch_size: int = 8
    """Blocks in one forward."""


def main() -> None:
    """The command."""
    parser = make_parser(
        EvaluateConfig, "python -m recipe.evaluate", "Loss, perplexity and bits per byte of a model on text."
    )
    parser.add_argument("model", help="Directory of a finished model, or its name on the Hub.")
    config, rest = parse(parser, EvaluateConfig, sys.argv[1:])
    check_bounds(config, {"tokens": (1, False), "micro_batch_size": (1, False), "data.sequence_length": (2, False)})

    from accelerate import Accelerator

    from recipe.data import pack_validation
    from recipe.export import load_pretrained
    from recipe.launch import device_type
    from recipe.model import CausalLanguageModel
    from recipe.sources import open_source

    gpt2, tokenizer = load_pretrained(rest["model"])
    length = min(config.data.sequence_length, gpt2.config.n_positions)
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as cache:  # Windows removes no file that is still mapped
        one_in = 0 if config.data.text_files else config.data.validation_one_in
        data = replace(config.data, cache_directory=config.data.cache_directory or cache, validation_one_in=one_in)
        source = open_source(Config(data=data, batch=BatchConfig(lanes=1)))
        documents = source.training_documents() if data.text_files else source.validation_documents()
        validation = pack_validation(documents, tokenizer, length, config.tokens or math.inf)
    if validation is None:
        raise RecipeError(f"no text to evaluate in {source.name}")
    accelerator = Accelerator(cpu=device_type() == "cpu")
    model = accelerator.prepare(CausalLanguageModel(gpt2, len(tokenizer)))
    result = evaluate(model, validation, accelerator=accelerator, rows=config.micro_batch_size)
    assert result is not None  # nobody asks this command to stop
    print(f"text           {result.tokens:,} tokens, {result.text_bytes:,} bytes of {source.name}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")


if __name__ == "__main__":
    run_command(main)
