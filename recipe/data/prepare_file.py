"""The unit of work: one file of token ids, a function of the source, the tokenizer and the number of the file alone."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from recipe.data.documents import Source
from recipe.data.encode import DocumentEncoder
from recipe.data.formats import Ids
from recipe.data.sources import TYPICAL_TOKEN_BYTES
from recipe.data.streams import ENCODED_CHARACTERS, ENCODED_DOCUMENTS
from recipe.data.token_writers import Output
from recipe.data.workers import Report
from recipe.errors import RecipeError
from recipe.run.files import new_file, sha256_of

UNFINISHED = ".preparing"  # directory of what is there until all is done
FILE_BYTES = 256e6  # of ids, before compression
FEWEST_FILES = 8  # if the source has so many shards: work for so many processes
SHARDS_AHEAD = 2  # row groups of remote files on the way
PARTS = ("training", "held_out")


@dataclass(frozen=True)
class Preparation:
    """What a process needs to make any of the files."""

    source: Source
    encoder: DocumentEncoder | None  # None: the source holds ids
    output: Output
    directory: Path
    files: int  # that training documents are written to

    def name(self, number: int) -> str:
        """Of a file of training documents, once all is done."""
        return f"train-{number:05d}-of-{self.files:05d}.{self.output.ending}"

    def unfinished(self, number: int) -> dict[str, Path]:
        """The files that training and held-out documents are in until all is done: nobody trains on a part by mistake."""
        directory, ending = self.directory / UNFINISHED, self.output.ending
        return {part: directory / f"{part}-{number:05d}.{ending}" for part in PARTS}

    def result(self, number: int) -> dict[str, Any] | None:
        """What `prepare_file` gave, if it is done."""
        with suppress(OSError, ValueError):
            result: dict[str, Any] = json.loads(self._note(number).read_text("utf-8"))
            for part, path in self.unfinished(number).items():
                is_moved = part == "training" and not path.exists()
                path = self.directory / self.name(number) if is_moved else path
                if "bytes" in result[part] and path.stat().st_size != result[part]["bytes"]:
                    return None
            return result
        return None

    def keep(self, number: int, result: dict[str, Any]) -> None:
        """Note that a file is done."""
        with new_file(self._note(number)) as temporary:
            temporary.write_text(json.dumps(result), encoding="utf-8")

    def _note(self, number: int) -> Path:
        return self.directory / UNFINISHED / f"{number:05d}.json"


def count_files(source: Source, output: Output) -> int:
    """How many files the training documents are written to. It depends on the source alone."""
    shards = source.training
    text = shards.text_bytes or sum(file.size for file in {part.file for part in shards.parts})
    tokens = shards.tokens or text / TYPICAL_TOKEN_BYTES
    size = tokens * (2 if output.ids.dtype == "uint16" else 4)
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
    paths = preparation.unfinished(number)
    try:
        with ExitStack() as stack:
            temporary = [stack.enter_context(new_file(path)) for path in paths.values()]
            outputs = [preparation.output.open(path) for path in temporary]
            for output in outputs:
                stack.enter_context(output)
            training, held_out = outputs
            for done, shard in enumerate(shards):
                documents = source.split_shard(shard, shards[done + 1 : done + 1 + SHARDS_AHEAD])
                for ids, is_held_out in _encoded(preparation, documents):
                    outputs[is_held_out].add(ids)
                    report(training.tokens + held_out.tokens, done)
                training.end_shard()
            if source.validation:
                of_shards = share(len(source.validation), number, files)
                for ids, _ in _encoded(preparation, source.validation_shards(of_shards)):
                    held_out.add(ids)
        described = map(_described, paths.values(), (training, held_out))
        result = {**dict(zip(paths, described, strict=True)), "bad_rows": source.bad_rows - bad_rows}
        preparation.keep(number, result)
    except OSError as error:
        raise cannot_write(preparation.directory, error) from None
    return result


def _encoded(preparation: Preparation, documents: Iterable[tuple[Any, bool]]) -> Iterator[tuple[Ids, bool]]:
    """Documents as token ids without end-of-text."""
    if preparation.encoder is None:
        yield from documents
        return
    texts, are_held_out, characters = list[str](), list[bool](), 0
    for text, is_held_out in chain(documents, [(None, False)]):
        if text is None or len(texts) == ENCODED_DOCUMENTS or characters >= ENCODED_CHARACTERS:
            yield from zip(preparation.encoder.encode(texts), are_held_out, strict=True)
            texts, are_held_out, characters = [], [], 0
        texts.append(text)
        are_held_out.append(is_held_out)
        characters += len(text or "")


def _described(path: Path, file: Any) -> dict[str, Any]:
    """Documents, tokens without end-of-text, bytes and SHA-256 of a file; nobody reads one of llm.c without documents."""
    found = {"documents": file.documents, "tokens": file.tokens}
    if path.suffix == ".bin" and not file.documents:
        path.unlink()
        return found
    return {**found, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def cannot_write(directory: Path, error: OSError) -> RecipeError:
    """What to say of a directory."""
    return RecipeError(
        f"cannot write {directory}: {error.strerror or error}; files that are done are kept, and the same command goes on from "
        "there"
    )
