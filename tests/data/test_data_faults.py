"""Text that is streamed over HTTP is read exactly once, however badly the server behaves. A real server on 127.0.0.1."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recipe.data.documents as documents_module
import recipe.data.files as files_module
import recipe.data.remote_files as remote_files
from recipe.checkpoint.files import read_state
from recipe.checkpoint.verify import why_invalid
from recipe.config.settings import BatchConfig, Config, DataConfig, RunConfig
from recipe.data.documents import Source
from recipe.data.lanes import Lane
from recipe.data.sources import open_source
from recipe.data.streams import DocumentStream, LaneOrder
from recipe.errors import DATA_EXIT_CODE, RecipeError
from recipe.run.directory import list_checkpoints
from tests.helpers import ROOT, SCRIPT, TINY, end_of, environment, read_ledger, start_ranks, train, write_texts
from tests.support.http_server import FAULTS, HUB_COMMIT, HUB_DATASET, HttpServer, for_ever

FORMATS = ("jsonl", "jsonl.gz", "parquet")
EVERY_FAULT = ("404", "500", "503", "no ranges", "shrunk", *(fault for fault in FAULTS if fault != "hang"))
DOCUMENTS = 200
BLOCKS = 110  # of 4 tokens: a document is 2, so this is one epoch and a part of the next


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in every format: 4 MB, many blocks."""
    root, chance = tmp_path_factory.mktemp("corpus"), random.Random(0)
    texts = [f"{i} {chance.randbytes(10_000).hex()}" for i in range(DOCUMENTS)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (root / "a.jsonl").write_bytes(lines)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pq.write_table(pa.table({"text": texts}), root / "a.parquet", row_group_size=20)
    (root / "latin.txt").write_bytes(b"caf\xe9\r\nand more")
    (root / "a.txt").write_text("\n".join(text[:1000] for text in texts))
    return root


@pytest.fixture(scope="module")
def server(corpus: Path) -> Iterator[HttpServer]:
    """Serves the corpus; this process reads it in small blocks and waits for milliseconds where it would for seconds."""
    with HttpServer(corpus) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "BLOCK_BYTES", 1 << 17)
        patch.setattr(remote_files, "PAUSES_SECONDS", (0.001, 0.002))
        patch.setattr(documents_module, "FIRST_PAUSE_SECONDS", 0.005)
        yield server


def source_of(server: HttpServer, directory: Path, *names: str, lanes: int = 1, **data: object) -> Source:
    settings = {
        "text_files": tuple(map(server.address, names)),
        "validation_one_in": None,
        "retry_seconds": 20.0,
        **data,
    }
    return open_source(
        Config(
            run=RunConfig(directory=str(directory)),
            batch=BatchConfig(lanes=lanes),
            data=DataConfig(**settings),  # type: ignore[arg-type]
        )
    )


def lane_of(source: Source, index: int = 0, lanes: int = 1) -> Lane:
    """Its tokens are a hash of each document, and 0 behind it."""
    stream = DocumentStream(source, encode_hashes, index, LaneOrder(lanes, seed=3, shuffle_blocks=7))
    return Lane([stream], sequence_length=4, end_of_text=0)


def encode_hashes(texts: list[str]) -> list[np.ndarray]:
    return [np.array([crc32(text.encode()) >> 1], dtype=np.int32) for text in texts]


def read(lane: Lane, blocks: int = BLOCKS) -> list[list[int]]:
    return [lane.next_blocks(1)[0].tolist() for _ in range(blocks)]


@pytest.fixture(scope="module")
def sources(server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Opened while the server is well."""
    return {name: source_of(server, tmp_path_factory.mktemp("run"), f"a.{name}") for name in FORMATS}


@pytest.fixture(scope="module")
def healthy(sources: dict[str, Source]) -> list[list[int]]:
    """What a lane gives where nothing fails."""
    blocks = {name: read(lane_of(source)) for name, source in sources.items()}
    assert blocks["jsonl"] == blocks["jsonl.gz"] == blocks["parquet"]
    assert len({token for block in blocks["jsonl"] for token in block}) == DOCUMENTS + 1
    return blocks["jsonl"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_documents_are_those_of_a_healthy_server(
    fault: str, name: str, server: HttpServer, sources: dict[str, Source], healthy: list[list[int]]
) -> None:
    """Once, and for so long that the file is opened again: each document once, whole, in order."""
    server.plan(f"a.{name}", [None, *4 * [fault], None, None, fault])
    assert read(lane_of(sources[name])) == healthy
    assert server.is_over(f"a.{name}")


@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_a_text_is_whole(fault: str, server: HttpServer, corpus: Path, tmp_path: Path) -> None:
    """Plain text has no syntax that would break where a part of it is missing."""
    source = source_of(server, tmp_path, "a.txt")
    server.plan("a.txt", 4 * [fault])
    assert list(source.training_documents()) == [(corpus / "a.txt").read_text()]
    assert server.is_over("a.txt")


@pytest.mark.parametrize("name", FORMATS)
def test_a_lane_resumes_from_its_state_while_the_server_fails(
    name: str, server: HttpServer, sources: dict[str, Source], healthy: list[list[int]]
) -> None:
    source = sources[name]
    for done in (3, 60):
        lane = lane_of(source)
        server.plan(f"a.{name}", itertools.cycle([None, "reset", None, "short"]))
        assert read(lane, done) == healthy[:done]
        again = lane_of(source)
        again.load_state_dict(json.loads(json.dumps(lane.state_dict())))
        assert read(again, BLOCKS - done) == healthy[done:]


def test_row_groups_of_a_remote_file_are_lanes(server: HttpServer, tmp_path: Path) -> None:
    source = source_of(server, tmp_path, "a.parquet", lanes=5)
    assert len(source) == 10
    expected = [read(lane_of(source, index, 5), 25) for index in range(5)]
    server.plan("a.parquet", itertools.cycle([None, None, "cut", "no length"]))
    assert [read(lane_of(source, index, 5), 25) for index in range(5)] == expected
    assert len({token for blocks in expected for block in blocks for token in block}) == DOCUMENTS + 1


def test_a_file_with_fewer_shards_than_lanes_is_copied_whole_or_not_at_all(
    server: HttpServer, sources: dict[str, Source], tmp_path: Path
) -> None:
    """A compressed one is split by rows; a download that fails is one line at the start of a run."""
    expected = list(sources["jsonl"].training_documents())
    server.plan("a.jsonl.gz", itertools.chain([None, None, None], for_ever("short")))
    with pytest.raises(RecipeError, match=r"cannot read http://.*a\.jsonl\.gz.*asked for bytes") as caught:
        source_of(server, tmp_path, "a.jsonl.gz", lanes=3, retry_seconds=0.5)
    assert caught.value.exit_code == DATA_EXIT_CODE
    server.plan("a.jsonl.gz", [None, None, None, "cut"])
    source = source_of(server, tmp_path, "a.jsonl.gz", lanes=3)
    assert server.is_over("a.jsonl.gz")
    assert len(source) == 48
    assert list(source.training_documents()) == expected


def test_documents_for_tokenizer_and_validation_are_read_exactly_once(
    server: HttpServer, sources: dict[str, Source]
) -> None:
    source = replace(sources["jsonl"], validation_one_in=5)
    expected = list(source.training_documents()), list(source.validation_documents())
    assert min(map(len, expected)) > 20
    for _ in range(2):  # the second time from the start again
        server.plan("a.jsonl", [None, *4 * ["reset"], None, *4 * ["503"]])
        assert (list(source.training_documents()), list(source.validation_documents())) == expected


@pytest.mark.parametrize("fault", ["404", "shrunk"])
def test_a_shard_that_stays_away_is_one_line_after_the_time_limit(
    fault: str, server: HttpServer, sources: dict[str, Source], healthy: list[list[int]]
) -> None:
    """Also one that is shorter than it was, and whose end would be an end like any other."""
    lane = lane_of(replace(sources["jsonl"], retry_seconds=0.5))
    server.plan("a.jsonl", for_ever(fault))
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"cannot read http.*asked for bytes.*0\.5 s.*once it can be read") as caught:
        read(lane)
    assert 0.3 < time.monotonic() - started < 4
    assert caught.value.exit_code == DATA_EXIT_CODE
    server.plan("a.jsonl", [])
    again = lane_of(lane.streams[0].source)
    again.load_state_dict(lane.state_dict())
    assert read(again) == healthy


def test_a_server_that_says_nothing_has_failed(
    server: HttpServer, sources: dict[str, Source], healthy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "SILENCE_SECONDS", 0.1)
    server.plan("a.jsonl", [None, *4 * ["hang"]])
    assert read(lane_of(sources["jsonl"])) == healthy
    assert server.is_over("a.jsonl")


@pytest.mark.parametrize(("name", "words"), [("none.jsonl", "HTTP Error 404"), ("latin.txt", "no range, status 200")])
def test_an_address_that_cannot_be_streamed_is_one_line(
    name: str, words: str, server: HttpServer, tmp_path: Path
) -> None:
    """No such file, and a server that answers no ranges."""
    server.plan("latin.txt", for_ever("no ranges"))
    with pytest.raises(RecipeError, match=f"cannot read http.*{words}") as caught:
        source_of(server, tmp_path, name)
    assert caught.value.exit_code == 2


def test_query_strings_and_plain_text(server: HttpServer, tmp_path: Path) -> None:
    """What follows the ending belongs to the address; text is that of local files, of which line ends stay."""
    query = "?key=a/b.c*[d]&x=1"
    server.plan("latin.txt", [])
    with pytest.raises(RecipeError, match=r"latin\.txt has a byte that is not UTF-8 \(0xe9, byte 3\).*data\.encoding"):
        list(source_of(server, tmp_path, f"latin.txt{query}").training_documents())
    source = source_of(server, tmp_path, f"latin.txt{query}", encoding="latin-1")
    assert list(source.training_documents()) == ["café\r\nand more"]
    source = source_of(server, tmp_path, *(f"a.{name}{query}" for name in ("jsonl", "jsonl.gz")), lanes=2)
    assert sum(1 for _ in source.training_documents()) == 2 * DOCUMENTS


HUB_SCRIPT = """
import json, sys
from zlib import crc32
import recipe.data.documents, recipe.data.files, recipe.data.remote_files
from recipe.config.settings import BatchConfig, Config, DataConfig
from recipe.data.record import record_text
from recipe.data.find import find_files_of
from recipe.data.sources import open_source
recipe.data.documents.FIRST_PAUSE_SECONDS = 0.005
recipe.data.remote_files.PAUSES_SECONDS = (0.001, 0.002)
recipe.data.files.BLOCK_BYTES = 1 << 16
data = DataConfig(dataset=sys.argv[1], validation_one_in=None, retry_seconds=20)
config = Config(batch=BatchConfig(lanes=1), data=data)
files = find_files_of(config)
record, source = record_text(files), open_source(config, files=files)
print("opened", flush=True)
sys.stdin.readline()
print(json.dumps([record, [crc32(str(text).encode()) for text in source.training_documents()]]))
"""


@pytest.mark.slow
def test_documents_of_the_hub_are_those_of_a_healthy_one(
    corpus: Path, sources: dict[str, Source], tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/a.jsonl").symlink_to(corpus / "a.jsonl")
    with HttpServer(tmp_path / "hub") as server:
        hub = {"HF_ENDPOINT": server.address("").rstrip("/"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        process = subprocess.Popen(
            [sys.executable, "-c", HUB_SCRIPT, HUB_DATASET],
            cwd=ROOT,
            env=environment(**hub),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n", process.communicate()[1]
        faults = ["404", "503", "no ranges", "reset", "cut", "short", "page", "empty"]
        server.plan("a.jsonl", [None, *4 * faults])
        output, errors = process.communicate("go\n", timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert server.is_over("a.jsonl")
    record, documents = json.loads(output)
    assert documents == [crc32(str(text).encode()) for text in sources["jsonl"].training_documents()]
    assert record == [[HUB_DATASET, None, HUB_COMMIT, 0]]


def training(server: HttpServer, directory: Path, ending: str, *more: str) -> list[str]:
    """40 updates; a shard for each lane, so that rank 1 of 2 alone reads those from 4 on, many times over."""
    files = [server.address(f"{number:03d}.{ending}") for number in range(8)]
    return [
        *[*TINY, "--run.directory", str(directory), "--data.text_files", *files],
        *["--data.cache_directory", str(directory / "cache"), "--data.shuffle_blocks", "3", *more],
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents in each of eight shards, as JSONL and as Parquet."""
    root = tmp_path_factory.mktemp("texts")
    texts = write_texts(root / "txt", count=24, largest=1200)
    for number in range(8):
        own = texts[3 * number : 3 * number + 3]
        (root / f"{number:03d}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
        pq.write_table(pa.table({"text": own}), root / f"{number:03d}.parquet", row_group_size=1)
    return root


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], tuple[list[str], int]]]:
    """(blocks_sha256 of each update, requests for 005.jsonl) of a run in one process on a healthy server, beside the tests."""

    def undisturbed_run() -> tuple[list[str], int]:
        directory = tmp_path_factory.mktemp("undisturbed")
        with HttpServer(texts) as server:
            done = train(*training(server, directory, "jsonl"))
            assert done.returncode == 0, done.stderr
            return blocks_of(directory), server.requests.count("005.jsonl")

    with ThreadPoolExecutor() as pool:
        yield pool.submit(undisturbed_run).result


def blocks_of(directory: Path) -> list[str]:
    return [line["blocks_sha256"] for line in read_ledger(directory)]


@pytest.mark.slow
def test_a_run_does_not_notice_what_the_server_does(
    texts: Path, undisturbed: Callable[[], tuple[list[str], int]], tmp_path: Path
) -> None:
    """Parquet this time, tokenizer and all: the blocks are those of the healthy server's JSONL."""
    faults = ["reset", "cut", "short", "page"]
    with HttpServer(texts) as server:
        for number, fault in enumerate(faults):
            server.plan(f"{number:03d}.parquet", [None, None, None, fault])
        server.plan("006.parquet", [None, *4 * ["404"]])  # while the tokenizer is trained
        done = train(*training(server, tmp_path, "parquet"))
        assert all(server.is_over(f"{number:03d}.parquet") for number in range(8))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error") == 0
    assert blocks_of(tmp_path) == undisturbed()[0]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_shard_that_is_gone_stops_all_ranks_with_a_checkpoint_and_one_message(
    sharding: str, texts: Path, undisturbed: Callable[[], tuple[list[str], int]], tmp_path: Path
) -> None:
    """Only rank 1 reads it. When it is back, the same command goes on."""
    expected, requests = undisturbed()
    with HttpServer(texts) as server:
        more = ["--data.retry_seconds", "2", "--performance.sharding", sharding]
        command = [SCRIPT, *training(server, tmp_path, "jsonl", *more)]
        server.plan("005.jsonl", itertools.chain(itertools.repeat(None, requests - 3), for_ever("404")))
        exit_codes, _, errors = end_of(start_ranks(2, command, stderr=subprocess.PIPE))
        assert exit_codes == [DATA_EXIT_CODE] * 2, errors
        (message,) = errors.splitlines()
        assert message.startswith("error (rank 1): cannot read shard 5 of 8 files: http")
        assert re.search(r"/005\.jsonl: .*404.*tried again for 2 s.*the same command goes on", message)
        done = blocks_of(tmp_path)
        assert 0 < len(done) < len(expected)
        assert done == expected[: len(done)]
        newest = list_checkpoints(tmp_path / "checkpoints")[0]
        assert why_invalid(newest) is None
        assert read_state(newest).update == len(done)

        server.plan("005.jsonl", [])
        exit_codes, output, _ = end_of(start_ranks(2, command))
        assert exit_codes == [0, 0], output
    assert blocks_of(tmp_path) == expected
