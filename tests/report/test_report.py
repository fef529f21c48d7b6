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

from recipe.commands import report as command
from recipe.report.page import report_page
from recipe.report.record import read_record
from recipe.run.ledger import EVENTS, LEDGER, read_lines
from tests.support.run_files import EVALUATED, SAMPLE, edit_lines, ledger_line, write_lines, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

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
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the run of `write_run`; nobody writes to its directory."""
    directory = write_run(tmp_path_factory.mktemp("report") / "run")
    write_page(directory / "report.html", directory)
    return directory / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
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


def test_page_shows_the_numbers_of_the_ledger(browser: Browser, page_file: Path) -> None:
    ledger = read_lines(page_file.with_name(LEDGER))
    datasets = data_of(page_file.read_text(encoding="utf-8"))
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
        drawn = {row["update"]: row["value"] for row in datasets[name]}
        assert drawn == {entry["update"]: pytest.approx(entry[name], rel=1e-5) for entry in ledger[1:]}, name
    assert [row["tokens"] for row in datasets["loss"]] == [entry["tokens"] for entry in ledger[1:]]
    minutes = np.cumsum([entry["update_seconds"] for entry in ledger[1:]]) / 60
    assert [row["time"] for row in datasets["loss"]] == pytest.approx(minutes.tolist(), rel=1e-5)
    for name in ("held_out/loss", "held_out/bits_per_byte", "mine/bits_per_byte"):
        column = f"validation/{name}"
        drawn = {row["update"]: row["value"] for row in datasets[column]}
        assert drawn == {update: pytest.approx(ledger[update][column], rel=1e-5) for update in EVALUATED}
    page, _ = open_page(browser, page_file)
    shown = page.locator("main").inner_text()
    for words in (
        f"{ledger[-1]['validation/held_out/loss']:.4f}",
        f"{ledger[-1]['validation/held_out/bits_per_byte']:.4f}",
        f"{np.median([entry['tokens_per_second'] for entry in ledger[1:]]):,.0f} tokens/s",
        "18,432",
        "12 of 12",
        "finished 2026-11-23 at 12:10:54 UTC",
        "ceil(12 blocks of the largest share / 5) = 3",
        "1,536 / (8 x 64 x 1 rank) = 3",
        "batch.micro_batch_size 8 → 5",
    ):
        assert words in shown, words
    page.get_by_text("config.yaml", exact=True).click()
    assert "tokens_per_update: 1536" in page.locator("pre").last.inner_text()
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
    wrong = {7: {"loss": 123.456}, 12: {"validation/held_out/loss": 7.6543}}
    edit_lines(directory / LEDGER, lambda line: line | wrong.get(line["update"], {}))
    page = write_page(tmp_path / "report.html", directory)
    assert [row["value"] for row in data_of(page)["loss"] if row["update"] == 7] == [123.456]
    assert "<b>7.6543</b>" in page


def test_damaged_and_missing_values_leave_a_page(browser: Browser, directory: Path, tmp_path: Path) -> None:
    """Not finite, null, absent, of another type, half a line."""
    entries = read_lines(directory / LEDGER)[1:]
    entries[2] |= {"loss": "nan", "grad_norm": None, "update_seconds": "inf", "tokens_per_second": [1]}
    entries[4] |= {"loss": math.nan, "learning_rate": math.inf}
    del entries[3]["mfu"], entries[3]["peak_memory_bytes"], entries[3]["world_size"]
    lines = [*map(json.dumps, entries), "[]", "{}", '{"update": 13, "lo']
    (directory / LEDGER).write_text("\n".join(lines), encoding="utf-8")
    lines = ['{"event": 5, "update": 3}', '{"event": "x", "update": 1e999}', "[]", '{"event": "sp']
    (directory / EVENTS).write_text("\n".join(lines), encoding="utf-8")
    (directory / "summary.json").unlink()
    page = write_page(tmp_path / "report.html", directory)
    assert [row["update"] for row in data_of(page)["loss"]] == [1, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    opened, wrong = open_page(browser, tmp_path / "report.html")
    assert wrong == []
    opened.close()


@pytest.mark.slow
def test_a_long_ledger_gives_a_small_page_that_keeps_its_spikes(directory: Path, tmp_path: Path) -> None:
    entry = ledger_line(1)
    lines = [
        entry | {"update": update, "tokens": update * 1536, "loss": 3 + math.sin(update * 0.7) / 5}
        for update in range(1, 50_001)
    ]
    lines[33_332]["loss"] = 8.25
    write_lines(directory / LEDGER, lines)
    skipped = [{"event": "skipped_update", "update": update} for update in range(10, 50_001, 10)]
    write_lines(directory / EVENTS, [*skipped[:3000], {"event": "spike", "update": 30_001}, *skipped[3000:]])
    page = write_page(tmp_path / "report.html", directory)
    assert len(page) < 2_500_000
    assert "skipped update (5,000)" in page
    assert [row["value"] for row in data_of(page)["loss"] if row["update"] == 33_333] == [8.25]
    marked = [row["event"] for row in data_of(page)["events"]]
    assert (marked.count("spike"), marked.count("skipped_update")) == (1, 60)


@pytest.mark.slow
def test_runs_are_compared(
    browser: Browser,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(directory, tmp_path / "other")
    config = (tmp_path / "other/config.yaml").read_text(encoding="utf-8")
    (tmp_path / "other/config.yaml").write_text(config.replace("beta2: 0.95", "beta2: 0.99"), encoding="utf-8")
    edit_lines(
        tmp_path / "other" / LEDGER, lambda line: {k: v for k, v in line.items() if not k.startswith("validation/mine")}
    )
    output = str(tmp_path / "both.html")
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory), str(tmp_path / "other"), "--output", output])
    command.main()
    assert capsys.readouterr().out.strip() == output
    page, wrong = open_page(browser, tmp_path / "both.html", 390)
    assert page.evaluate(FAULTS_OF_TEXT)[1] == wrong == []
    differing = page.locator("table", has_text="optimizer.beta2").inner_text().split()
    assert differing[differing.index("optimizer.beta2") + 1 :] == ["0.95", "0.99"]
    row = page.locator("tr", has_text="bits per byte, mine").inner_text().split()
    assert row[-2:] == ["1.7500", "–"], "what only one of them was evaluated on"
    names = page.evaluate("[...new Set(page.datasets.loss.map((row) => row.run))]")
    assert names == ["run", "other"]
    page.close()


@pytest.mark.slow
def test_page_lies_in_the_run_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory)])
    command.main()
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert (directory / "report.html").is_file()
