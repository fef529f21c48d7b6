"""Files of a run that are damaged, or written by somebody who means harm: one line or the part left out, and never more."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.errors import RecipeError
from recipe.report.card import card_files, model_card
from recipe.report.curves import Curves
from recipe.report.page import names_of, report_page
from recipe.report.record import read_record
from recipe.run.ledger import EVENTS, LEDGER
from tests.support.run_files import edit_lines, write_run

CONTROL = "".join(map(chr, (0, 7, 8, 11, 12, 27, 31, 127, 133, 155, 0xD800, 0xDFFF, 0xFFFE, 0xFFFF)))
BIDIRECTIONAL = "\u202a\u202e\u2066\u2069\u200f\u061c"
IN_ONE_LINE = (
    "```",
    "a | b",
    "[link](javascript:alert(1))",
    "![image](https://elsewhere/image.png)",
    "<img src=x onerror=alert(1)>",
    "</td></pre></script><script>alert(1)</script>",
    "*a* _b_ **c** __d__ ~~e~~ `f` $$g$$ &amp; \\| \\",
    "<!-- comment",
)
IN_LINES = (
    *IN_ONE_LINE,
    "end\n```\n# A heading\n",
    "end\r```\r# A heading\r",
    "end\n\n---\nlicense: mit\n---\n",
    "x\n| a |\n\n- b",
)


def spoil(directory: Path, text: str) -> Path:
    """Put a text wherever a run's files may hold one; the directory, where that can have the name."""
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    prompt = text.replace("\0", "").encode("utf-8", "ignore").decode()
    name = re.sub(r"[\0-\x1f\x7f]+", " ", prompt)[:60]  # what a setting takes
    config["evaluation"]["prompts"] = [prompt]
    config["data"] |= {"text_files": [f"texts/{name}.txt"], "tokenizer": name}
    config["model"]["init_from"] = f"{name}/a/b"
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def change(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "something_new":
            event |= {"event": text, text: {text: [text]}}
        elif event["event"] == "start":
            event |= {"device": text, "versions": {text: text}, "recipe_commit": text, "precision": text}
        elif event["event"] == "sample":
            event |= {"prompt": text, "text": f"{text}{text}"}
        elif event["event"] == "resume":
            event["changes"] = {f"schedule.{text}": [text, text], text: 5}
        return event

    edit_lines(directory / EVENTS, change)
    edit_lines(directory / LEDGER, lambda line: line | {f"validation/{text} /loss": 1.0, text: text})
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    summary |= {"precision": text, "finished_utc": text, "parity_check": {**summary["parity_check"], "reference": text}}
    summary["parity_check"]["differences"][0][0] = text
    summary["validation"][text] = summary["validation"]["mine"]
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    name = text.replace("/", "").replace("\0", "").encode("utf-8", "replace").decode()[:40]
    return directory.rename(directory.with_name(f"run {name}"))


def page_of(directory: Path) -> str:
    return report_page([read_record(directory)], names_of([directory]))


def shown_in(page: str) -> str:
    """All of a page but the libraries' JavaScript."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


class Tags(HTMLParser):
    """Counts what begins, and the attributes that run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.count.update(f"{tag} {name}" for name, _ in attrs if name.startswith("on") or name in ("href", "src"))


@pytest.mark.slow
def test_no_text_stops_a_card_or_a_page_or_its_picture_or_becomes_html(directory: Path) -> None:
    spoiled = spoil(directory, f"a{CONTROL}b{BIDIRECTIONAL}c{''.join(IN_LINES)}")
    files, page = card_files(spoiled, "me/model"), page_of(spoiled)
    assert files["curves.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    for text in (card, shown_in(page)):
        assert not set(text) & set(CONTROL + BIDIRECTIONAL)
        assert "\N{REPLACEMENT CHARACTER}" in text
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    json.loads(page.partition('id="page">')[2].partition("</script>")[0])
    tags = Tags(page).count
    assert tags["script"] == 3, "the data, the libraries, and what draws"
    assert {name for name in tags if " " in name or name == "img"} == {"a href"}
    settings = [yaml.safe_load(text) for text in (files["config.yaml"], (spoiled / "config.yaml").read_bytes())]
    assert settings[0]["evaluation"]["prompts"] == settings[1]["evaluation"]["prompts"], "as they were"


def test_a_picture_that_fails_is_left_out_with_a_word(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vl_convert

    class Panic(BaseException):
        """As a library in Rust raises it."""

    def fail(*_: object, **__: object) -> None:
        raise Panic("no font,\nnowhere: https://host/font?signature=1")

    for name in ("vegalite_to_png", "vega_to_png"):
        monkeypatch.setattr(vl_convert, name, fail)
    files = card_files(directory)
    assert set(files) == {"README.md", "config.yaml"}
    assert b"curves.png" not in files["README.md"]
    assert capsys.readouterr().err == "curves.png is left out: no font, nowhere: https://host/font\n"


def structure(card: str) -> Counter[str]:
    """What a Markdown parser takes it for: blocks with their texts where they are the card's own, and what is in a line."""
    from markdown_it import MarkdownIt

    found: Counter[str] = Counter()
    for token in (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(card.split("---\n", 2)[2])
    ):
        found[f"{token.type} {token.tag} {token.info}"] += token.type != "inline"
        kinds = [
            child.type for child in token.children or () if child.type not in ("text", "softbreak", "text_special")
        ]
        found.update(kinds)
    return +found


@pytest.mark.parametrize(
    "text", ["\n".join(IN_LINES), *(pytest.param(text, marks=pytest.mark.slow) for text in IN_LINES)]
)
def test_no_text_changes_the_structure_of_a_card(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what it is with a harmless word in its place; and a table shows a text as it is."""
    monkeypatch.setattr("recipe.report.card.curves_png", lambda _: b"")  # which takes long, and has no structure
    harmless, spoiled = (spoil(write_run(tmp_path / name / "run"), word) for name, word in (("a", "word"), ("b", text)))
    ours, theirs = (card_files(path)["README.md"].decode() for path in (harmless, spoiled))
    assert structure(theirs) == structure(ours)
    assert yaml.safe_load(theirs.split("---\n")[1]).keys() == yaml.safe_load(ours.split("---\n")[1]).keys()
    from markdown_it import MarkdownIt

    shown = [
        "".join(child.content for child in token.children or ())
        for token in MarkdownIt("commonmark").enable("table").parse(theirs.split("---\n", 2)[2])
        if token.type == "inline"
    ]
    assert re.sub(r"\s*[\r\n]+\s*", " ", text.strip()) in [line.strip() for line in shown]


NAMES = ("config.yaml", LEDGER, EVENTS, "summary.json")
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    10**17,
    10**400,
    1.5,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    CONTROL,
]
WRONG += [[], [1], [[]], {}, {"a": {"b": [None]}}, "validation/it's/loss", [["a", "b"], ["c"]]]


def mistaken(rng: random.Random, value: Any) -> Any:
    """A JSON value in which one value, somewhere, is another, or has another name, or is gone."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.25:
        return rng.choice(WRONG)
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    changed = mistaken(rng, value.pop(place))
    if isinstance(value, list):
        value.insert(place, changed)
    elif (chance := rng.random()) > 0.1:
        value["validation/it's/loss" if chance < 0.15 else place] = changed
    return value


def damage(rng: random.Random, path: Path) -> None:
    """Truncate a file, change its bytes, put something else in its place, or wrong values of any type into it."""
    content, way = path.read_bytes(), rng.random()
    if way < 0.1:
        content = content[: rng.randrange(len(content))]
    elif way < 0.2:
        content = bytes(rng.randrange(256) if rng.random() < 0.01 else byte for byte in content)
    elif way < 0.3:
        content = rng.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, rng.randbytes(300)])
    elif path.suffix == ".yaml":
        content = yaml.dump(mistaken(rng, yaml.safe_load(content))).encode()
    elif path.suffix == ".json":
        content = json.dumps(mistaken(rng, json.loads(content))).encode()
    else:
        lines = [json.loads(line) for line in content.splitlines()]
        content = b"\n".join(json.dumps(line if rng.random() < 0.6 else mistaken(rng, line)).encode() for line in lines)
    path.write_bytes(content)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 500), marks=pytest.mark.slow)])
def test_damaged_files_are_one_line_or_left_out(seeds: range, directory: Path, tmp_path: Path) -> None:
    told = Counter[str]()
    for seed in seeds:
        rng, run = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(directory, run)
        for name in rng.sample(NAMES, rng.choice([1, 1, 2])):
            damage(rng, run / name)
        try:
            record = read_record(run)
            yaml.safe_load(model_card(record, "me/model").content.split("---\n")[1])
            json.dumps(Curves([record], ["run"]).datasets, allow_nan=False)  # a browser reads no NaN
            told["a card"] += 1
        except RecipeError:
            told["a line"] += 1
    assert min(told["a card"], told["a line"]) > 1
