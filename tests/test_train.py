"""Whole runs, as a user starts them: the same update on any number of ranks, with any micro-batch."""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest

from recipe.config.command_line import load_config
from recipe.plan.run_plan import make_plan
from recipe.plan.schedule import learning_rate
from recipe.run.ledger import LedgerEntry, read_lines
from tests.helpers import ACCELERATE, ROOT, SCRIPT, assert_same_run, read_ledger, run, run_ranks, train, write_texts
from tests.support.factorisations import OPTIMIZERS, TOKENS, UPDATES, arguments, assert_same_updates

FACTORISATIONS = ((1, 8), (1, 3), (2, 5), (3, 2))  # (ranks, micro-batch)
LAUNCH = [ACCELERATE, "launch", "--config_file", "accelerate_configs/cpu_2.yaml", SCRIPT]
RENDEZVOUS = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", *RENDEZVOUS, SCRIPT]
Runs = dict[tuple[str, int, int], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Directory of the run of 20 updates for each (optimizer, ranks, micro-batch); one of them as README has it launched."""
    root = tmp_path_factory.mktemp("runs")
    write_texts(root / "texts")

    def train(optimizer: str, ranks: int, size: int) -> Path:
        directory = root / f"{optimizer}-{ranks}-{size}"
        command = arguments(directory, root / "texts", optimizer, size)
        if (optimizer, ranks) == ("sgd", 2):
            done = run([*LAUNCH, *command])
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            output = done.stdout
        else:
            trackers = ["--log.trackers", "tensorboard"] if (optimizer, ranks) == ("adamw", 1) else []
            output = run_ranks(ranks, [SCRIPT, *command, *trackers])
        (directory / "output.txt").write_text(output, encoding="utf-8")
        return directory

    keys = [(optimizer, *shape) for optimizer in OPTIMIZERS for shape in FACTORISATIONS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(keys, pool.map(lambda key: train(*key), keys), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_does_not_depend_on_ranks_or_micro_batch(runs: Runs, optimizer: str) -> None:
    reference = read_ledger(runs[optimizer, 1, 8])
    assert reference[0]["loss"] - reference[-1]["loss"] > 0.5, "it learns, so equal losses say something"
    assert len({entry["blocks_sha256"] for entry in reference}) == UPDATES
    for ranks, size in FACTORISATIONS[1:]:
        ledger = read_ledger(runs[optimizer, ranks, size])
        assert {entry["world_size"] for entry in ledger} == {ranks}
        assert_same_updates(reference, ledger)


@pytest.mark.slow
def test_muon_does_not_depend_on_ranks_micro_batch_or_resumes(tmp_path: Path) -> None:
    """A resumed run has its bits; its momentum is as exact as AdamW's, over ranks."""
    write_texts(tmp_path / "texts")

    def train(name: str, ranks: int, size: int, *more: str) -> Path:
        given = [*arguments(tmp_path / name, tmp_path / "texts", "adamw", size), "--optimizer.name", "muon", *more]
        run_ranks(ranks, [SCRIPT, *given])
        return tmp_path / name

    whole = train("whole", 1, 8)
    for ranks, size in FACTORISATIONS[1:]:
        assert_same_updates(read_ledger(whole), read_ledger(train(f"{ranks}-{size}", ranks, size)))
    for stop_after in ("7", "20"):
        train("resumed", 1, 8, "--run.max_updates", stop_after)
    assert_same_run(whole, tmp_path / "resumed")


@pytest.mark.slow
def test_torchrun_launches_it_too(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    for command, name, size in (([sys.executable, SCRIPT], "one", 8), (TORCHRUN, "three", 2)):
        done = run([*command, *arguments(tmp_path / name, tmp_path / "texts", "sgd", size)])
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert_same_updates(read_ledger(tmp_path / "one"), read_ledger(tmp_path / "three"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rate_is_its_closed_form_on_any_number_of_ranks(runs: Runs, optimizer: str) -> None:
    """With a budget that changes too: times the root of what the budget is to the first."""
    config = load_config(arguments(Path("x"), runs["sgd", 1, 8].parent / "texts", optimizer, 8))
    sizes = TOKENS[optimizer]
    total = make_plan(config, 1).total_tokens
    assert total == (61_440 if optimizer == "sgd" else 61_952)  # rounded up to whole updates
    expected = [
        learning_rate(sum(sizes[:update]), total, config.optimizer, config.schedule) * math.sqrt(size / 1536)
        for update, size in enumerate(sizes, start=1)
    ]
    assert expected[0] == pytest.approx(float(OPTIMIZERS[optimizer]) * 1536 / 7680)
    assert expected[4] == pytest.approx(float(OPTIMIZERS[optimizer])), "the warm-up ends with update 5"
    for ranks, size in FACTORISATIONS:
        found = [entry["learning_rate"] for entry in read_ledger(runs[optimizer, ranks, size])]
        assert found == pytest.approx(expected, rel=1e-12)


def test_ledger_fields_and_their_meaning(runs: Runs) -> None:
    names = {f.name for f in fields(LedgerEntry)} - {"sources", "validation"}  # no mixture, and nothing held out
    for (optimizer, ranks, size), directory in runs.items():
        sizes = TOKENS[optimizer]
        for number, (entry, tokens) in enumerate(zip(read_ledger(directory), sizes, strict=True), start=1):
            assert set(entry) == names
            assert entry["update"] == number
            assert entry["tokens"] == sum(sizes[:number])
            assert entry["target_tokens"] == tokens
            assert (entry["world_size"], entry["micro_batch_size"]) == (ranks, size)
            largest_share = math.ceil(8 / ranks) * tokens // 512
            assert entry["gradient_accumulation_steps"] == math.ceil(largest_share / size)
            assert len(entry["blocks_sha256"]) == 64
            assert 0 <= entry["data_wait_seconds"] <= entry["update_seconds"] * 1.01 + 0.01
            assert entry["tokens_per_second"] == pytest.approx(tokens / entry["update_seconds"])
            assert entry["mfu"] is None, "the peak of this CPU is not known"
            assert entry["peak_memory_bytes"] > 1e8


def test_every_ledger_field_is_documented() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert [
        f.name for f in fields(LedgerEntry) if f"`{f.name}`" not in text and f.name not in ("sources", "validation")
    ] == []


def test_trackers_receive_the_ledger(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = runs["adamw", 1, 8]
    events = min(directory.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))  # hparams are one deeper
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    ledger = read_ledger(directory)
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
        logged = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert logged == [(entry["update"], pytest.approx(entry[name], rel=1e-6)) for entry in ledger]


@pytest.mark.slow
def test_finished_model_loads_with_transformers_alone(runs: Runs, tmp_path: Path) -> None:
    """By the Python that the run prints, copied away, in a process that never imports this repository."""
    directory = runs["adamw", 3, 2]
    final = directory / "final"
    shutil.copytree(final, tmp_path / "model")
    assert {p.suffix for p in (tmp_path / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}
    printed = (directory / "output.txt").read_text(encoding="utf-8")
    snippet = printed[printed.index("from transformers import") :].replace(str(final), "model")
    script = f"""
{snippet}
import sys
from transformers import AutoModelForCausalLM
assert type(model) is GPT2LMHeadModel and model.dtype.is_floating_point and model.config._attn_implementation == "sdpa"
assert type(AutoModelForCausalLM.from_pretrained("model")) is GPT2LMHeadModel
assert model.config.vocab_size == len(tokenizer) == 384 and tokenizer.eos_token == "<|endoftext|>"
assert not [name for name in sys.modules if name.split(".")[0] == "recipe"]
print("loaded")
"""
    done = run([sys.executable, "-c", script], cwd=tmp_path, PYTHONPATH="", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def __init__(self")
    assert done.stdout.endswith("loaded\n")


def test_a_written_configuration_can_be_given_back(runs: Runs) -> None:
    directory = runs["adamw", 2, 5]
    again = load_config(["--config", str(directory / "config.yaml")])
    assert again == load_config(arguments(directory, directory.parent / "texts", "adamw", 5))


def test_commands_read_the_finished_model(runs: Runs) -> None:
    directory = runs["adamw", 1, 3]
    model, texts = str(directory / "final"), f"{directory.parent}/texts/*.txt"
    sample = run([sys.executable, "-m", "recipe", "generate", model, "--prompt", "import os", "--max_new_tokens", "8"])
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("import os")
    evaluated = run([sys.executable, "-m", "recipe", "evaluate", model, "--data.text_files", texts])
    assert evaluated.returncode == 0, evaluated.stderr
    loss = float(evaluated.stdout.split("loss")[1].split()[0])
    assert loss == pytest.approx(read_ledger(directory)[-1]["loss"], abs=0.5), "on the text it was trained on"
    for word in ("perplexity", "bits per byte"):
        assert word in evaluated.stdout


@pytest.mark.slow
def test_a_run_shows_everything_in_order_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    """Plan, validation, progress, sample, parity, model; twice in one directory; evaluated times are in the ledger."""
    write_texts(tmp_path / "texts", count=60)
    command = [
        *arguments(tmp_path / "run", tmp_path / "texts", "adamw", 8),
        *["--run.max_updates", "4", "--run.parity_check", "true", "--data.validation_one_in", "10"],
        *["--evaluation.every_tokens", "3072", "--batch.scaling", "manual"],
    ]
    first = train(*command)
    assert first.returncode == 0, first.stderr
    shown = [
        *("tokens per update", "accumulation steps", "validation after 0 updates", "update      1/4"),
        *("validation after 2 updates", "validation after 4 updates", "  before  ", "  after   ", "\nsample\n"),
        *("parity check", "manual, micro-batch 7 x 4 steps", "they agree", "finished model"),
        "GPT2LMHeadModel.from_pretrained",
    ]
    positions = [first.stdout.index(words) for words in shown]
    assert positions == sorted(positions)
    ledger, column = read_ledger(tmp_path / "run"), "validation/held_out/loss"
    assert [entry["update"] for entry in ledger if entry[column] is not None] == [2, 4]
    assert [entry["update"] for entry in ledger if entry["validation/held_out/bits_per_byte"] is not None] == [2, 4]
    (before,) = read_lines(tmp_path / "run/ledger.jsonl")[:1]
    assert (before["update"], before["tokens"], before["loss"]) == (0, 0, None)
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    held_out = summary["validation"]["held_out"]
    assert held_out["after"]["loss"] == ledger[-1][column] < held_out["before"]["loss"] == before[column]
    assert max(d for _, d in summary["parity_check"]["differences"]) < 1e-6

    again = train(*command)
    assert again.returncode == 0, again.stderr
    assert "this run is complete" in again.stdout
    assert read_ledger(tmp_path / "run") == ledger
    second = train(*command, "--resume", "fresh")
    assert second.returncode == 0, second.stderr
    earlier = tmp_path / "run/previous/1"
    assert str(earlier) in second.stdout
    assert read_ledger(earlier) == ledger
    assert (earlier / "events.jsonl").exists()
    assert [e["loss"] for e in read_ledger(tmp_path / "run")] == [e["loss"] for e in ledger], "the same run again"


@pytest.mark.slow
def test_bf16_keeps_parameters_in_float32_and_learns(tmp_path: Path) -> None:
    """Two updates, since it is slow on a CPU: bf16 products, a loss within bf16's rounding of the float32 one."""
    write_texts(tmp_path / "texts")
    losses = {}
    for precision in ("fp32", "bf16"):
        command = arguments(tmp_path / precision, tmp_path / "texts", "sgd", 8)
        done = train(*command, "--run.max_updates", "2", "--precision", precision, "--run.parity_check", "true")
        assert done.returncode == 0, done.stderr
        assert f"{precision}: as configured" in done.stdout
        losses[precision] = [entry["loss"] for entry in read_ledger(tmp_path / precision)]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-3)
    config = json.loads((tmp_path / "bf16/final/config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
