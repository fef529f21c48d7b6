"""Evaluation in a run: named validation sets, samples."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipe.commands import evaluate as evaluate_command
from recipe.config.command_line import load_config
from recipe.data.validation import pack_validation
from recipe.errors import RecipeError
from recipe.evaluation.evaluate import Evaluation, evaluate, mean_by_weight
from recipe.model.export import load_pretrained
from recipe.model.gpt2 import CausalLanguageModel
from recipe.run.stop import StopRequest
from tests.helpers import TINY, read_events, read_ledger, run_ranks, train, write_texts
from tests.support.tokenizers import make_tokenizer

UPDATES = 4
TOO_LONG = "many words " * 500
PROMPTS = ["def main", 'a "quoted" \N{GRINNING FACE}\nline']


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


# In a run: two ranks, with dropout, once with everything and once with none of it.


@pytest.fixture(scope="module")
def runs(root: Path) -> tuple[Path, Path]:
    """(run with named sets and samples, the same run without)."""
    texts = write_texts(root / "texts", count=60)
    (root / "short.txt").write_text(texts[0], encoding="utf-8")
    rows = [json.dumps({"text": text}) + "\n" for text in texts[1:4]]
    (root / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    common = [
        *["recipe/train.py", *TINY, "--data.text_files", f"{root}/texts/*.txt", "--data.validation_one_in", "10"],
        *["--run.max_updates", str(UPDATES), "--model.dropout", "0.1", "--evaluation.every_tokens", "3072"],
    ]
    sets = ["--evaluation.sets.short", f"{root}/short.txt", "--evaluation.sets.rows", f"{root}/rows.jsonl"]
    evaluated = [*common, "--run.directory", str(root / "with"), *sets, "--evaluation.prompts", *PROMPTS, TOO_LONG]
    evaluated += ["--evaluation.sample_tokens", "62"]
    plain = [*common, "--run.directory", str(root / "without"), "--evaluation.sample_tokens", "null"]
    with ThreadPoolExecutor() as pool:
        outputs = [pool.submit(run_ranks, 2, command) for command in (evaluated, plain)]
        (root / "output.txt").write_text(outputs[0].result(), encoding="utf-8")
        assert "samples of" not in outputs[1].result()
    return root / "with", root / "without"


def test_a_run_with_samples_and_sets_is_bit_identical_to_one_without(runs: tuple[Path, Path]) -> None:
    mine, other = runs
    for name in ("loss", "grad_norm", "validation/held_out/loss"):
        assert [e[name] for e in read_ledger(mine)] == [e[name] for e in read_ledger(other)], name
    weights, others = (load_file(directory / "final/model.safetensors") for directory in runs)
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_each_prompt_is_sampled_once_at_each_evaluation(runs: tuple[Path, Path]) -> None:
    samples = read_events(runs[0], "sample")
    assert [(s["update"], s["prompt"]) for s in samples] == [(u, p) for u in (2, 4) for p in PROMPTS]
    assert all(s["text"].startswith(s["prompt"]) and len(s["text"]) > len(s["prompt"]) for s in samples)
    assert samples[0]["text"] != samples[2]["text"], "the model has learnt something"
    assert not read_events(runs[1], "sample")
    output = (runs[0].parent / "output.txt").read_text(encoding="utf-8")
    assert output.count("no samples of one of evaluation.prompts: the prompt 'many words") == 1
    fewer = re.findall(
        r"samples of '.*': (\d+) tokens at most \(evaluation.sample_tokens = 62\): .* 64 positions", output
    )
    assert len(fewer) == 2
    assert all(0 < int(count) < 62 for count in fewer)


def test_the_ledger_holds_the_loss_of_each_named_set(runs: tuple[Path, Path]) -> None:
    """Two ranks with unequal shares of the blocks, against the finished model and the set's text in this process."""
    from accelerate import Accelerator

    entries = read_ledger(runs[0])
    for name in ("short", "rows"):
        assert [entry[f"validation/{name}/loss"] is None for entry in entries] == [True, False] * 2
        assert f"validation/{name}/loss" not in read_ledger(runs[1])[-1]
    gpt2, tokenizer = load_pretrained(str(runs[0] / "final"))
    texts = {"short": [(runs[0].parent / "short.txt").read_text(encoding="utf-8")]}
    texts["rows"] = [json.loads(line)["text"] for line in (runs[0].parent / "rows.jsonl").open(encoding="utf-8")]
    summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
    for name, documents in texts.items():
        blocks = pack_validation(iter(documents), tokenizer, 64, float("inf"))
        assert blocks is not None
        model = CausalLanguageModel(gpt2, len(tokenizer))
        expected = evaluate(model, blocks, Accelerator(cpu=True), 1, StopRequest())
        loss, bits_per_byte = (entries[-1][f"validation/{name}/{value}"] for value in ("loss", "bits_per_byte"))
        assert loss == pytest.approx(expected.loss, rel=1e-6), "float32 sums in another order"
        assert bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
        before, after = (summary["validation"][name][moment]["loss"] for moment in ("before", "after"))
        assert after == loss < before


def test_prompts_and_sets_survive_the_written_configuration(runs: tuple[Path, Path]) -> None:
    settings = load_config(["--config", str(runs[0] / "config.yaml")]).evaluation
    assert settings.prompts == (*PROMPTS, TOO_LONG)
    assert settings.sets == {"short": f"{runs[0].parent}/short.txt", "rows": f"{runs[0].parent}/rows.jsonl"}


def test_a_mean_by_weight_is_the_loss_on_text_that_is_mixed_by_tokens() -> None:
    """Three tokens of the first for one of the second, which has fewer bytes in each."""

    def evaluation(nats: float, tokens: int, text_bytes: int) -> Evaluation:
        return Evaluation(nats / tokens, nats / math.log(2) / text_bytes, tokens, text_bytes)

    first, second = evaluation(900.0, 300, 1350), evaluation(500.0, 100, 200)
    mixed, mean = evaluation(1400.0, 400, 1550), mean_by_weight([(first, 0.6), (second, 0.2)])
    assert (mean.loss, mean.bits_per_byte) == (pytest.approx(mixed.loss), pytest.approx(mixed.bits_per_byte))
    assert (mean.tokens, mean.text_bytes) == (400, 1550)
    larger = evaluation(9000.0, 3000, 13_500)
    assert mean_by_weight([(larger, 3), (second, 1)]).loss == pytest.approx(mixed.loss), (
        "sizes of the sets do not count"
    )
    assert mean_by_weight([(first, 3), (replace(second, bits_per_byte=None), 1)]).bits_per_byte is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluation.sets.wiki", "/nowhere/*.txt"], r"evaluation\.sets\.wiki: no file matches"),
        (["--evaluation.sets", '{"a b": "README.md"}'], r"'a b' cannot be the name of a set"),
        (["--evaluation.sets.wiki", "README.md"], "has no known format"),
    ],
)
def test_a_wrong_validation_set_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_config(arguments)


def test_text_that_the_tokenizer_does_not_keep_has_no_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer that knows half of the text, in a run and in the command."""
    texts = write_texts(tmp_path / "texts", count=60)
    make_tokenizer("wordlevel", texts[::4]).save_pretrained(tmp_path / "tokenizer")
    where = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt"]
    done = train(*TINY, *where, "--data.tokenizer", str(tmp_path / "tokenizer"), "--data.validation_one_in", "10",
                 "--run.max_updates", "1", "--model.vocab_size", "1024")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"no bits per byte of validation: [\d.]+ % of the tokens are unknown", done.stdout)) == 1
    last = read_ledger(tmp_path / "run")[-1]
    assert last["validation/held_out/loss"] > 0
    assert last["validation/held_out/bits_per_byte"] is None
    after = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["validation"]["held_out"]["after"]
    assert (after["loss"], after["bits_per_byte"]) == (last["validation/held_out/loss"], None)
    output = ["--output", str(tmp_path / "output.json")]
    arguments = [str(tmp_path / "run/final"), "--data.text_files", f"{tmp_path}/texts/*.txt", *output]
    monkeypatch.setattr("sys.argv", ["recipe", *arguments])
    evaluate_command.main()
    assert re.search(r"bits per byte  none: [\d.]+ % of the tokens are unknown", capsys.readouterr().out)
    assert json.loads((tmp_path / "output.json").read_text(encoding="utf-8"))["text"]["bits_per_byte"] is None
