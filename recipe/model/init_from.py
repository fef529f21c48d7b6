"""Where a run reads its initial weights and its tokenizer."""

from pathlib import Path

from recipe.config.settings import Config


def initial_model(config: Config, checkpoint: Path | None) -> str | None:
    """`model.init_from`, or the checkpoint that a run resumes from, which has both; None if the run starts from nothing."""
    name = config.model.init_from
    return str(checkpoint) if name and checkpoint else name
