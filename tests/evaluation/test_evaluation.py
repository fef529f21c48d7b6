"""Evaluation in a run and after it: named validation sets, samples, cloze accuracy, tasks of lm-eval."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recipe.config.command_line import load_config
from recipe.data.blocks import pack_validation
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.evaluation import cloze
from recipe.evaluation.evaluate import evaluate
from recipe.evaluation.lm_eval import require_lm_eval
from recipe.model.export import export_model, load_pretrained
from recipe.model.gpt2 import CausalLanguageModel
from tests.helpers import TINY, read_ledger, read_ledger_lines, run, run_ranks, write_texts

UPDATES = 4
ITEMS = 24
PROMPTS = ["def main", 'a "quoted" \N{GRINNING FACE}\nline']
WORDS = [
    *("the", "cat", "dog", "bird", "tree", "house", "river", "stone", "café", "夜の川"),
    *("and", "small", "finds", "likes"),
]


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
    evaluated = [*common, "--run.directory", str(root / "with"), *sets, "--evaluation.prompts", *PROMPTS]
    plain = [*common, "--run.directory", str(root / "without"), "--evaluation.sample_tokens", "null"]
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(run_ranks, 2, command) for command in (evaluated, plain)]:
            done.result()
    return root / "with", root / "without"


def test_a_run_with_samples_and_sets_is_bit_identical_to_one_without(runs: tuple[Path, Path]) -> None:
    mine, other = runs
    for name in ("loss", "grad_norm", "validation_loss"):
        assert [e.get(name) for e in read_ledger(mine)] == [e.get(name) for e in read_ledger(other)], name
    weights, others = (load_file(directory / "final/model.safetensors") for directory in runs)
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_each_prompt_is_sampled_once_at_each_evaluation(runs: tuple[Path, Path]) -> None:
    samples = [line for line in read_ledger_lines(runs[0]) if line.get("event") == "sample"]
    assert [(s["update"], s["prompt"]) for s in samples] == [(u, p) for u in (2, 4) for p in PROMPTS]
    assert all(s["text"].startswith(s["prompt"]) and len(s["text"]) > len(s["prompt"]) for s in samples)
    assert samples[0]["text"] != samples[2]["text"], "the model has learnt something"
    assert not [line for line in read_ledger_lines(runs[1]) if line.get("event") == "sample"]


def test_the_ledger_holds_the_loss_of_each_named_set(runs: tuple[Path, Path]) -> None:
    """Two ranks with unequal shares of the blocks, against the finished model and the set's text in this process."""
    from accelerate import Accelerator

    entries = read_ledger(runs[0])
    assert [set(entry.get("validation", {})) for entry in entries] == [set(), {"short", "rows"}] * 2
    assert "validation" not in read_ledger(runs[1])[-1]
    gpt2, tokenizer = load_pretrained(str(runs[0] / "final"))
    texts = {"short": [(runs[0].parent / "short.txt").read_text(encoding="utf-8")]}
    texts["rows"] = [json.loads(line)["text"] for line in (runs[0].parent / "rows.jsonl").open(encoding="utf-8")]
    summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
    for name, documents in texts.items():
        blocks = pack_validation(iter(documents), tokenizer, 64, float("inf"))
        assert blocks is not None
        model = CausalLanguageModel(gpt2, len(tokenizer))
        expected = evaluate(model, blocks, accelerator=Accelerator(cpu=True), rows=1)
        assert expected is not None
        recorded = entries[-1]["validation"][name]
        assert recorded["loss"] == pytest.approx(expected.loss, rel=1e-6), "float32 sums in another order"
        assert recorded["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        before, after = (summary["validation_sets"][name][moment]["loss"] for moment in ("before", "after"))
        assert after == recorded["loss"] < before


def test_prompts_and_sets_survive_the_written_configuration(runs: tuple[Path, Path]) -> None:
    settings = load_config(["--config", str(runs[0] / "config.yaml")]).evaluation
    assert settings.prompts == tuple(PROMPTS)
    assert settings.sets == {"short": f"{runs[0].parent}/short.txt", "rows": f"{runs[0].parent}/rows.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluation.sets.wiki", "/nowhere/*.txt"], r"evaluation\.text_files\.wiki: no file matches"),
        (["--evaluation.sets", '{"a b": "README.md"}'], r"'a b' is no name"),
        (["--evaluation.sets.wiki", "README.md"], "has no known format"),
    ],
)
def test_a_wrong_validation_set_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_config(arguments)


# Afterwards: cloze scores, on sentences of our own in each format.


@pytest.fixture(scope="module")
def model(root: Path) -> Iterator[tuple[Any, Any]]:
    """A model with weights so large that its choices differ, and a tokenizer of few merges."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 320)
    torch.manual_seed(0)
    shape = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 320}
    end = tokenizer.eos_token_id
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, bos_token_id=end, eos_token_id=end))
    export_model(gpt2, tokenizer, root / "model")
    loaded, its_tokenizer = load_pretrained(str(root / "model"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    yield loaded.eval(), its_tokenizer
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(root: Path, model: tuple[Any, Any]) -> dict[str, Path]:
    """format -> file of ITEMS items; in LAMBADA's, this model would say the last word of the last ten."""
    draw = random.Random(0)

    def words(smallest: int, largest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(smallest, largest)))

    hellaswag: list[dict[str, Any]] = [
        {"activity_label": "Pets", "ctx_a": words(3, 15) + ".", "ctx_b": words(1, 3)}
        | {"ctx": "unused", "endings": [words(1, 8) + "." for _ in range(4)], "label": draw.choice(["0", 1, 2, 3])}
        for _ in range(ITEMS)
    ]
    hellaswag[1]["ctx_b"] += " [title] and [step]  "
    hellaswag[2]["ctx_a"] = words(80, 80)  # longer than the positions
    lambada: list[dict[str, Any]] = [{"text": words(2, 12)} for _ in range(ITEMS - 10)]
    gpt2, tokenizer = model
    while len(lambada) < ITEMS:
        context = words(1, 10)
        likeliest = tokenizer.decode(gpt2(**tokenizer(context, return_tensors="pt")).logits[0, -1].argmax())
        if likeliest[0] == " " and likeliest[1:].isalpha():
            lambada.append({"text": context + likeliest})
    blimp = [{"sentence_good": words(2, 9) + ".", "sentence_bad": words(2, 9) + "."} for _ in range(ITEMS)]
    paths = {}
    for name, rows in (("HellaSwag", hellaswag), ("LAMBADA", lambada), ("BLiMP", blimp)):
        paths[name] = root / f"{name.lower()}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def one_by_one(gpt2: Any, tokenizer: Any, context: str, continuation: str) -> cloze.Score:
    """No batch, no padding, no mask: the definition."""
    context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
    before = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
    ids = [*before, *tokenizer(context + continuation)["input_ids"][len(before) if context else 0 :]]
    count = len(ids) - len(before)
    ids = ids[-gpt2.config.n_positions - 1 :]
    with torch.no_grad():
        logs = torch.log_softmax(gpt2(torch.tensor([ids[:-1]])).logits[0].double(), dim=-1)
    positions = range(len(ids) - 1 - count, len(ids) - 1)
    return cloze.Score(
        sum(logs[at, ids[at + 1]].item() for at in positions), all(logs[at].argmax() == ids[at + 1] for at in positions)
    )


@pytest.fixture(scope="module")
def expected(model: tuple[Any, Any], files: dict[str, Path]) -> dict[tuple[str, str], cloze.Score]:
    """The score of every (context, continuation) of the files, one by one."""
    items = [item for path in files.values() for item in cloze.read_items(str(path))[1]]
    pairs = [(item.context, f" {choice}") for item in items for choice in item.choices]
    return {pair: one_by_one(*model, *pair) for pair in pairs}


def assert_scores(model: tuple[Any, Any], expected: dict[tuple[str, str], cloze.Score], rows: int) -> None:
    scores = cloze.score(*model, list(expected), rows)
    for pair, score in zip(expected, scores, strict=True):
        assert score.log_probability == pytest.approx(expected[pair].log_probability, rel=1e-5), pair
        assert score.is_greedy == expected[pair].is_greedy, pair


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_batched_scores_are_those_one_by_one(
    model: tuple[Any, Any], expected: dict[tuple[str, str], cloze.Score], rows: int
) -> None:
    assert_scores(model, expected, rows)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_is_off_by_one_is_noticed(
    model: tuple[Any, Any],
    expected: dict[tuple[str, str], cloze.Score],
    monkeypatch: pytest.MonkeyPatch,
    shift: int,
) -> None:
    pad_right: Callable[..., tuple[Tensor, Tensor]] = cloze._pad_right

    def shifted(*arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, is_scored = pad_right(*arguments)
        return tokens, is_scored.roll(shift, dims=1)

    monkeypatch.setattr(cloze, "_pad_right", shifted)
    with pytest.raises(AssertionError, match="comparison failed"):
        assert_scores(model, expected, 7)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model: tuple[Any, Any]) -> None:
    first, second = (cloze.score(*model, [pair], 1) for pair in (("the cat ", "sees"), ("the cat", " sees")))
    assert first == second


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "?"}', "line 1 of .* is not in a known format"),
        ('{"text": "a b"}\n{"sentence_good": "a", "sentence_bad": "b"}', "line 2 of .* is not LAMBADA"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 1 of .* is not HellaSwag"),
        ('{"sentence_good": "a"', "line 1 of"),
        ("\n", "is empty"),
    ],
)
def test_a_wrong_cloze_file_is_one_line(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        cloze.read_items(str(tmp_path / "x.jsonl"))


# The command, and lm-eval on the same files.


def test_lm_eval_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match="pip install"):
        require_lm_eval()


TASKS = {
    "HellaSwag": """
output_type: multiple_choice
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "LAMBADA": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: acc}]
""",
    "BLiMP": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
}


@pytest.mark.slow
def test_cloze_accuracy_is_that_of_lm_eval(root: Path, model: tuple[Any, Any], files: dict[str, Path]) -> None:
    """The command, once, with lm-eval's own prompts of the three tasks on the same local files, and no network."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install --editable '.[evaluation]'")
    own = root / "tasks"
    own.mkdir()
    (own / "utils.py").write_bytes((Path(lm_eval.__file__).parent / "tasks/hellaswag/utils.py").read_bytes())
    for name, task in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {files[name]}}}}}\ntest_split: test\n"
        (own / f"{name}.yaml").write_text(f"task: own_{name.lower()}\n{data}{task}", encoding="utf-8")
    done = run(
        [
            *[sys.executable, "-m", "recipe", "evaluate", str(root / "model"), "--cloze", *map(str, files.values())],
            *["--tasks", "own_hellaswag", "own_lambada", "own_blimp", "--task_directory", str(own)],
            *["--output", str(root / "results.json")],
        ],
        HF_HOME=str(root / "huggingface"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"model", "cloze", "tasks"}, "no text was asked for"
    for name, path in files.items():
        ours, theirs = results["cloze"][str(path)], results["tasks"][f"own_{name.lower()}"]
        assert (ours["format"], ours["items"]) == (name, ITEMS)
        assert 0 < ours["accuracy"] < 1, "neither is without information"
        assert ours["accuracy"] == pytest.approx(theirs["acc,none"]), name
        if name == "LAMBADA":
            assert ours["accuracy"] >= 10 / ITEMS
        else:
            assert ours["normalised_accuracy"] == pytest.approx(theirs["acc_norm,none"]), name
            assert ours["normalised_accuracy"] != ours["accuracy"], name
        assert f"{name}, {ITEMS} items: accuracy {ours['accuracy']:.4f}" in done.stdout
    assert re.search(r"^own_blimp  .*acc,none 0\.", done.stdout, re.MULTILINE)
