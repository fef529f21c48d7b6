"""Imported once, by the process that forks the runs: what takes a run longer than a short run."""

import importlib

from recipe.config.command_line import run_parser

for name in (
    *("accelerate", "pandas", "pyarrow.parquet", "tokenizers.trainers", "transformers.convert_slow_tokenizer"),
    *("torch.distributed.checkpoint.hf_storage", "transformers.models.gpt2.modeling_gpt2", "transformers.pipelines"),
    *("recipe.train", "recipe.checkpoint", "recipe.finish", "recipe.model", "recipe.step"),
):
    importlib.import_module(name)
run_parser()  # keeps what it has made
