"""`python -m recipe COMMAND ...`: the commands of the recipe in one list. Imports nothing heavy."""

import sys
from importlib import import_module

from recipe.errors import RecipeError, run_command

COMMANDS = {
    "plan": "Print every derived number of a run, with its derivation.",
    "train": "Train a GPT-2 in this process.",
    "launch": "Train in several processes: accelerate launch, but signals and exit codes are passed on.",
    "branch": "Compare budgets from a checkpoint on, by training, and print the largest that loses nothing.",
    "evaluate": "Loss, perplexity and bits per byte of a model on text.",
    "generate": "Print a sample from a model.",
    "noise": "Measure the gradient noise scale at a checkpoint.",
    "report": "Write one HTML page with the curves of runs.",
    "card": "Write the model card of a run.",
    "prepare": "Write text as files of token ids, once, to train from.",
    "push": "Push what a run has not pushed to the Hub.",
}


def main() -> None:
    """List the commands, or run one with the arguments after it.

    Raises:
        RecipeError: there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m recipe COMMAND ...\n")
        print("\n".join(f"  {name:<10}{line}" for name, line in COMMANDS.items()))
        print("\npython -m recipe COMMAND --help lists the settings of a command.")
    elif name not in COMMANDS:
        raise RecipeError(f"{name} is not a command: choose one of {', '.join(COMMANDS)}")
    else:
        sys.argv[:2] = [f"python -m recipe {name}"]
        import_module("recipe.train" if name == "train" else f"recipe.commands.{name}").main()


def run() -> None:
    """The console script `recipe`."""
    run_command(main)


if __name__ == "__main__":
    run()
