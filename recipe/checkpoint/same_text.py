"""The text of a run: opened on rank 0, the same as before, and the same on all hosts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recipe.checkpoint.files import MANIFEST
from recipe.checkpoint.resume import ResumePoint
from recipe.checkpoint.same_run import shown
from recipe.config.settings import MixtureSource
from recipe.data.documents import Source
from recipe.data.files import File
from recipe.data.find import find_files_of
from recipe.data.record import Record, pack_record, record_text, touched, unpack_record, what_changed
from recipe.data.sources import check_passes, describe, open_source
from recipe.errors import RecipeError
from recipe.run.alike import check_alike
from recipe.run.files import sha256_of
from recipe.run.run import Run


def open_text(run: Run, point: ResumePoint) -> list[Source]:
    """Open the sources of the run, if their text is still that of the checkpoint of `point`. Collective.

    Rank 0 alone looks for files and asks servers, and tells the others.

    Raises:
        RecipeError: it cannot be read, or has changed.
    """
    run.text_record, sources, files = run.on_main(lambda: _open_same_text(run, point))
    check_alike(lambda: _seen_from_here(run, point, files))
    return sources


def _seen_from_here(run: Run, point: ResumePoint, files: Sequence[File]) -> dict[str, Any]:
    """The checkpoint and the text as the first rank of each host sees them; the others look at the same disks."""
    if not run.accelerator.is_local_main_process:
        return {"the checkpoint": None, "the text": None}
    checkpoint: str | None = None
    text: dict[str, str] | str
    if point.checkpoint:
        manifest = point.checkpoint / MANIFEST
        has = (
            f"manifest {sha256_of(manifest)[:16]}" if manifest.is_file() else "not there: hosts share no run.directory"
        )
        checkpoint = f"{point.checkpoint}, {has}"
    try:
        record = unpack_record(run.text_record) if run.is_main else record_text(files)
        text = {file.name: f"{file.size_bytes} bytes, hash {file.hash}" for file in record}
    except RecipeError as error:
        text = str(error)
    return {"the checkpoint": checkpoint, "the text": text}


def _open_same_text(run: Run, point: ResumePoint) -> tuple[str, list[Source], list[File]]:
    earlier = unpack_record(point.state.text) if point.state and point.state.text else []
    config, say = run.config, run.console.say
    if config.model.init_from and point.checkpoint:  # it has the tokenizer
        config = replace(config, model=replace(config.model, init_from=str(point.checkpoint)))
    parts = [_at_commit(part, earlier) for part in config.data.mixture]
    files = [find_files_of(config, part, say) for part in parts]
    all_files = [file for of_source in files for file in of_source]
    record = record_text(all_files)
    if earlier:
        change = what_changed(earlier, record)
        if change:
            raise RecipeError(
                f"{change}: the text is not what {point.checkpoint} was trained on; bring it back, or --resume fresh"
            )
        if changed := touched(earlier, record):
            run.console.say(f"written since, with the same size, head and tail: {shown(changed)}")
    sources = [open_source(config, *pair, say) for pair in zip(parts, files, strict=True)]
    total = sum(source.weight for source in sources)
    lines = []
    for source, of_source in zip(sources, files, strict=True):
        tokens = round(run.plan.total_tokens * source.weight / total)
        check_passes(source, tokens)
        lines.append(describe(source, of_source, config.batch.lanes, tokens))
        say(f"text: {lines[-1]}")
    run.text = "; ".join(lines)
    return pack_record(record), sources, all_files


def _at_commit(part: MixtureSource, earlier: Record) -> MixtureSource:
    """A dataset goes on at the commit that was read, if none is asked for."""
    commits = [file.hash for file in earlier if file.size_bytes is None and file.name == part.repository]
    return part if part.files or part.revision or not commits else replace(part, revision=commits[0])
