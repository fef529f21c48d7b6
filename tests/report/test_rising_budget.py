"""The schedule that a page suggests: where the measured noise scale stays above twice the update."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from recipe.config.command_line import load_config
from recipe.config.settings import BudgetChange
from recipe.plan.run_plan import make_plan
from recipe.report.page import report_page
from recipe.report.record import Record, read_record
from recipe.report.rising_budget import rising_budget
from recipe.run.ledger import LEDGER, read_lines
from tests.helpers import TINY
from tests.support.run_files import edit_lines

SIZE, UPDATES = 1536, 200
LOW = "gradient_noise_scale_tokens_low"


def record_of(lows: dict[int, float], *flags: str) -> Record:
    """A run whose scale has these low ends after these updates."""
    length = ["--schedule.total_tokens", str(UPDATES * SIZE), "--schedule.warmup_tokens", str(20 * SIZE)]
    config = load_config([*TINY, "--data.dataset", "python-standard-library", *length, *flags])
    rows = pd.DataFrame({"tokens": [SIZE * update for update in lows], LOW: [*lows.values()]})
    return Record(Path("run"), config, make_plan(config, 1), rows, [], {})


def test_doubles_where_the_low_end_is_above_that_twice_in_a_row() -> None:
    lows = (
        dict.fromkeys(range(1, 30), 2000.0)
        | {30: 3100.0, 31: 3000.0, 32: 3100.0}
        | dict.fromkeys(range(33, 150), 6200.0)
    )
    assert rising_budget(record_of(lows)) == [BudgetChange(33 * SIZE, 2 * SIZE), BudgetChange(37 * SIZE, 4 * SIZE)]


@pytest.mark.parametrize(
    ("lows", "why"),
    [
        (dict.fromkeys(range(1, 19), 1e9), "the warm-up"),
        (dict.fromkeys(range(30, 200), 2 * SIZE), "not above"),
        ({100: 4000.0, 101: float("nan"), 102: 3000.0, 103: 4000.0}, "never twice in a row"),
        ({}, "nothing measured"),
    ],
)
def test_suggests_nothing(lows: dict[int, float], why: str) -> None:
    assert rising_budget(record_of(lows)) == [], why


def test_no_update_is_more_than_a_fiftieth_of_the_run() -> None:
    assert (
        rising_budget(record_of(dict.fromkeys(range(21, 200), 1e9)))[-1].tokens_per_update
        == 4 * SIZE
        == UPDATES * SIZE // 50
    )


def test_a_run_with_a_schedule_gets_no_other() -> None:
    schedule = f"[{{from_tokens: {100 * SIZE}, tokens_per_update: {2 * SIZE}}}]"
    assert rising_budget(record_of(dict.fromkeys(range(21, 200), 1e9), "--batch.schedule", schedule)) == []


@pytest.mark.slow
def test_what_the_page_shows_can_be_pasted(directory: Path) -> None:
    text = (directory / "config.yaml").read_text(encoding="utf-8")
    tokens = int(yaml.safe_load(text)["schedule"]["total_tokens"])
    (directory / "config.yaml").write_text(text.replace(f"total_tokens: {tokens}", f"total_tokens: {100 * tokens}"))
    edit_lines(directory / LEDGER, lambda line: line | {LOW: 1e9, "gradient_noise_scale_tokens_high": None})
    page = report_page([read_record(directory)], ["run"])
    (pasted,) = [line for line in page.splitlines() if "--batch.schedule" in line]
    flag = pasted.removeprefix("<pre>").removesuffix("</pre>").replace("&#39;", "'").split(" ", 1)[1].strip("'")
    config = load_config([*TINY, "--data.dataset", "python-standard-library", "--batch.schedule", flag])
    changes = rising_budget(read_record(directory))
    assert list(config.batch.schedule) == changes
    assert changes
    assert read_lines(directory / LEDGER)[-1][LOW] == 1e9
