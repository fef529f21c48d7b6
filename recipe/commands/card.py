"""Write the model card of a run: `python -m recipe card RUN`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from recipe.config.command_line import make_parser, parse
from recipe.errors import RecipeError
from recipe.report.card import card_files
from recipe.report.charts import library
from recipe.report.record import read_record
from recipe.run.files import new_file


@dataclass(frozen=True)
class CardConfig:
    """Write the model card of a run, with its curves, beside the model."""

    output: str | None = None
    """Directory to write README.md, curves.png and config.yaml into. Null: final/ of the run."""
    model_name: str | None = None
    """What the card's snippet loads: a name on the Hub, user/model. Null: the directory that the card is written into."""


def main() -> None:
    """The command."""
    parser = make_parser(CardConfig, "python -m recipe card", "Write the model card of a run, with its curves.")
    parser.add_argument("run", help="Directory of a run, such as runs/quickstart.")
    config, rest = parse(parser, CardConfig, sys.argv[1:])
    run = Path(rest["run"])
    library()  # whoever asks for the card wants its curves
    output = Path(config.output) if config.output else run / "final"
    if not config.output and not output.is_dir():
        read_record(run)
        raise RecipeError(f"{run} is not finished: it has no final/; set --output to another directory")
    if not config.output and output.is_symlink():
        raise RecipeError(f"{output} is a symbolic link: set --output to the directory to write to")
    files = card_files(run, config.model_name or output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if not (output.samefile(run) and name == "config.yaml"):  # the run's own says where it is written
                with new_file(output / name) as file:  # which takes the place of a link
                    file.write_bytes(content)
    except OSError as error:
        raise RecipeError(f"cannot write the card to {output}: {error.strerror or error}; set --output") from None
    print(output / "README.md")
