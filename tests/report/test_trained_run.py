"""Card and page of a run that was trained: eight updates on one rank, then four on two, with another micro-batch."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from recipe.commands import card as card_command
from recipe.commands import report as report_command
from recipe.config.command_line import load_config
from recipe.report.record import read_record
from recipe.run.ledger import LEDGER, read_lines
from tests.helpers import run_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A finished run with a parity check and two validation sets, its page and its card written by the commands."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(finished, run)
    longer = ["--schedule.total_tokens", "18432", "--batch.micro_batch_size", "5", "--run.directory", str(run)]
    run_ranks(2, ["recipe/train.py", "--config", str(finished / "config.yaml"), *longer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe", str(run)])
        report_command.main()
        card_command.main()
    return run


def test_page_shows_the_numbers_of_the_ledger(directory: Path) -> None:
    ledger, page = read_lines(directory / LEDGER), (directory / "report.html").read_text(encoding="utf-8")
    assert [line["update"] for line in ledger] == list(range(13))
    datasets = json.loads(page.partition('id="page">')[2].partition("</script>")[0])["datasets"]
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"):
        scale = 1e-9 if name == "peak_memory_bytes" else 1
        values = {row["update"]: row["value"] for row in datasets[name]}
        assert values == {line["update"]: pytest.approx(line[name] * scale, rel=1e-5) for line in ledger[1:]}, name
    for name in ("held_out", "mine"):
        column = f"validation/{name}/bits_per_byte"
        values = {row["update"]: row["value"] for row in datasets[column]}
        known = {line["update"]: line[column] for line in ledger if line[column] is not None}
        assert list(known) == [0, 4, 8, 12]
        assert values == {update: pytest.approx(value, rel=1e-5) for update, value in known.items()}
    assert [event["event"] for event in datasets["events"]] == ["resume"]
    for words in (
        f"<b>{ledger[-1]['validation/held_out/loss']:.4f}</b>",
        "12 of 12",
        "ceil(12 blocks of the largest share / 5) = 3",
        "1,536 / (4 x 64 x 1 rank) = 6",
        "batch.micro_batch_size 4 → 5",
    ):
        assert words in page, words


def test_card_shows_the_numbers_of_the_run(directory: Path) -> None:
    text = (directory / "final/README.md").read_text(encoding="utf-8")
    ledger, summary = read_lines(directory / LEDGER), json.loads((directory / "summary.json").read_text("utf-8"))
    after = summary["validation"]["held_out"]["after"]
    words = [
        "18,432 of 18,432 tokens",
        "Each update is 1,536 tokens: 24 blocks of 64, from 8 lanes",
        "| 1 to 8 | 1 | 4 | 6 | 1,536 / (4 x 64 x 1 rank) = 6 |",
        f"| validation set | {after['tokens']:,} tokens, {after['text_bytes']:,} bytes |",
        f"{18432 / summary['parameters']:.2g} tokens per parameter, far fewer than the 20",
        f"python {sys.version.split()[0]}, torch ",
    ]
    for name, title in (("held_out", "held out"), ("mine", "mine")):
        words.append(f"| {title} | before training | {ledger[0][f'validation/{name}/loss']:.4f} |")
        words.append(f"| {title} | after 12 updates | {ledger[-1][f'validation/{name}/loss']:.4f} |")
    for expected in words:
        assert expected in text, expected
    assert (directory / "final/curves.png").read_bytes().startswith(b"\x89PNG")


def test_config_beside_the_model_gives_the_same_configuration(directory: Path) -> None:
    again = load_config(["--config", str(directory / "final/config.yaml"), "--run.directory", str(directory)])
    assert again == read_record(directory).config


def test_snippet_of_the_card_runs(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the run's directory is: the card names none of the author's other ones."""
    monkeypatch.chdir(directory.parent)
    text = (directory / "final/README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(snippet, {})
    assert capsys.readouterr().out.startswith('print("é|😀")')
