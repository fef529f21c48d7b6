"""The model card of a run, finished or not. What is not known is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config.settings import STANDARD_LIBRARY
from recipe.errors import RecipeError
from recipe.format import event_name, event_text
from recipe.report.charts import curves_png, library
from recipe.report.limitations import limitations
from recipe.report.record import Record, column_of, read_record
from recipe.report.reproduce import changed_on_the_way, reproducing_command
from recipe.report.smoothing import smoothing_window
from recipe.report.summary import (
    data_rows,
    first_of_each_kind,
    held_out,
    hub_dataset,
    hyperparameter_rows,
    initial_weights,
    is_hub_id,
    machines_table,
    notable_events,
    parity_rows,
    parts_table,
    summary_rows,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

IMAGE = "curves.png"
EVENTS_OF_A_KIND = 5
_IN_SUMMARY = (
    "model",
    "shape",
    "tokens seen",
    "updates",
    "training time",
    "GPU-hours",
    "throughput",
    "MFU",
    "precision",
)


def model_card(
    run_directory: Path, model: str | Path | None = None, *, update: int | None = None, has_image: bool = True
) -> ModelCard:
    """The card of a run, from its config.yaml, ledger.jsonl and, where it is finished, summary.json.

    Args:
        run_directory: of the run.
        model: what its snippet loads: a name on the Hub or a local directory; None for `run_directory`/final.
        update: describe the run as it was after this update: that of the checkpoint the card goes with.
        has_image: whether `IMAGE` will lie beside the card.

    Raises:
        RecipeError: it is no run, or has done no update.
    """
    return _card(read_record(run_directory, update), model or run_directory / "final", has_image)


def card_files(run_directory: Path, model: str | Path | None = None, *, update: int | None = None) -> dict[str, bytes]:
    """README.md and, where the library that draws is installed, the image it shows: name -> content.

    Arguments and errors are those of `model_card`.
    """
    record = read_record(run_directory, update)
    try:
        library()
        image = {IMAGE: curves_png(record)}
    except RecipeError:
        image = {}
    card = _card(record, model or run_directory / "final", bool(image))
    return {"README.md": card.content.encode(), **image}


def _card(record: Record, model: str | Path, has_image: bool) -> ModelCard:
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    dataset, results, base = hub_dataset(record.config), _results(record), initial_weights(record.config)
    name = record.directory.resolve().name if isinstance(model, Path) else model.rpartition("/")[2]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "pretraining"],
        base_model=base if base and is_hub_id(record.config.model.init_from or "") else None,
        datasets=[dataset] if dataset else None,
        metrics=["perplexity"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    events, samples = notable_events(record), record.events_called("sample")
    shown = first_of_each_kind(events, EVENTS_OF_A_KIND)
    starts = record.events_called("start")
    text = templates.get_template("model_card.md.jinja").render(
        metadata=data.to_yaml(),
        name=name,
        record=record,
        shape=record.config.model,
        source=_source(record),
        base=base,
        n_positions=record.config.n_positions,
        model=json.dumps(str(model), ensure_ascii=False),
        prompt=json.dumps(next(filter(None, record.config.evaluation.prompts), "The"), ensure_ascii=False),
        image=IMAGE if has_image else None,
        window=smoothing_window(record["loss"]),
        evaluation=_table(
            ["text", "model", "loss, nats per token", "perplexity", "bits per byte"], _evaluation_rows(record)
        ),
        validation=record.summary.get("validation_after"),
        summary=_pairs([row for row in summary_rows(record) if row[0] in _IN_SUMMARY]),
        parts=_table(*parts_table(record)),
        data=_pairs(data_rows(record)),
        hyperparameters=_pairs(hyperparameter_rows(record.config)),
        machines=_table(*machines_table(record)),
        events=_table(
            ["after update", "event", "details"],
            [[f"{event['update']:,}", event_name(event["event"]), event_text(event)] for event in shown],
        ),
        more_events=len(events) - len(shown),
        sample=_fenced(str(samples[-1].get("text", ""))) if samples else None,
        sample_update=samples[-1]["update"] if samples else None,
        parity=_pairs(parity_rows(record), ("way", "relative difference")),
        tolerance=(record.summary.get("parity_check") or {}).get("tolerance"),
        reference=(record.summary.get("parity_check") or {}).get("reference"),
        command=reproducing_command(record.config),
        commit=starts[-1].get("recipe_commit") if starts else None,
        changed=changed_on_the_way(record),
        limitations=limitations(record),
    )
    return ModelCard(text)


def _source(record: Record) -> str:
    data = record.config.data
    if data.text_files:
        return "local text files"
    if data.dataset == STANDARD_LIBRARY:
        return "the source code of Python's standard library"
    dataset = hub_dataset(record.config)
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else f"`{data.repository}`"


def _results(record: Record) -> list[EvalResult]:
    """The last evaluations as the Hub's model-index has them."""
    from huggingface_hub import EvalResult

    data = record.config.data
    is_hub = hub_dataset(record.config) is not None
    name = "local-text-files" if data.text_files else data.repository
    results = []
    for validation_set, row, loss, bits in _last_evaluations(record):
        about: dict[str, Any] = {"dataset_type": validation_set, "dataset_name": validation_set}
        if not validation_set:
            about = {"dataset_type": name, "dataset_name": f"{name}, held out"}
            about["dataset_args"] = {"held_out": held_out(record.config)}
            if is_hub:
                about |= {
                    "dataset_config": data.configuration,
                    "dataset_split": data.split,
                    "dataset_revision": data.revision,
                }
        results += [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                metric_type=metric,
                metric_name=metric_name,
                metric_value=round(value, 6),
                metric_args={"updates": int(record["update"][row])},
                **about,
            )
            for metric, metric_name, value in (
                ("loss", "Loss, nats per token", loss),
                ("perplexity", "Perplexity", _perplexity(loss)),
                ("bits_per_byte", "Bits per byte", bits),
            )
        ]
    return results


def _last_evaluations(record: Record) -> list[tuple[str, int, float, float]]:
    """(validation set, "" for the held-out documents; row of the record; loss; bits per byte) of each set."""
    found = []
    for name in ("", *record.validation_sets):
        loss, bits = record.last(column_of("validation_loss", name)), record.last(column_of("bits_per_byte", name))
        if loss and bits:
            found.append((name, loss[0], loss[1], bits[1]))
    return found


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _evaluation_rows(record: Record) -> list[list[str]]:
    rows: list[tuple[str, str, float, float]] = []
    for name, row, loss, bits in _last_evaluations(record):
        text = name or "held out"
        if before := record.validation_before(name):
            rows.append((text, "before training", before["loss"], before["bits_per_byte"]))
        rows.append((text, f"after {record['update'][row]:,.0f} updates", loss, bits))
    return [
        [text, model, f"{loss:.4f}", f"{_perplexity(loss):,.2f}", f"{bits:.4f}"] for text, model, loss, bits in rows
    ]


def _cell(value: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = re.sub(r"([\\|*`\[\]])", r"\\\1", value.replace("\n", " "))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty where it has no rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *[[_cell(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pairs(rows: Sequence[tuple[str, str]], header: tuple[str, str] = ("", "")) -> str:
    return _table(header, rows)


def _fenced(text: str) -> str:
    """A code block, whatever the text holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
