"""A source as files of token ids, written once: a directory that is begun, gone on with after a kill, and finished."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from recipe.config.settings import Config, flat_settings
from recipe.config.text_files import MANIFEST
from recipe.data.encode import DocumentEncoder
from recipe.data.files import File
from recipe.data.find import Say, find_files_of
from recipe.data.prepare_file import PARTS, UNFINISHED, Preparation, cannot_write, count_files, prepare_file, share
from recipe.data.record import TextFile, record_text, what_changed
from recipe.data.sources import open_source
from recipe.data.token_writers import Output
from recipe.data.tokenizer import load_tokenizer, token_ids_of, vocabulary_hash
from recipe.data.workers import do_all
from recipe.errors import RecipeError
from recipe.format import duration, short_count
from recipe.run.directory import lock
from recipe.run.files import new_directory, new_file, remove, remove_leftovers, sha256_of

# Does files of a preparation, as `workers.do_all` does pieces of work.
DoFiles = Callable[[Preparation, Sequence[int], Callable[..., None]], Iterator[tuple[int, Any]]]

FORMAT = 1  # of the manifest
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 60.0  # between lines of progress
# What decides the files; the text itself is compared by its record.
_SETTINGS = (
    *("batch.lanes", "data.text_column", "data.token_column", "data.rows_are", "data.token_dtype", "data.encoding"),
    *("data.on_bad_row", "data.validation_one_in", "data.tokenizer", "model.init_from"),
)


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared, and where."""

    config: Config
    directory: Path
    format: Literal["parquet", "llmc"]

    @property
    def unfinished(self) -> Path:
        return self.directory / UNFINISHED

    @property
    def trained(self) -> Path:
        """Where a tokenizer is that was trained on the text."""
        return self.directory / "tokenizer"

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer that is named; None: one is trained."""
        return self.config.data.tokenizer or self.config.model.init_from


def prepare(wanted: Wanted, processes: int, say: Say, do_files: DoFiles | None = None) -> dict[str, Any]:
    """Write the one source of `config.data` as token ids, or what of it is not there yet. Returns the manifest.

    `do_files` does them in place of processes of this machine.

    Raises:
        RecipeError: it cannot be read or written, holds no documents, or the directory is that of something else.
    """
    config, directory, unfinished = wanted.config, wanted.directory, wanted.unfinished
    if config.data.sources:
        raise RecipeError("data.sources: prepare the sources of a mixture one by one, each to a directory of its own")
    files = find_files_of(config, say=say)
    tokenizer = load_tokenizer(config, (), config.model.init_from) if wanted.tokenizer else None
    about = {"settings": _settings(wanted, tokenizer), "source": _describe_source(config, files)}
    if done := _earlier(directory, about):
        remove(unfinished)
        say(f"{directory} is complete: nothing is left to do")
        return done
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with (
            lock(unfinished, f"another process is preparing {directory}: wait for it, or set --output") or nullcontext()
        ):
            with new_file(unfinished / MANIFEST) as temporary:
                temporary.write_text(json.dumps(about), encoding="utf-8")
            for place in (directory, unfinished):
                remove_leftovers(place)
            preparation = _open(wanted, files, tokenizer, say)
            do_files = do_files or partial(_do_files, processes)
            manifest = _finish(preparation, about, _prepare_files(preparation, do_files, say))
            remove(unfinished)
            return manifest
    except OSError as error:
        raise cannot_write(directory, error) from None


def _open(wanted: Wanted, files: Sequence[File], tokenizer: Any, say: Say) -> Preparation:
    """The source as it is cut for `batch.lanes`. A tokenizer that is trained on it is saved beside the files first."""
    config, trained = wanted.config, wanted.trained
    data = replace(config.data, cache_directory=config.data.cache_directory or str(wanted.unfinished))
    if tokenizer is None and trained.is_dir():
        data = replace(data, tokenizer=str(trained))
    config = replace(config, data=data)
    source = open_source(config, files=files, say=say)
    if tokenizer is None:
        tokenizer = load_tokenizer(config, [source])
        if not trained.is_dir():
            with new_directory(trained) as temporary:
                tokenizer.save_pretrained(temporary)
    ids = token_ids_of(tokenizer, _public(wanted.tokenizer) or trained.name, source.holds_pieces)
    output = Output(wanted.format, ids, config.batch.lanes)
    encoder = None if source.holds_ids else DocumentEncoder(tokenizer)
    return Preparation(source, encoder, output, wanted.directory, count_files(source, output))


def _public(name: str | None) -> str | None:
    """A tokenizer's name, without the directories of this machine."""
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def _settings(wanted: Wanted, tokenizer: Any) -> dict[str, Any]:
    """What decides the files but for the text."""
    config = wanted.config
    settings = {name: value for name, value in flat_settings(config).items() if name in _SETTINGS}
    settings |= {name: _public(settings[name]) for name in ("data.tokenizer", "model.init_from")}
    if tokenizer is None:
        settings["model.vocab_size"] = config.model.vocab_size
    else:
        settings["vocabulary_sha256"] = vocabulary_hash(tokenizer)
    return {**settings, "format": wanted.format}


def _describe_source(config: Config, files: Sequence[File]) -> dict[str, Any]:
    data = config.data.mixture[0]
    names = {} if data.files else {"dataset": data.dataset, "split": data.split}
    return {**names, "files": [dict(zip(TextFile._fields, file[:3], strict=False)) for file in record_text(files)]}


def _earlier(directory: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a directory that is complete.

    Raises:
        RecipeError: it holds another preparation, or something else, or not what its manifest says.
    """
    elsewhere = "set --output to another directory"
    if os.path.lexists(directory) and not directory.is_dir():
        raise RecipeError(f"{directory} is no directory: {elsewhere}")
    for path in (directory / MANIFEST, directory / UNFINISHED / MANIFEST):
        try:
            earlier = json.loads(path.read_text("utf-8"))
            settings, record = earlier["settings"], [TextFile(**file) for file in earlier["source"]["files"]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError):
            raise RecipeError(f"{path} is not what this command writes: {elsewhere}") from None
        for name in settings | about["settings"]:
            was, now = (of["settings"].get(name) for of in (earlier, about))
            if was != now:
                raise RecipeError(f"{directory} was prepared with {name} = {was}, and not {now}: {elsewhere}")
        if change := what_changed(record, [TextFile(**file) for file in about["source"]["files"]]):
            raise RecipeError(f"{directory} was prepared from other text, {change}: {elsewhere}")
        if path.parent != directory:
            return None
        for name, file in earlier["files"].items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else 0
            if size != file["bytes"]:
                raise RecipeError(
                    f"{directory / name} has {size:,} bytes and not {file['bytes']:,}, as {path} says: remove {directory}, or "
                    f"{elsewhere}"
                )
        return dict(earlier)
    if directory.is_dir() and any(directory.iterdir()):
        raise RecipeError(f"{directory} is not empty, and was not made by this command: {elsewhere}")
    return None


def _prepare_files(preparation: Preparation, do_files: DoFiles, say: Say) -> list[dict[str, Any]]:
    """What each of the files holds, in their order; those that are there already are kept."""
    results = [preparation.result(number) for number in range(preparation.files)]
    left = [number for number, result in enumerate(results) if result is None]
    shards = {number: len(share(len(preparation.source), number, preparation.files)) for number in left}
    progress = Progress(shards, say)
    if len(left) < len(results):
        say(f"{len(results) - len(left)} of {len(results)} files are done already")
    for number, result in do_files(preparation, left, progress.report):
        results[number] = result
        progress.report(number, sum(result[part]["tokens"] for part in PARTS), shards[number])
    if left:
        progress.finish()
    return [result for result in results if result]


def _do_files(
    processes: int, preparation: Preparation, numbers: Sequence[int], report: Callable[..., None]
) -> Iterator[tuple[int, Any]]:
    return do_all(partial(prepare_file, preparation), numbers, processes, report)


class Progress:
    """A line now and then: first after seconds, later after a minute."""

    def __init__(self, shards: dict[int, int], say: Say) -> None:
        self._shards, self._say = shards, say  # shards of each file that is to be made
        self._tokens, self._done = dict.fromkeys(shards, 0), dict.fromkeys(shards, 0)
        self._begun = time.monotonic()
        self._first: float | None = None  # when the first process had begun to read
        self._next = FIRST_PAUSE_SECONDS

    def report(self, number: int, tokens: int, done: int) -> None:
        """So many tokens, and shards, of a file are done."""
        self._tokens[number], self._done[number] = tokens, done
        self._first = self._first or time.monotonic()
        passed = time.monotonic() - self._first
        if passed < self._next:
            return
        self._next = passed + min(max(FIRST_PAUSE_SECONDS, 0.05 * passed), LONGEST_PAUSE_SECONDS)
        total, part = sum(self._tokens.values()), sum(self._done.values()) / sum(self._shards.values())
        files = sum(self._done[number] == count for number, count in self._shards.items())
        left = f", {duration(passed / part - passed)} left" if part else ""
        self._say(
            f"{short_count(total)} tokens, {total / passed:,.0f} tokens/s, {files} of {len(self._shards)} files{left}"
        )

    def finish(self) -> None:
        """All is done."""
        passed, total = time.monotonic() - self._begun, sum(self._tokens.values())
        self._say(f"{total:,} tokens in {duration(passed)}: {total / passed:,.0f} tokens/s")


def _finish(preparation: Preparation, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put together what is held out, and write the manifest."""
    totals = {
        part: {key: sum(result[part][key] for result in results) for key in ("documents", "tokens")} for part in PARTS
    }
    source, ids = preparation.source, preparation.output.ids
    if not totals["training"]["documents"]:
        raise RecipeError(f"{source.name} has no documents to train on")
    files = {preparation.name(number): result["training"] for number, result in enumerate(results)}
    unfinished = list(map(preparation.unfinished, range(preparation.files)))
    if source.validation or source.validation_one_in:
        path = preparation.directory / f"val-00000-of-00001.{preparation.output.ending}"
        held_out = [
            of["held_out"] for of, result in zip(unfinished, results, strict=True) if result["held_out"]["documents"]
        ]
        with new_file(path) as temporary:
            preparation.output.join(held_out, temporary)
        files[path.name] = {**totals["held_out"], "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for number, of in enumerate(unfinished):
        if of["training"].exists():
            os.replace(of["training"], preparation.directory / preparation.name(number))
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "name": ids.tokenizer,
            "vocabulary_sha256": ids.vocabulary_hash,
            "tokens": ids.vocabulary,
            "end_of_text": ids.delimiters[0],
        },
        "rows_are": "packed" if ids.are_packed else "documents",
        "dtype": preparation.output.ids.dtype,
        **totals,
        "bad_rows": sum(result["bad_rows"] for result in results),
        **about,
        "files": {name: file for name, file in files.items() if "bytes" in file},
    }
    with new_file(preparation.directory / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest
