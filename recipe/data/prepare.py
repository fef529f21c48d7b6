"""A source as files of token ids, made once: the k-th of them is a function of the source, the tokenizer and k alone."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from recipe.config.settings import Config, flat_settings
from recipe.config.text_files import MANIFEST
from recipe.data.documents import Source
from recipe.data.encode import DocumentEncoder
from recipe.data.files import File
from recipe.data.find import Say, find_files_of
from recipe.data.formats import Ids
from recipe.data.record import TextFile, record_text, what_changed
from recipe.data.sources import TYPICAL_TOKEN_BYTES, open_source
from recipe.data.streams import ENCODED_CHARACTERS, ENCODED_DOCUMENTS
from recipe.data.token_writers import Output
from recipe.data.tokenizer import load_tokenizer, token_ids_of, vocabulary_hash
from recipe.data.workers import Report, do_all
from recipe.errors import RecipeError
from recipe.format import duration, short_count
from recipe.run.directory import lock
from recipe.run.files import new_directory, new_file, remove, remove_leftovers, sha256_of

FORMAT = 1  # of the manifest
UNFINISHED = ".preparing"  # directory of what is there until all is done
TRAINED = "tokenizer"  # directory of one that was trained on the text
_PARTS = ("training", "held_out")
FILE_BYTES = 256e6  # of ids, before compression
FEWEST_FILES = 8  # if the source has so many shards: work for so many processes
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 60.0  # between lines of progress

# What decides the files; the text itself is compared by its record.
_SETTINGS = (
    *("batch.lanes", "data.text_column", "data.token_column", "data.rows_are", "data.token_dtype", "data.encoding"),
    *("data.on_bad_row", "data.validation_one_in", "data.tokenizer", "model.init_from"),
)


@dataclass(frozen=True)
class Preparation:
    """What a process needs to make any of the files."""

    source: Source
    encoder: DocumentEncoder | None  # None: the source holds ids
    output: Output
    directory: Path
    files: int  # that training documents are written to

    def path(self, number: int) -> Path:
        """A file of training documents."""
        return self.directory / f"train-{number:05d}-of-{self.files:05d}.{self.output.ending}"

    def held_out_path(self, number: int) -> Path:
        """What was held out of it, until all is done."""
        return self.directory / UNFINISHED / f"val-{number:05d}.{self.output.ending}"

    def result(self, number: int) -> dict[str, Any] | None:
        """What `prepare_file` gave, if it is done."""
        with suppress(OSError, ValueError):
            result: dict[str, Any] = json.loads(self._result_path(number).read_text("utf-8"))
            size = result["training"].get("bytes")
            if size is None or self.path(number).stat().st_size == size:
                return result
        return None

    def keep(self, number: int, result: dict[str, Any]) -> None:
        """Note that a file is done."""
        with new_file(self._result_path(number)) as temporary:
            temporary.write_text(json.dumps(result), encoding="utf-8")

    def _result_path(self, number: int) -> Path:
        return self.directory / UNFINISHED / f"{number:05d}.json"


def count_files(source: Source, output: Output) -> int:
    """How many files the training documents are written to. It depends on the source alone."""
    shards = source.training
    text = shards.text_bytes or sum(file.size for file in {part.file for part in shards.parts})
    tokens = shards.tokens or text / TYPICAL_TOKEN_BYTES
    size = tokens * (2 if output.dtype == "uint16" else 4)
    return min(len(shards), max(FEWEST_FILES, math.ceil(size / FILE_BYTES)))


def share(shards: int, number: int, files: int) -> range:
    """The shards of the source that a file holds."""
    return range(shards * number // files, shards * (number + 1) // files)


def prepare_file(preparation: Preparation, number: int, report: Report) -> dict[str, Any]:
    """Make one file of training documents, and what is held out of them, and keep what they hold.

    `report` is called with tokens and shards that are done.

    Raises:
        RecipeError: a shard cannot be read, or a file not written.
    """
    source, files, bad_rows = preparation.source, preparation.files, preparation.source.bad_rows
    shards = share(len(source), number, files)
    paths = preparation.path(number), preparation.held_out_path(number)
    try:
        with ExitStack() as stack:
            training, held_out = (
                stack.enter_context(preparation.output.open(stack.enter_context(new_file(path)))) for path in paths
            )
            for done, shard in enumerate(shards):
                for ids, is_held_out in _encoded(preparation, source.split_shard(shard, shards[done + 1 : done + 9])):
                    (held_out if is_held_out else training).add(ids)
                    report(training.tokens + held_out.tokens, done)
                training.end_shard()
                held_out.end_shard()
            if source.validation:
                of_shards = share(len(source.validation), number, files)
                for ids, _ in _encoded(preparation, source.validation_shards(of_shards)):
                    held_out.add(ids)
                held_out.end_shard()
        result = {"training": _described(paths[0], training), "held_out": _described(paths[1], held_out)}
        result["bad_rows"] = source.bad_rows - bad_rows
        preparation.keep(number, result)
    except OSError as error:
        raise _cannot_write(preparation.directory, error) from None
    return result


def _encoded(preparation: Preparation, documents: Iterable[tuple[Any, bool]]) -> Iterator[tuple[Ids, bool]]:
    """Documents as token ids without end-of-text."""
    if preparation.encoder is None:
        yield from documents
        return
    texts, are_held_out = list[str](), list[bool]()
    for text, is_held_out in chain(documents, [(None, False)]):
        if text is None or len(texts) == ENCODED_DOCUMENTS or sum(map(len, texts)) >= ENCODED_CHARACTERS:
            tokens = preparation.encoder.encode(texts)
            yield from zip((ids[:-1] for ids in tokens), are_held_out, strict=True)
            texts, are_held_out = [], []
        texts.append(text)
        are_held_out.append(is_held_out)


def _described(path: Path, file: Any) -> dict[str, Any]:
    """Documents, tokens without end-of-text, bytes and SHA-256 of a file; nobody reads one of llm.c without documents."""
    found = {"documents": file.documents, "tokens": file.tokens}
    if path.suffix == ".bin" and not file.documents:
        path.unlink()
        return found
    return {**found, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def prepare(config: Config, directory: Path, form: Literal["parquet", "llmc"], processes: int, say: Say) -> Any:
    """Write the one source of `config.data` to a directory as token ids, or what of it is not there yet; its manifest.

    Raises:
        RecipeError: it cannot be read or written, holds no documents, or the directory is that of something else.
    """
    if config.data.sources:
        raise RecipeError("data.sources: prepare the sources of a mixture one by one, each to a directory of its own")
    named, trained, unfinished = (
        config.data.tokenizer or config.model.init_from,
        directory / TRAINED,
        directory / UNFINISHED,
    )
    files = find_files_of(config, say=say)
    tokenizer = load_tokenizer(config, (), config.model.init_from) if named else None
    settings = _settings(config, form, tokenizer)
    about = {"settings": settings, "source": _describe_source(config, files)}
    if done := _earlier(directory, about):
        say(f"{directory} is complete: nothing is left to do")
        return done
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        held = lock(unfinished, f"another process is preparing {directory}: wait for it, or set --output")
        with new_file(unfinished / MANIFEST) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
        for place in (directory, unfinished):
            remove_leftovers(place)
        cache, name = config.data.cache_directory or str(unfinished), str(trained) if trained.is_dir() else None
        config = replace(
            config, data=replace(config.data, cache_directory=cache, tokenizer=config.data.tokenizer or name)
        )
        source = open_source(config, files=files, say=say)
        tokenizer = tokenizer or load_tokenizer(config, [source])
        if not (named or trained.is_dir()):
            with new_directory(trained) as temporary:
                tokenizer.save_pretrained(temporary)
        ids = token_ids_of(tokenizer, settings["data.tokenizer"] or TRAINED, source.holds_pieces)
        output = Output(form, ids, config.batch.lanes)
        encoder = None if source.holds_ids else DocumentEncoder(tokenizer)
        preparation = Preparation(source, encoder, output, directory, count_files(source, output))
        results = _prepare_files(preparation, processes, say)
        manifest = _finish(preparation, about, results)
        if held:
            held.close()
        remove(unfinished)
        return manifest
    except OSError as error:
        raise _cannot_write(directory, error) from None


def _settings(config: Config, form: str, tokenizer: Any) -> dict[str, Any]:
    """What decides the files but for the text. Directories of this machine are not in it."""
    settings = {name: value for name, value in flat_settings(config).items() if name in _SETTINGS}
    name = config.data.tokenizer or config.model.init_from
    settings["data.tokenizer"] = Path(name).resolve().name if name and Path(name).is_dir() else name
    if tokenizer is None:
        settings["model.vocab_size"] = config.model.vocab_size
    else:
        settings["vocabulary_sha256"] = vocabulary_hash(tokenizer)
    return settings | {"format": form}


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
    if os.path.lexists(directory) and not directory.is_dir():
        raise RecipeError(f"{directory} is no directory: {elsewhere}")
    return None


def _prepare_files(preparation: Preparation, processes: int, say: Say) -> list[dict[str, Any]]:
    """What each of the files holds, in their order; those that are there already are kept."""
    results = [preparation.result(number) for number in range(preparation.files)]
    left = [number for number, result in enumerate(results) if result is None]
    shards = {number: len(share(len(preparation.source), number, preparation.files)) for number in left}
    progress = Progress(shards, say)
    if len(left) < len(results):
        say(f"{len(results) - len(left)} of {len(results)} files are done already")
    for number, result in do_all(partial(prepare_file, preparation), left, processes, progress.report):
        results[number] = result
        progress.report(number, sum(result[part]["tokens"] for part in _PARTS), shards[number])
    if left:
        progress.finish()
    return [result for result in results if result]


class Progress:
    """A line now and then: first after seconds, later after a minute."""

    def __init__(self, shards: dict[int, int], say: Say) -> None:
        self._shards, self._say = shards, say  # shards of each file that is to be made
        self._tokens, self._done = dict.fromkeys(shards, 0), dict.fromkeys(shards, 0)
        self._started = time.monotonic()
        self._next = FIRST_PAUSE_SECONDS

    def report(self, number: int, tokens: int, done: int) -> None:
        """So many tokens, and shards, of a file are done."""
        self._tokens[number], self._done[number] = tokens, done
        passed = time.monotonic() - self._started
        if passed < self._next:
            return
        self._next = passed + min(max(FIRST_PAUSE_SECONDS, 0.05 * passed), LONGEST_PAUSE_SECONDS)
        total, share_done = sum(self._tokens.values()), sum(self._done.values()) / sum(self._shards.values())
        files = sum(self._done[number] == count for number, count in self._shards.items())
        left = f", {duration(passed / share_done - passed)} left" if share_done else ""
        self._say(
            f"{short_count(total)} tokens, {total / passed:,.0f} tokens/s, {files} of {len(self._shards)} files{left}"
        )

    def finish(self) -> None:
        """All is done."""
        passed, total = time.monotonic() - self._started, sum(self._tokens.values())
        self._say(f"{total:,} tokens in {duration(passed)}: {total / passed:,.0f} tokens/s")


def _finish(preparation: Preparation, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put together what is held out, and write the manifest."""
    totals = {
        part: {key: sum(result[part][key] for result in results) for key in ("documents", "tokens")} for part in _PARTS
    }
    source, ids = preparation.source, preparation.output.ids
    if not totals["training"]["documents"]:
        raise RecipeError(f"{source.name} has no documents to train on")
    files = {preparation.path(number).name: result["training"] for number, result in enumerate(results)}
    if source.validation or source.validation_one_in:
        path = preparation.directory / f"val-00000-of-00001.{preparation.output.ending}"
        numbers = [number for number, result in enumerate(results) if result["held_out"]["documents"]]
        with new_file(path) as temporary:
            preparation.output.join([preparation.held_out_path(number) for number in numbers], temporary)
        files[path.name] = {**totals["held_out"], "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "name": ids.tokenizer,
            "vocabulary_sha256": ids.vocabulary_hash,
            "tokens": ids.vocabulary,
            "end_of_text": ids.delimiters[0],
        },
        "rows_are": "packed" if ids.are_packed else "documents",
        "dtype": preparation.output.dtype,
        **totals,
        "bad_rows": sum(result["bad_rows"] for result in results),
        **about,
        "files": {name: file for name, file in files.items() if "bytes" in file},
    }
    with new_file(preparation.directory / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _cannot_write(directory: Path, error: OSError) -> RecipeError:
    return RecipeError(
        f"cannot write {directory}: {error.strerror or error}; files that are done are kept, and the same command goes on from "
        "there"
    )
