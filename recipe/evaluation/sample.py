"""A sample from a model."""

from __future__ import annotations  # without it, --help prints each Annotated type in full

from dataclasses import dataclass
from typing import Annotated, Any

from recipe.config.settings import AtLeast, AtMost, Below, Count
from recipe.errors import RecipeError


@dataclass(frozen=True)
class GenerateConfig:
    """Sample from a finished model."""

    prompt: str = ""
    """Text to continue. Empty: start a new document."""
    max_new_tokens: Count = 128
    """Tokens to generate at most."""
    temperature: Annotated[float, AtLeast(0), AtMost(1000)] = 0.8
    """0 takes the most likely token each time."""
    top_k: Annotated[int, AtLeast(0), AtMost(2**40)] = 50
    """Sample among this many most likely tokens."""
    seed: Annotated[int, AtLeast(0), Below(2**63)] = 0
    """Seed of the sampling."""


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens to continue."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]


def tokens_to_generate(gpt2: Any, tokenizer: Any, config: GenerateConfig) -> int:
    """How many tokens the model has positions for behind the whole prompt: `max_new_tokens` at most.

    Raises:
        RecipeError: none.
    """
    length, positions = len(prompt_ids(tokenizer, config.prompt)), gpt2.config.n_positions
    if length >= positions:
        raise RecipeError(
            f"the prompt {config.prompt[:40]!r}{'...' if len(config.prompt) > 40 else ''} has {length:,} tokens, and the model "
            f"{positions:,} positions for prompt and continuation: give a prompt of {positions - 1:,} tokens or fewer"
        )
    return min(config.max_new_tokens, positions - length)


def generate(gpt2: Any, tokenizer: Any, config: GenerateConfig) -> str:
    """The whole prompt and its continuation, of `tokens_to_generate` tokens at most.

    Never samples the embedding's padding rows, which are no token of the tokenizer.

    Raises:
        RecipeError: the prompt leaves no position for a continuation.
    """
    import torch
    from transformers import GenerationConfig

    ids = prompt_ids(tokenizer, config.prompt)
    sampling = {"temperature": config.temperature, "top_k": config.top_k} if config.temperature > 0 else {}
    generation = GenerationConfig(
        do_sample=config.temperature > 0,
        max_new_tokens=tokens_to_generate(gpt2, tokenizer, config),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        suppress_tokens=list(range(len(tokenizer), gpt2.config.vocab_size)) or None,
        use_cache=True,
        **sampling,
    )
    inputs = torch.tensor([ids], device=gpt2.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed)
        output = gpt2.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=generation)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
