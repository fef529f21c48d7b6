"""A run over text and token files at once: the same on one rank and on two, stopped and gone on with elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import (
    FAULTY,
    SCRIPT,
    TINY,
    assert_one_line,
    assert_same_run,
    end_of,
    read_events,
    read_ledger,
    run_ranks,
    start_ranks,
    train,
    write_texts,
)

UPDATES, WEIGHTS = 8, {"web": 0.75, "code": 0.25}


def write_token_file(path: Path, tokenizer: Path, texts: Sequence[str]) -> int:
    """As nanoGPT prepares it; returns the number of tokens."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = encoder.token_to_id("<|endoftext|>")
    ids = [token for text in texts for token in (*encoder.encode(text, add_special_tokens=False).ids, end)]
    path.write_bytes(np.array(ids, dtype="<u2").tobytes())
    return len(ids)


def arguments(run: Path, sources: Path, code: dict[str, Any] | None = None) -> list[str]:
    """Settings of the run `run` over the sources in `sources`; `code` is changed in the second one."""
    web = {"name": "web", "text_files": [f"{sources}/web.jsonl"], "weight": 0.75, "max_passes": 1}
    of_code = {"name": "code", "token_files": [f"{sources}/train.bin"], "token_dtype": "uint16", "weight": 0.25}
    return [
        *[
            *TINY,
            "--batch.lanes",
            "4",
            "--run.directory",
            str(run),
            "--data.sources",
            json.dumps([web, of_code | (code or {})]),
        ],
        *["--data.tokenizer", str(sources.parent / "tokenizer"), "--data.validation_one_in", "4"],
        *["--schedule.total_tokens", str(UPDATES * 1536), "--evaluation.every_tokens", "6144"],
        *["--evaluation.sets.mine", f"{sources}/web.jsonl", "--checkpoint.every_tokens", "4608"],
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """Sources, a tokenizer, and a run of eight updates on one rank."""
    root = tmp_path_factory.mktemp("mixed")
    texts = write_texts(root / "texts", count=28, largest=1400)
    (root / "sources").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[:12])
    (root / "sources/web.jsonl").write_text(rows, encoding="utf-8")
    shutil.copytree(finished / "final", root / "tokenizer")
    write_token_file(root / "sources/train.bin", root / "tokenizer", texts[12:28])
    done = train(*arguments(root / "whole", root / "sources"))
    assert done.returncode == 0, done.stderr
    return root


def test_the_ledger_has_tokens_and_passes_of_each_source(root: Path) -> None:
    ledger = read_ledger(root / "whole")
    for line in ledger:
        assert sum(line[f"source/{name}/tokens"] for name in WEIGHTS) == line["target_tokens"] == 1536
    for name, weight in WEIGHTS.items():
        tokens = sum(line[f"source/{name}/tokens"] for line in ledger)
        assert tokens == pytest.approx(weight * UPDATES * 1536, abs=4 * 700), "a document in each lane"
        assert [line[f"source/{name}/passes"] for line in ledger] == sorted(
            line[f"source/{name}/passes"] for line in ledger
        )
    assert ledger[-1]["source/web/passes"] > 1
    assert {line["validation/web/loss"] is None for line in ledger} == {True, False}


def test_a_source_that_is_read_too_often_is_an_event(root: Path) -> None:
    """One for each pass, in the update in which a lane has begun it."""
    passes = {line["update"]: line["source/web/passes"] for line in read_ledger(root / "whole")}
    first = {count: update for update, count in reversed(passes.items()) if count >= 1}
    events = read_events(root / "whole", "passes")
    assert {event["passes"]: event["update"] for event in events} == first
    assert {(event["source"], event["max_passes"]) for event in events} == {("web", 1)}
    assert all(event["source"] == "web" for event in events)


def test_what_is_held_out_of_each_source_has_a_loss_and_all_of_it_their_mean(root: Path) -> None:
    lines = [line for line in read_ledger(root / "whole") if line["validation/held_out/loss"] is not None]
    assert [line["update"] for line in lines] == [4, 8]
    for line in lines:
        losses = {name: line[f"validation/{name}/loss"] for name in WEIGHTS}
        assert line["validation/held_out/loss"] == pytest.approx(sum(WEIGHTS[name] * losses[name] for name in WEIGHTS))
        assert losses["web"] != losses["code"]
        assert line["validation/mine/loss"] is not None
        assert line["validation/web/bits_per_byte"] > 0
    sets = json.loads((root / "whole/summary.json").read_text(encoding="utf-8"))["validation"]
    assert list(sets) == ["held_out", "web", "code", "mine"]
    assert all(found["after"]["loss"] < found["before"]["loss"] for found in sets.values())
    assert sets["held_out"]["after"]["tokens"] == sets["web"]["after"]["tokens"] + sets["code"]["after"]["tokens"]


def test_ranks_resumes_and_another_place_change_nothing(root: Path) -> None:
    run = root / "moved"
    run_ranks(2, [SCRIPT, *arguments(run, root / "sources"), "--run.max_updates", "5"])
    shutil.copytree(root / "sources", root / "elsewhere")
    done = train(*arguments(run, root / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert [event["update"] for event in read_events(run, "resume")] == [5]
    expected, found = read_ledger(root / "whole"), read_ledger(run)
    assert [line["world_size"] for line in found] == [2] * 5 + [1] * 3
    exact = ["blocks_sha256", *(f"source/{name}/{what}" for name in WEIGHTS for what in ("tokens", "passes"))]
    for name in exact:
        assert [line[name] for line in found] == [line[name] for line in expected], name
    for name in ("loss", "validation/held_out/loss", "validation/code/loss"):
        losses = [[line[name] for line in lines if line["update"] in (4, 8)] for lines in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), name
    assert [event["passes"] for event in read_events(run, "passes")] == [
        e["passes"] for e in read_events(root / "whole", "passes")
    ]


@pytest.mark.slow
def test_an_evaluation_that_a_stop_cuts_short_is_done_by_the_next_start(root: Path) -> None:
    """In the second source of the evaluation after update 4."""
    run = root / "cut-short"
    (process,) = start_ranks(
        1, [FAULTY, "signal_in_an_evaluation", *arguments(run, root / "sources")], FAULTY_EVALUATION="5"
    )
    codes, output, _ = end_of([process])
    assert codes == [143], output
    (line,) = (line for line in read_ledger(run) if line["update"] == 4)
    assert {line[f"validation/{name}/loss"] for name in ("held_out", "web", "code", "mine")} == {None}
    done = train(*arguments(run, root / "sources"))
    assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", run)


@pytest.mark.parametrize(
    ("run", "code", "words"),
    [
        pytest.param("whole", {"weight": 0.5}, ["data.sources[1].weight was 0.25 and is 0.5"], marks=pytest.mark.slow),
        (
            "new",
            {"weight": 40, "max_passes": 1},
            ["data.sources: code has", "tokens, and the run takes", "max_passes = 1"],
        ),
        (
            "new",
            {"token_files": ["{root}/one.bin"]},
            ["data.sources: code has no held-out documents", "validation_one_in"],
        ),
    ],
    ids=["other weights", "more passes than it may make", "nothing held out"],
)
def test_a_mixture_that_cannot_be_is_one_line(run: str, code: dict[str, Any], words: list[str], root: Path) -> None:
    end = json.loads((root / "tokenizer/config.json").read_text(encoding="utf-8"))["eos_token_id"]
    (root / "one.bin").write_bytes(np.array([100, 101, end] * 8, dtype="<u2").tobytes())
    code = json.loads(json.dumps(code).replace("{root}", str(root)))
    done = train(*arguments(root / run, root / "sources", code))
    assert_one_line(done, words)
    assert not (root / "new/ledger.jsonl").exists()
