"""What card and page say of the text: of a mixture each source, of files of token ids their names and no dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.report.card import model_card
from recipe.report.page import report_page
from recipe.report.record import Record, read_record
from recipe.report.summary import rows_of
from recipe.run.ledger import LEDGER
from tests.support.run_files import TOKENS_PER_UPDATE, UPDATES, edit_lines

SOURCES = [
    {"dataset": "user/web:part", "weight": 4.0, "revision": "v1"},
    {"dataset": "user/code", "weight": 2.0, "name": "my_code"},
    {"text_files": ["/home/me/a.txt"], "weight": 1.5},
    {"token_files": ["/home/me/train.bin", "/home/me/val.bin"], "weight": 0.5, "name": "prepared"},
]
LABELS = ["web-part", "my_code", "a", "prepared"]


def with_data(directory: Path, **data: Any) -> Record:
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["data"] |= data
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return read_record(directory)


@pytest.fixture
def mixed(directory: Path) -> Record:
    """The run of `write_run`, as one of a mixture."""

    def add_columns(line: dict[str, Any]) -> dict[str, Any]:
        for number, label in enumerate(LABELS):
            known = line["update"] > 0
            line |= {f"source/{label}/tokens": 100 * (number + 1) + line["update"] if known else None}
            line |= {f"source/{label}/passes": number * line["update"] if known else None}
            line |= {
                f"validation/{label}/{what}": line[f"validation/held_out/{what}"] for what in ("loss", "bits_per_byte")
            }
        return line

    edit_lines(directory / LEDGER, add_columns)
    return with_data(directory, text_files=[], sources=SOURCES)


def test_each_source_has_its_tokens_passes_and_validation(mixed: Record) -> None:
    card, tokens = model_card(mixed, "user/model", has_image=False), [100 * (n + 1) * UPDATES + 78 for n in range(4)]
    data: Any = card.data
    assert data.datasets == ["user/web", "user/code"]
    whats = [
        "user/web, part, split train, revision v1",
        "user/code, default, split train",
        "local files: a.txt",
        "local files of token ids: train.bin, val.bin",
    ]
    shares = [f"{100 * count / (UPDATES * TOKENS_PER_UPDATE):.1f}\N{NO-BREAK SPACE}%" for count in tokens]
    weights = [f"{weight}\N{NO-BREAK SPACE}%" for weight in ("50.0", "25.0", "18.8", "6.2")]
    rows = rows_of(mixed, ()).sources
    passes = ["0", "12", "24", "36"]
    assert [row[:6] for row in rows[1:]] == [
        (*row[:3], f"{row[3]:,}", *row[4:]) for row in zip(LABELS, whats, weights, tokens, shares, passes, strict=True)
    ]
    assert [row[6] for row in rows[3:]] == [
        "one document in 10, by hash of its text",
        "one document in 10, by hash of its tokens, or the files called val",
    ]
    assert (
        f"| my_code | user/code, default, split train | {weights[1]} | {tokens[1]:,} | {shares[1]} | 12 |" in card.text
    )
    assert "| held out, all sources by weight | before training |" in card.text
    assert "| web-part, held out | after 12 updates |" in card.text
    assert "| mine | after 12 updates |" in card.text
    assert "[user/web](https://huggingface.co/datasets/user/web) (web-part, 50.0" in card.text
    assert "/home/me" not in card.text
    results = {result.dataset_name: result for result in data.eval_results or []}
    assert results.keys() == {"all sources by weight, held out", "mine", *(f"{label}, held out" for label in LABELS)}
    assert [results[f"{label}, held out"].dataset_type for label in LABELS] == [
        "user/web",
        "user/code",
        "a",
        "prepared",
    ]
    assert results["web-part, held out"].dataset_revision == "v1"


@pytest.mark.slow
def test_the_page_has_the_table_of_sources(mixed: Record) -> None:
    page = report_page([mixed], ["run"])
    assert "local files of token ids: train.bin, val.bin" in page
    assert f'<td data-label="tokens">{100 * UPDATES + 78:,}</td>' in page
    assert "validation loss, my_code" in page


def test_a_run_over_token_files_names_them_and_no_dataset(directory: Path) -> None:
    record = with_data(directory, text_files=[], token_files=["/home/me/train.bin"])
    card = model_card(record, "user/model", has_image=False)
    data: Any = card.data
    assert data.datasets is None
    assert "trained from random weights on\nfiles of token ids.\n" in card.text
    assert "| source | local files of token ids: train.bin |" in card.text
    assert "| held out | one document in 10, by hash of its tokens, or the files called val |" in card.text
    assert "fineweb" not in card.text
    assert "| split |" not in card.text
    assert {r.dataset_type for r in data.eval_results or []} == {"local-token-files", "mine"}
    assert rows_of(record, ()).sources == []
