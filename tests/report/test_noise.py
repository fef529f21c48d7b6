"""The gradient noise scale in page and card: what the ledger holds, with an interval that may be open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipe.report.card import model_card
from recipe.report.charts import chart
from recipe.report.curves import Curves
from recipe.report.page import report_page
from recipe.report.record import read_record
from recipe.run.ledger import LEDGER, read_lines
from tests.support.run_files import edit_lines

SCALE = "gradient_noise_scale_tokens"


def test_the_chart_has_scale_band_and_budget(directory: Path) -> None:
    ledger = read_lines(directory / LEDGER)
    curves = Curves([read_record(directory)], ["run"])
    drawn = {row["update"]: row["value"] for row in curves.datasets[SCALE]}
    assert drawn == {line["update"]: line[SCALE] for line in ledger if line[SCALE]}
    top = 2 * max(drawn.values())
    band = {row["update"]: (row["low"], row["value"]) for row in curves.datasets[f"{SCALE}, interval"]}
    assert band == {
        line["update"]: (line[f"{SCALE}_low"], line[f"{SCALE}_high"] or top) for line in ledger if line[f"{SCALE}_low"]
    }
    assert {row["value"] for row in curves.datasets[f"{SCALE}, budget"]} == {1536}
    (metric,) = [metric for metric in curves.metrics if metric.column == SCALE]
    layers = chart(curves, metric, "tokens").to_dict()["layer"]
    kinds = [(layer["mark"]["type"], layer["data"]["name"]) for layer in layers]
    assert kinds[:3] == [("area", f"{SCALE}, interval"), ("line", f"{SCALE}, budget"), ("line", SCALE)]
    assert "gradient_snr" in [metric.column for metric in curves.metrics]


@pytest.mark.slow
def test_page_and_card_say_what_it_is_and_what_it_is_not(directory: Path) -> None:
    record = read_record(directory)
    for text in (report_page([record], ["run"]), model_card(record, directory / "final").content):
        words = " ".join(text.split())
        assert "2,100 tokens (95 %: 1,460 to 3,300)" in words
        assert "arXiv 2505.23971" in words
        assert "a monitor, not a verdict" in words
        assert "0.73" in words, "signal to noise"


@pytest.mark.parametrize(
    ("high", "low", "words"), [(None, 800.0, "above 800 tokens, not determined yet"), (None, None, "")]
)
def test_what_is_not_determined_is_not_shown_as_a_number(directory: Path, high: Any, low: Any, words: str) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        return line | {
            SCALE: None,
            f"{SCALE}_low": low,
            f"{SCALE}_high": high,
            "gradient_snr": None,
            "expected_cosine": None,
        }

    edit_lines(directory / LEDGER, change)
    record = read_record(directory)
    page, card = report_page([record], ["run"]), model_card(record, directory / "final").content
    for text in (page, card):
        assert words in text
        assert ("2505.23971" in text) == (text is card and bool(words))
        assert "nan" not in text.partition('id="page"')[0].lower().replace("finance", "")
