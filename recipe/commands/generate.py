"""Print a sample from a model: `python -m recipe generate MODEL --prompt "..."`."""

import sys

from recipe.config.command_line import make_parser, parse
from recipe.evaluation.sample import GenerateConfig, generate, tokens_to_generate


def main() -> None:
    """The command."""
    parser = make_parser(GenerateConfig, "python -m recipe generate", "Print a sample from a model.")
    parser.add_argument("model", help="Directory of a finished model, or its name on the Hub.")
    config, rest = parse(parser, GenerateConfig, sys.argv[1:])

    from recipe.model.export import load_pretrained

    gpt2, tokenizer = load_pretrained(rest["model"])
    gpt2.eval()
    if (count := tokens_to_generate(gpt2, tokenizer, config)) < config.max_new_tokens:
        print(f"note: {count:,} tokens at most: the model has {gpt2.config.n_positions:,} positions", file=sys.stderr)
    print(generate(gpt2, tokenizer, config))
