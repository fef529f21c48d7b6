"""The model card of a run, finished or not. What is not known is left out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config.settings import HELD_OUT, MixtureSource
from recipe.report.charts import curves_png
from recipe.report.record import Record, read_record
from recipe.report.summary import (
    environment,
    hub_dataset,
    initial_weights,
    is_hub_id,
    markdown,
    repeatable_config,
    rows_of,
    short_name,
)
from recipe.text import one_line, printable, redact

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

IMAGE = "curves.png"


def card_files(run_directory: Path, model: str | Path | None = None, *, update: int | None = None) -> dict[str, bytes]:
    """What goes beside a model, name -> content: README.md, its image if that can be drawn, and config.yaml to repeat the run.

    Args:
        run_directory: of the run.
        model: what the card's snippet loads: a name on the Hub or a local directory; None for `run_directory`/final.
        update: describe the run as it was after this update: that of the checkpoint the card goes with.

    Raises:
        RecipeError: it is no run, or has done no update.
    """
    record, files = read_record(run_directory, update), {}
    try:
        files[IMAGE] = curves_png(record)
    except BaseException as error:  # also the panic of a library in Rust, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        print(f"{IMAGE} is left out: {redact(one_line(str(error)))[:300] or type(error).__name__}", file=sys.stderr)
    card = model_card(record, model or run_directory / "final", has_image=bool(files))
    return {"README.md": card.content.encode(), "config.yaml": repeatable_config(record.config).encode(), **files}


def model_card(record: Record, model: str | Path, *, has_image: bool = True) -> ModelCard:
    """The card of a run, whose snippet loads `model`.

    `model` is a name on the Hub or a local directory; `has_image` says whether `IMAGE` lies beside the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = one_line(record.directory.resolve().name if isinstance(model, Path) else model.rpartition("/")[2])
    config = record.config
    base, rows = initial_weights(config), rows_of(record, ())
    results = _results(record, rows)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "pretraining"],
        base_model=base if base and is_hub_id(config.model.init_from or "") else None,
        datasets=[*dict.fromkeys(filter(None, map(hub_dataset, config.data.mixture)))] or None,
        metrics=["perplexity"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = environment(markdown).get_template("model_card.md.jinja")
    content = text.render(
        metadata=data.to_yaml(),
        name=name,
        record=record,
        rows=rows,
        base=base,
        # The author's directories are nobody else's: from that of the run's directory on.
        model=str(Path(*model.parts[-2:]) if isinstance(model, Path) and model.is_absolute() else model),
        image=IMAGE if has_image else None,
        evaluations=_evaluations(record),
    )
    return ModelCard(printable(content))  # what is in code and metadata too


def _evaluations(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """(validation set, evaluation) before training, if it was evaluated then, and the last one, of each set."""
    found = []
    for name in record.validation_sets:
        if last := record.last_evaluation(name):
            before = record.evaluations(name).query("update == 0").to_dict("records")
            found += [(name, {**row, "perplexity": math.exp(min(row["loss"], 700.0))}) for row in [*before, last]]
    return found


def _about(source: MixtureSource, label: str) -> dict[str, Any]:
    """A source as the Hub's model-index has it; in a mixture called by its label, since several may be of files."""
    files = "local-text-files" if source.text_files else "local-token-files"
    name = label or files if source.files else one_line(short_name(source.repository) or "")
    about: dict[str, Any] = {"dataset_type": name, "dataset_name": f"{label or name}, held out"}
    if hub_dataset(source):
        about |= {"dataset_config": source.configuration, "dataset_split": source.split}
        about["dataset_revision"] = source.revision
    return about


def _results(record: Record, rows: Any) -> list[EvalResult]:
    """The last evaluations as the Hub's model-index has them."""
    from huggingface_hub import EvalResult

    sources = record.config.data.sources
    results = []
    for name, evaluation in dict(_evaluations(record)).items():  # the last of each set
        about: dict[str, Any] = {"dataset_type": name, "dataset_name": name}
        if name == HELD_OUT and sources:
            about = {"dataset_type": "mixture", "dataset_name": "all sources by weight, held out"}
        for source in record.config.data.mixture:
            if name == (source.label if sources else HELD_OUT):
                about = _about(source, source.label if sources else "")
                about["dataset_args"] = {"held_out": rows.held_out_of(source)}
        results += [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                metric_type=metric,
                metric_name=title,
                metric_value=round(evaluation[metric], 6),
                metric_args={"updates": evaluation["update"]},
                **about,
            )
            for metric, title in (
                ("loss", "Loss, nats per token"),
                ("perplexity", "Perplexity"),
                ("bits_per_byte", "Bits per byte"),
            )
            if not math.isnan(evaluation[metric])
        ]
    return results
