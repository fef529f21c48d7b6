"""The report page: what it shows is what the ledger holds, in a real browser, on a screen and on a phone, light and dark."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from recipe.report.page import report_page
from recipe.report.record import read_record
from recipe.report.smoothing import running_median, thin
from tests.helpers import TINY, read_ledger, read_ledger_lines, run, run_ranks, train, write_texts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

UPDATES = 12
SAMPLE = '<b>not bold</b> </script><script>document.title = "stolen"</script>'
# Overlapping pairs among all texts that can be seen, and texts that are cut off at the window or at their picture's edge.
FAULTS_OF_TEXT = """() => {
  const boxes = [], faults = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = parent.closest("svg"), rects = svg ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const r of rects) {
      if (r.width < 1 || r.height < 1 || (svg && +getComputedStyle(parent).opacity === 0)) continue;
      boxes.push({ text: node.data.trim().slice(0, 40), l: r.left + 1, r: r.right - 1, t: r.top + 2, b: r.bottom - 2 });
      const frame = svg ? svg.getBoundingClientRect() : { left: 0, right: innerWidth };
      if (!parent.closest(".scroll") && (r.left < frame.left - 1 || r.right > frame.right + 1))
        faults.push("cut off: " + node.data.trim());
    }
  }
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
    if (a.l < b.r && b.l < a.r && a.t < b.b && b.t < a.b) faults.push(`overlap: ${a.text} | ${b.text}`);
  }));
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the window");
  return [boxes.length, faults];
}"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: six updates on one rank, then on two with another micro-batch; a few events of kinds still to come."""
    root = tmp_path_factory.mktemp("report")
    write_texts(root / "texts", count=60)
    arguments = [
        *[*TINY, "--run.directory", str(root / "run"), "--data.text_files", f"{root}/texts/*.txt"],
        *["--data.validation_one_in", "10", "--evaluation.every_tokens", "4608", "--schedule.total_tokens", "18432"],
        *["--evaluation.sets.mine", f"{root}/texts/00*.txt"],
    ]
    first = train(*arguments, "--run.max_updates", "6", "--batch.micro_batch_size", "8")
    assert first.returncode == 0, first.stderr
    run_ranks(2, ["recipe/train.py", *arguments, "--batch.micro_batch_size", "5"])
    events: list[dict[str, Any]] = [
        {"event": "sample", "update": 6, "prompt": "import", "text": "import os"},
        {"event": "sample", "update": 12, "prompt": "import", "text": f"import {SAMPLE}"},
        {"event": "spike", "update": 9, "loss": 9.0, "z": 7.5},
        {"event": "something_new", "update": 10, "numbers": [1, None], "nested": {"a": {"b": True}}},
    ]
    with (root / "run/ledger.jsonl").open("a", encoding="utf-8") as ledger:
        ledger.writelines(json.dumps(event) + "\n" for event in events)
    return root / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, as the system has it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (on Debian: apt install chromium)")
    quiet = ["--disable-gpu", "--disable-quic", "--disable-sync", "--disable-component-update", "--no-sandbox"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=quiet)
        yield chromium
        chromium.close()


def open_page(browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> tuple[Page, list[str]]:
    """(the page with its curves drawn, what went wrong: console messages, errors, requests but for the file itself)."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn=tokens]", timeout=30_000)
    return page, wrong


def write_page(path: Path, *directories: Path) -> str:
    page = report_page([read_record(directory) for directory in directories], [d.name for d in directories])
    path.write_text(page, encoding="utf-8")
    return page


def data_of(page: str) -> dict[str, list[dict[str, Any]]]:
    """What the charts are drawn from, out of the page's text."""
    datasets = json.loads(page.partition('id="page">')[2].partition("</script>")[0])["datasets"]
    assert isinstance(datasets, dict)
    return datasets


@pytest.fixture(scope="module")
def page_file(directory: Path) -> Path:
    """Written by the command, as a user does."""
    done = run([sys.executable, "-m", "recipe", "report", str(directory)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(directory / "report.html")
    return directory / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_opens_with_no_error_no_request_and_no_text_over_another(
    browser: Browser, page_file: Path, width: int, scheme: str
) -> None:
    page, wrong = open_page(browser, page_file, width, scheme)
    for axis in ("time", "tokens"):
        page.locator(f"input[value={axis}]").locator("..").click()
        page.wait_for_selector(f"html[data-drawn={axis}]")
        texts, faults = page.evaluate(FAULTS_OF_TEXT)
        assert texts > 150, "it looked at the texts"
        assert faults == []
    assert wrong == []
    assert page.title().startswith("run")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 18, 23)"}[scheme]
    page.add_style_tag(content=".tile span, .tile b { position: absolute } h1 { margin-left: 370px }")
    _, faults = page.evaluate(FAULTS_OF_TEXT)
    assert any(fault.startswith("overlap") for fault in faults), "the check sees an overlap"
    assert any(fault.startswith("cut off") for fault in faults) or width > 390, "and a text beyond the edge"
    page.close()


def test_page_shows_the_numbers_of_the_ledger(browser: Browser, directory: Path, page_file: Path) -> None:
    ledger, datasets = read_ledger(directory), data_of(page_file.read_text(encoding="utf-8"))
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
        drawn = {row["update"]: row["value"] for row in datasets[name]}
        assert drawn == {entry["update"]: pytest.approx(entry[name], rel=1e-5) for entry in ledger}, name
    assert [row["tokens"] for row in datasets["loss"]] == [entry["tokens"] for entry in ledger]
    minutes = np.cumsum([entry["update_seconds"] for entry in ledger]) / 60
    assert [row["time"] for row in datasets["loss"]] == pytest.approx(minutes.tolist(), rel=1e-5)
    evaluated = [entry for entry in ledger if "bits_per_byte" in entry]
    assert len(evaluated) >= 4
    of_mine = [entry["validation"]["mine"]["bits_per_byte"] for entry in evaluated]
    assert [row["value"] for row in datasets["bits_per_byte/mine"]] == pytest.approx(of_mine, rel=1e-5)
    for name in ("validation_loss", "bits_per_byte"):
        assert [row["value"] for row in datasets[name]] == pytest.approx([e[name] for e in evaluated], rel=1e-5)
    page, _ = open_page(browser, page_file)
    shown = page.locator("main").inner_text()
    for words in (
        f"{ledger[-1]['validation_loss']:.4f}",
        f"{ledger[-1]['bits_per_byte']:.4f}",
        f"{np.median([entry['tokens_per_second'] for entry in ledger]):,.0f} tokens/s",
        "18,432",
        "12 of 12",
        "ceil(12 blocks of the largest share / 5) = 3",
        "1,536 / (8 x 64 x 1 rank) = 3",
        "batch.micro_batch_size 8 → 5",
    ):
        assert words in shown, words
    page.close()


def test_events_are_marked_on_every_curve_and_samples_are_plain_text(browser: Browser, page_file: Path) -> None:
    page, _ = open_page(browser, page_file)
    charts = page.locator("[data-chart]")
    assert charts.count() >= 6
    for number in range(charts.count()):
        for event in ("resume", "spike", "something"):
            marks = charts.nth(number).locator(f"path[aria-label*='event: {event}']")
            assert marks.count() == 1, (number, event)
    charts.first.scroll_into_view_if_needed()
    mark = charts.first.locator("path[aria-label*='event: spike']").bounding_box()
    assert mark is not None
    for nudge in (0, 0.5):
        page.mouse.move(mark["x"] + mark["width"] / 2 + nudge, mark["y"] + mark["height"] / 2)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "loss 9; z 7.5" in page.locator("#vg-tooltip-element").inner_text()
    assert SAMPLE in page.locator("details[open] pre").inner_text()
    assert page.title() != "stolen"
    assert page.locator("pre b").first.inner_text() == "import", "the prompt is told apart"
    page.close()


def test_a_wrong_number_in_the_ledger_shows(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "run")
    lines = read_ledger_lines(directory)
    for line in lines:
        if "event" not in line and line["update"] == 7:
            line["loss"] = 123.456
        if "validation_loss" in line and line["update"] == UPDATES:
            line["validation_loss"] = 7.6543
    (tmp_path / "run/ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = write_page(tmp_path / "report.html", tmp_path / "run")
    assert [row["value"] for row in data_of(page)["loss"] if row["update"] == 7] == [123.456]
    assert "<b>7.6543</b>" in page


def test_damaged_and_missing_values_leave_a_page(browser: Browser, directory: Path, tmp_path: Path) -> None:
    """Not finite, null, absent, of another type, half a line; a ledger that goes back; a setting of an earlier version."""
    shutil.copytree(directory, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_text(encoding="utf-8")
    (tmp_path / "run/config.yaml").write_text(
        config.replace("run:\n", "run:\n  no_longer_a_setting: 3\n"), encoding="utf-8"
    )
    entries = [line for line in read_ledger_lines(directory) if "event" not in line]
    entries[2] |= {"loss": "nan", "grad_norm": None, "update_seconds": "inf", "tokens_per_second": [1]}
    del entries[3]["mfu"], entries[3]["peak_memory_bytes"], entries[3]["world_size"]
    lines = [json.dumps(entry) for entry in [*entries, *[entry | {"loss": 6.5} for entry in entries[8:10]]]]
    lines += ["[]", "{}", '{"event": 5, "update": 3}', '{"event": "x", "update": 1e999}', '{"update": 13, "lo']
    (tmp_path / "run/ledger.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "run/summary.json").unlink()
    page = write_page(tmp_path / "report.html", tmp_path / "run")
    drawn = data_of(page)["loss"]
    assert [row["update"] for row in drawn] == [1, 2, 4, 5, 6, 7, 8, 9, 10], "written on from update 9: 10 is the last"
    assert [row["value"] for row in drawn[-2:]] == [6.5, 6.5]
    opened, wrong = open_page(browser, tmp_path / "report.html")
    assert wrong == []
    opened.close()


def test_a_long_ledger_gives_a_small_page_that_keeps_its_spikes(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(directory / "config.yaml", tmp_path / "run")
    entry = read_ledger(directory)[0]
    with (tmp_path / "run/ledger.jsonl").open("w", encoding="utf-8") as ledger:
        for update in range(1, 50_001):
            values = {"update": update, "tokens": update * 1536, "loss": 3 + math.sin(update * 0.7) / 5}
            values |= {"loss": 8.25} if update == 33_333 else {}
            ledger.write(json.dumps(entry | values) + "\n")
            if update % 10 == 0:
                ledger.write(json.dumps({"event": "skipped_update", "update": update}) + "\n")
    page = write_page(tmp_path / "report.html", tmp_path / "run")
    assert len(page) < 2_500_000
    assert "skipped update (5,000)" in page
    assert [row["value"] for row in data_of(page)["loss"] if row["update"] == 33_333] == [8.25]


def test_runs_are_compared(browser: Browser, directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "other")
    config = (tmp_path / "other/config.yaml").read_text(encoding="utf-8")
    (tmp_path / "other/config.yaml").write_text(config.replace("beta2: 0.95", "beta2: 0.99"), encoding="utf-8")
    output = ["--output", str(tmp_path / "both.html")]
    done = run([sys.executable, "-m", "recipe", "report", str(directory), str(tmp_path / "other"), *output])
    assert done.returncode == 0, done.stderr
    page, wrong = open_page(browser, tmp_path / "both.html", 390)
    assert page.evaluate(FAULTS_OF_TEXT)[1] == wrong == []
    differing = page.locator("table", has_text="optimizer.beta2").inner_text().split()
    assert differing[differing.index("optimizer.beta2") + 1 :] == ["0.95", "0.99"]
    names = page.evaluate("[...new Set(page.datasets.loss.map((row) => row.run))]")
    assert [Path(name).name for name in names] == ["run", "other"]
    page.close()


def test_thinning_keeps_the_extremes_of_every_bucket() -> None:
    chance = np.random.default_rng(0)
    values = chance.normal(size=10_000)
    values[[0, 17, 5_000]] = [np.nan, np.inf, 50.0]
    rows = thin(values, 100)
    assert len(rows) <= 202
    assert np.isfinite(values[rows]).all()
    assert {1, 5_000, 9_999} <= set(rows.tolist())
    for bucket in np.array_split(np.flatnonzero(np.isfinite(values)), 100):
        assert {bucket[values[bucket].argmin()], bucket[values[bucket].argmax()]} <= set(rows.tolist())
    assert running_median(np.array([1.0, 2.0, 90.0, np.nan, 4.0]), 3, np.array([0, 1, 3])).tolist() == [1.5, 2.0, 47.0]


@pytest.mark.parametrize("command", ["recipe.report.page", "recipe.report.card"])
def test_what_cannot_be_shown_is_one_line(directory: Path, tmp_path: Path, command: str) -> None:
    blocked = f"import sys, runpy; sys.modules['vl_convert'] = None; runpy.run_module('{command}', run_name='__main__')"
    for arguments, words in (
        ([sys.executable, "-m", command, str(tmp_path)], "is no run"),
        ([sys.executable, "-c", blocked, str(directory)], "pip install --editable '.[report]'"),
    ):
        done = run(arguments)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert words in line
