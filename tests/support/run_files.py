"""The files of a run that nobody trained: twelve updates, one rank and then two, with events of most kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipe.config.command_line import load_config, write_config
from recipe.plan.run_plan import make_plan
from recipe.run.ledger import EVENTS, LEDGER, read_lines
from tests.helpers import TINY

UPDATES, TOKENS_PER_UPDATE, RESUMED_AFTER = 12, 1536, 6
EVALUATED = (0, 3, 6, 9, 12)
SAMPLE = '<b>not bold</b> </script><script>document.title = "stolen"</script>'
SIZES = {"tokens": 3120, "text_bytes": 5432}


def write_run(directory: Path) -> Path:
    """Write config.yaml, ledger.jsonl, events.jsonl, summary.json and an empty final/."""
    (directory / "final").mkdir(parents=True)
    texts = directory.parent / f"{directory.name}-texts"
    texts.mkdir()
    (texts / "a.txt").write_text("A text.", encoding="utf-8")
    config = load_config(
        [
            *[*TINY, "--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt"],
            *["--data.validation_one_in", "10", "--evaluation.sets.mine", f"{texts}/a.txt"],
            *["--schedule.total_tokens", str(UPDATES * TOKENS_PER_UPDATE), "--evaluation.prompts", 'print("é|😀")'],
            *["--batch.micro_batch_size", "5"],
        ]
    )
    write_config(config, directory / "config.yaml")
    ledger = [ledger_line(update) for update in range(UPDATES + 1)]
    write_lines(directory / LEDGER, ledger)
    write_lines(directory / EVENTS, events())
    evaluations = {
        name: {
            when: {"loss": line[f"validation/{name}/loss"], "bits_per_byte": line[f"validation/{name}/bits_per_byte"]}
            | SIZES
            for when, line in (("before", ledger[0]), ("after", ledger[-1]))
        }
        for name in ("held_out", "mine")
    }
    differences = [["accumulate, micro-batch 4 x 6 steps", 1.2e-7], ["manual, micro-batch 8 x 3 steps", 3.4e-8]]
    plan = make_plan(config, 2)
    summary = {
        "plan": dict(plan.rows()),
        "parameters": plan.parameters,
        "precision": "fp32",
        "validation": evaluations,
        "parity_check": {
            "reference": "accumulate, micro-batch 8 x 3 steps",
            "differences": differences,
            "tolerance": 1e-5,
        },
        "finished_utc": "2026-11-23T12:10:54Z",
    }
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


def ledger_line(update: int) -> dict[str, Any]:
    """The line of an update; of update 0, of the validation before training."""
    ranks, micro_batch, steps = (1, 8, 3) if update <= RESUMED_AFTER else (2, 5, 3)
    line: dict[str, Any] = {
        "update": update,
        "tokens": update * TOKENS_PER_UPDATE,
        "loss": 6 - update / 5 + math.sin(update) / 9,
        "grad_norm": 1.5 + math.cos(update) / 3,
        "learning_rate": 1e-3 * min(1, update / 5),
        "target_tokens": TOKENS_PER_UPDATE,
        "world_size": ranks,
        "micro_batch_size": micro_batch,
        "gradient_accumulation_steps": steps,
        "blocks_sha256": f"{update:064x}",
        "update_seconds": 1 + update / 100,
        "data_wait_seconds": 0.01,
        "tokens_per_second": TOKENS_PER_UPDATE / (1 + update / 100),
        "mfu": None,
        "peak_memory_bytes": 700_000_000 + update,
        "gradient_noise_scale_tokens": 900.0 + 100 * update if update > 2 else None,
        "gradient_noise_scale_tokens_low": 500.0 + 80 * update if update > 1 else None,
        "gradient_noise_scale_tokens_high": 1500.0 + 150 * update if update > 4 else None,
        "gradient_snr": TOKENS_PER_UPDATE / (900 + 100 * update) if update > 2 else None,
        "expected_cosine": 0.6 if update > 2 else None,
    }
    if not update:
        line = {name: value if name in ("update", "tokens") else None for name, value in line.items()}
    line["checkpoint_stall_seconds"] = 0.01 if update == RESUMED_AFTER else None
    for number, name in enumerate(("held_out", "mine")):
        loss = 6.1 - update / 6 + number / 10 if update in EVALUATED else None
        line[f"validation/{name}/loss"] = loss
        line[f"validation/{name}/bits_per_byte"] = loss and loss / 2.4
    return line


def events() -> list[dict[str, Any]]:
    """Two starts with what the second changed, samples, a spike, and an event that this version does not know."""
    machine = {
        "device": "AMD EPYC",
        "device_type": "cpu",
        "world_size": 1,
        "precision": "fp32",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "recipe_commit": "0123abc",
    }
    found: list[dict[str, Any]] = [
        {"event": "start", "update": 0, **machine},
        {"event": "sample", "update": 6, "prompt": "import", "text": "import os"},
        {"event": "start", "update": RESUMED_AFTER, **machine, "world_size": 2},
        {
            "event": "resume",
            "update": RESUMED_AFTER,
            "checkpoint": "/home/me/run/checkpoints/step-000006",
            "changes": {"batch.micro_batch_size": [8, 5], "world_size": [1, 2]},
            "skipped": [],
        },
        {"event": "spike", "update": 9, "loss": 9.0, "z": 7.5},
        {"event": "something_new", "update": 10, "numbers": [1, None], "nested": {"a": {"b": True}}},
        {"event": "sample", "update": 12, "prompt": "import", "text": f"import {SAMPLE}"},
    ]
    return [event | {"time_utc": "2026-11-23T12:08:00Z"} for event in found]


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a ledger or events."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def edit_lines(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Put what `change` makes of each line in its place; None removes it."""
    write_lines(path, [line for old in read_lines(path) if (line := change(old)) is not None])
