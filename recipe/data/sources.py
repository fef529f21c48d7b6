"""Where documents come from: a Hub dataset, files, or Python's standard library; texts, or token ids."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.config.settings import Config, MixtureSource, SourceConfig
from recipe.config.text_files import FLAT, text_file_format, token_file_format
from recipe.data.documents import Source, hash_number
from recipe.data.files import File, LocalFile, name_of
from recipe.data.find import Say, find_all, find_files_of, patiently
from recipe.data.formats import TOKEN_COLUMNS, Part, Reading
from recipe.data.shards import Shards, cut, make_shards
from recipe.data.standard_library import split_standard_library
from recipe.data.token_files import open_token_files
from recipe.data.token_formats import is_validation_file
from recipe.data.tokenizer import load_token_ids
from recipe.errors import RecipeError
from recipe.format import size_text
from recipe.run.files import new_file

TYPICAL_TOKEN_BYTES = 4.5  # of English text in GPT-2's vocabulary
_COPIED_COLUMN = "text"  # the only one of a copy


def open_source(
    config: Config, of: MixtureSource | None = None, files: Sequence[File] | None = None, say: Say = lambda line: None
) -> Source:
    """Open what one source of `config.data` names, in at least `config.batch.lanes` shards.

    Args:
        config: the settings.
        of: one of `config.data.mixture`. None: its first, which is the only one if there are no `data.sources`.
        files: what `find_files_of` has found, if it has been asked.
        say: is told what takes long, and why a server is asked again.

    Raises:
        RecipeError: a source that cannot be opened, or has fewer shards or documents than lanes.
    """
    data, lanes, of = config.data, config.batch.lanes, of or config.data.mixture[0]
    files = find_files_of(config, of, say) if files is None else files
    name = str(of.dataset) if not of.files else name_of(files[0]) if len(files) == 1 else f"{len(files)} files"
    retry_seconds = data.retry_seconds * (not all(isinstance(file, LocalFile) for file in files))
    training, held_out = list(files), list[File]()
    if of.token_files:
        held_out = [file for file in files if is_validation_file(file.address)]
        training = [file for file in files if not is_validation_file(file.address)]
        if not training:
            training, held_out = held_out, []
    elif of.is_standard_library:
        held_out = find_all(split_standard_library()[1])
    nothing: Shards = patiently(retry_seconds, name, lambda: _no_shards(config, of, files), say)
    reading = nothing.reading
    source = Source(
        name,
        nothing,
        None if held_out else data.validation_one_in,
        retry_seconds=retry_seconds,
        skips_bad_rows=of.is_standard_library or data.on_bad_row == "skip",
        label=of.label if data.sources else "",
        weight=of.weight,
        max_passes=of.max_passes,
    )

    def copy(shards: Shards) -> Shards:
        return _copy(replace(source, training=shards, validation_one_in=None), config, say)

    if reading.format == FLAT:
        source.training = _flat_shards(training, lanes, of, reading)
        source.validation = _flat_shards(held_out, 1, of, reading) if held_out else None
    else:
        if of.is_standard_library:
            source.training = Shards(reading, list(map(Part, training)))
        else:
            source.training = patiently(retry_seconds, name, lambda: make_shards(training, nothing, lanes, copy), say)
        source.validation = Shards(reading, list(map(Part, held_out))) if held_out else None
    if len(source) < lanes:
        what = "pieces" if source.holds_pieces else "documents"
        raise RecipeError(
            f"{name} has {len(source)} {what}, fewer than batch.lanes = {lanes}: set --batch.lanes to {len(source)} or less, "
            "or give more text"
        )
    if source.is_remote and source.training.reading.format == "parquet":
        _check_memory(lanes, source.training.reader.largest_bytes)
    return source


def _no_shards(config: Config, of: SourceConfig, files: Sequence[File]) -> Shards:
    """How the documents of a source are read; whether a dataset has text or token ids, its first file says."""
    is_text = of.is_standard_library or bool(of.text_files)
    format_of = token_file_format if of.token_files else text_file_format
    kind = "text" if of.is_standard_library else format_of(files[0].address)
    assert kind is not None
    column, seen = of.token_column, Shards(Reading(kind), ())
    if column is None and not is_text and kind not in (FLAT, "text"):
        columns = seen.columns(files[0])
        if of.token_files or of.text_column not in columns:
            column = next((name for name in TOKEN_COLUMNS if name in columns), None)
        if column is None and of.token_files:
            raise RecipeError(f"{name_of(files[0])}: set --data.token_column to one of {columns[:30]}")
    if is_text or (column is None and kind != FLAT):
        return Shards(Reading(kind, of.text_column, of.encoding), (), seen.reader)
    return Shards(Reading(kind, column or "", ids=load_token_ids(config, of.rows_are == "packed")), (), seen.reader)


def check_passes(source: Source, tokens: int) -> None:
    """Check that a run that takes so many tokens from a source reads it no more often than it may, if its size is known.

    Raises:
        RecipeError: it would.
    """
    known = source.training.tokens
    if known and source.max_passes and tokens > known * source.max_passes:
        raise RecipeError(
            f"data.sources: {source.label} has {known:,} tokens, and the run takes {tokens:,} from it: {tokens / known:.1f} "
            f"passes, with max_passes = {source.max_passes}; give it a smaller weight, or set --schedule.total_tokens to less"
        )


def describe(source: Source, files: Sequence[File], lanes: int, tokens: int) -> str:
    """What was opened, in one line, for a run that trains so many tokens."""
    commits = {found[1] for file in files if (found := re.match(r"hf://datasets/[^@]+@(\w+)/", file.address))}
    size = source.training.text_bytes
    of = f"{source.label}, {source.weight:g} of the weights, " if source.label else ""
    parts = [
        f"{of}{source.name}{''.join(f' at {commit[:12]}' for commit in commits)}",
        f"{len(files):,} files",
        f"{len(source):,} shards for {lanes} lanes",
    ]
    if size:
        passes = tokens * TYPICAL_TOKEN_BYTES / size
        shown = f"{passes:,.1f}" if passes >= 0.1 else "under 0.1"
        parts.append(f"{size_text(size)} of text: {shown} passes, if a token is {TYPICAL_TOKEN_BYTES} bytes of it")
    if known := source.training.tokens:
        parts.append(f"{known:,} tokens: {tokens / known:,.2f} passes")
    if source.holds_pieces:
        parts.append("pieces of a stream, since it has no known ends of documents")
    if source.is_remote and source.training.reading.format == "parquet":
        parts.append(f"up to {size_text(lanes * source.training.reader.largest_bytes)} of row groups in memory")
    return ", ".join(parts)


def identity_of(source: Source) -> list[Any]:
    """JSON value that is another where the documents are others."""
    files = dict.fromkeys(part.file for part in source.training.parts)
    reading = [source.training.reading.column, source.skips_bad_rows]
    return [*reading, *([name_of(file), file.size, file.version] for file in files)]


def _check_memory(lanes: int, lane_bytes: int) -> None:
    """Refuse what the lanes of this machine cannot hold."""
    import psutil

    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / int(os.environ.get("WORLD_SIZE", "1"))
    needed, available = lanes * lane_bytes * share, psutil.virtual_memory().available
    if needed > available:
        raise RecipeError(
            f"{lanes} lanes hold up to {size_text(lane_bytes)} each, the text of a row group and the next one as stored: "
            f"{size_text(needed)}, and this machine has {size_text(available)} left; set --batch.lanes to less, or write the "
            "files with smaller row groups"
        )


def _flat_shards(files: Sequence[File], lanes: int, of: SourceConfig, reading: Reading) -> Shards:
    """What flat files of ids hold. Pieces of a stream are not made into documents, and documents not cut out of one."""
    ids = reading.ids
    assert ids is not None
    delimiters = () if ids.are_packed else ids.delimiters
    flat = open_token_files([file.address for file in files], of.token_dtype, delimiters, ids.vocabulary)
    if flat.tokenizer and _last_part(flat.tokenizer) != _last_part(ids.tokenizer):
        raise RecipeError(
            f"{name_of(files[0])} was made with the tokenizer {flat.tokenizer!r}, as the file beside it says, and "
            f"{ids.tokenizer!r} is in use: set --data.tokenizer, or if these are the same give it a directory of that name"
        )
    are_packed = ids.are_packed or not flat.has_ends
    shards = Shards(replace(reading, ids=replace(ids, are_packed=are_packed)), flat.parts(lanes), flat)
    shards.tokens = flat.tokens
    return shards


def _last_part(name: str) -> str:
    """Of the name or path of a tokenizer: what is left if it moves."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", "tokenizer.json")]
    return parts[-1] if parts else name


def _copy(source: Source, config: Config, say: Say) -> Shards:
    """All documents as one file, made once: of JSON Lines with nothing but the text, or of token ids with their ends.

    Raises:
        RecipeError: it cannot be read or written.
    """
    directory, ids = config.cache_directory / "text", source.training.reading.ids
    name = f"{hash_number(json.dumps(identity_of(source)).encode()):016x}"
    path = directory / (f"{name}.ds" if ids else f"{name}.jsonl")
    if not path.exists():
        say(f"copying {source.name} to {path}, to share it out over the lanes")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (_write_ids if ids else _write_rows)(source, path)
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}; set --data.cache_directory") from None
    file = LocalFile(str(path), path.stat().st_size)
    if ids is None:
        return Shards(Reading("json", _COPIED_COLUMN), cut([file], config.batch.lanes))
    flat = open_token_files([str(path)], None, (), ids.vocabulary)
    return Shards(Reading(FLAT, ids=ids), flat.parts(config.batch.lanes), flat)


def _write_rows(source: Source, path: Path) -> None:
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as rows:
        for text in source.training_documents():
            rows.write(json.dumps({_COPIED_COLUMN: text}, ensure_ascii=False) + "\n")


def _write_ids(source: Source, path: Path) -> None:
    """As datatrove lays them out."""
    ends, end = [], 0
    with new_file(path) as temporary:
        with temporary.open("wb") as tokens:
            for document in source.training_documents():
                tokens.write(np.asarray(document, dtype="<u4").tobytes())
                ends.append(end := end + len(document))
        with new_file(path.with_name(f"{path.name}.index")) as index:
            index.write_bytes(np.array(ends, dtype="<u8").tobytes())
