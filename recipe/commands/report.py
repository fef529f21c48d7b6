"""Write one page with the curves of runs: `python -m recipe report RUN [RUN2 ...]` writes RUN/report.html."""

import sys
from dataclasses import dataclass
from pathlib import Path

from recipe.config.command_line import make_parser, parse
from recipe.errors import RecipeError
from recipe.report.page import names_of, report_page
from recipe.report.record import read_record


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of one run, or of several side by side."""

    output: str | None = None
    """File to write. Null: report.html in the directory of the first run."""


def main() -> None:
    """The command."""
    parser = make_parser(ReportConfig, "python -m recipe report", "Write one HTML page with the curves of runs.")
    parser.add_argument("runs", nargs="+", help="Directories of runs, such as runs/quickstart.")
    config, rest = parse(parser, ReportConfig, sys.argv[1:])
    directories = [Path(name) for name in rest["runs"]]
    page = report_page([read_record(directory) for directory in directories], names_of(directories))
    output = Path(config.output) if config.output else directories[0] / "report.html"
    try:
        if not config.output:
            output.unlink(missing_ok=True)  # a link may lead anywhere
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {output}: {error.strerror or error}; set --output") from None
    print(output)
