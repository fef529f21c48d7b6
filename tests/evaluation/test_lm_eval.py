"""Tasks of lm-eval through the command: its scores on local files are those of the definition, one by one."""

from __future__ import annotations

import glob
import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import pytest
import torch

from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.evaluation.lm_eval import evaluate_tasks, find_tasks
from recipe.model.export import export_model, load_pretrained
from tests.helpers import run

ITEMS = 100
INSTALL = "pip install --editable '.[evaluation]'"

# Plain sentences of Python's reference manual.
SENTENCES = [
    sentence
    for sentence in re.split(r"(?<=\.) (?=[A-Z])", re.sub(r"\s+", " ", " ".join(topics.values())))
    if re.fullmatch(r"[A-Z][A-Za-z ,']{30,120}\.", sentence)
]


class Item(NamedTuple):
    """A line of a file, and what the model has to be asked: which of `choices` comes after `context`."""

    row: dict[str, Any]
    context: str
    choices: list[str]
    answer: int = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    """(directory, a model with weights so large that its choices differ, a tokenizer of few merges)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(SENTENCES, 512)
    torch.manual_seed(0)
    shape = {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 512}
    end = tokenizer.eos_token_id
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, bos_token_id=end, eos_token_id=end))
    export_model(gpt2, tokenizer, directory / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    yield directory / "model", *load_pretrained(str(directory / "model"))
    torch.set_num_threads(threads)


def hellaswag(draw: random.Random) -> Iterator[Item]:
    for number in range(ITEMS):
        first, second, *others = draw.sample(SENTENCES, 5)
        start, end = second.split()[:2], second.split()[2:]
        endings = [" ".join(words) for words in (end, *(other.split()[2:] for other in others))]
        label = draw.randrange(len(endings))
        endings[0], endings[label] = endings[label], endings[0]
        if number == 2:
            first = " ".join(SENTENCES[:8])  # longer than the positions
        row = {"activity_label": "Reading", "ctx_a": first, "ctx_b": " ".join(start).lower(), "ctx": "not read"}
        row |= {"endings": endings, "label": str(label) if number == 3 else label, "split": "val"}
        context = f"Reading: {first} {' '.join(start).capitalize()}"
        if number == 1:  # what WikiHow left in the published files
            row["ctx_b"] += " [title] and [step]  "
            context += ". and "
        yield Item(row, context, endings, label)


def lambada(draw: random.Random, gpt2: Any, tokenizer: Any) -> Iterator[Item]:
    """Passages that end in a word of their own, and ten that end in the one that this model says."""
    for number in range(ITEMS - 10):
        text = " ".join(draw.sample(SENTENCES, 1 + number % 4)).rstrip(".")
        context, word = text.rsplit(" ", 1)
        yield Item({"text": text}, context, [word])
    hits = 0
    while hits < 10:
        context = draw.choice(SENTENCES)
        likeliest = tokenizer.decode(gpt2(**tokenizer(context, return_tensors="pt")).logits[0, -1].argmax())
        if likeliest[0] == " " and likeliest[1:].isalpha():
            yield Item({"text": context + likeliest}, context, [likeliest[1:]])
            hits += 1


def blimp(draw: random.Random) -> Iterator[Item]:
    for good in draw.sample(SENTENCES, ITEMS):
        words = good.split()
        words[draw.randrange(len(words))] = draw.choice(draw.choice(SENTENCES).split())
        bad = " ".join(words)
        yield Item(
            {"sentence_good": good, "sentence_bad": bad, "UID": "wrong_word", "field": "syntax"}, "", [good, bad]
        )


@pytest.fixture(scope="module")
def files(model: tuple[Path, Any, Any]) -> dict[Path, list[Item]]:
    """file -> its items, for HellaSwag, LAMBADA and BLiMP."""
    draw, root = random.Random(4), model[0].parent / "no pattern [1]"
    root.mkdir()
    items = {"hellaswag": [*hellaswag(draw)], "lambada": [*lambada(draw, *model[1:])], "blimp": [*blimp(draw)]}
    for name, of_file in items.items():
        lines = [json.dumps(item.row) + "\n" for item in of_file]
        (root / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {root / f"{name}.jsonl": of_file for name, of_file in items.items()}


def score(gpt2: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """(summed log-probability in nats, is each token the most likely one): no batch, no padding, no mask.

    Spaces at the end of the context belong to the continuation; an empty context is the end-of-text token.
    """
    context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
    before = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
    ids = [*before, *tokenizer(context + continuation)["input_ids"][len(before) if context else 0 :]]
    count = len(ids) - len(before)
    ids = ids[-gpt2.config.n_positions - 1 :]
    with torch.no_grad():
        logs = torch.log_softmax(gpt2(torch.tensor([ids[:-1]])).logits[0].double(), dim=-1)
    positions = range(len(ids) - 1 - count, len(ids) - 1)
    log_probability = sum(logs[at, ids[at + 1]].item() for at in positions)
    return log_probability, all(logs[at].argmax() == ids[at + 1] for at in positions)


def expected_metrics(gpt2: Any, tokenizer: Any, items: list[Item]) -> dict[str, float]:
    """`acc`: the right choice has the highest log-probability; `acc_norm`: the highest per character of the choice. With one
    choice, LAMBADA's, `acc`: greedy decoding gives it; `perplexity`: of it."""
    scores = [[score(gpt2, tokenizer, item.context, f" {choice}") for choice in item.choices] for item in items]
    if all(len(item.choices) == 1 for item in items):
        mean = sum(log_probability for ((log_probability, _),) in scores) / len(items)
        return {"acc": sum(is_greedy for ((_, is_greedy),) in scores) / len(items), "perplexity": math.exp(-mean)}
    right = normalised = 0
    for item, of_item in zip(items, scores, strict=True):
        values = [log_probability for log_probability, _ in of_item]
        per_character = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        right += values.index(max(values)) == item.answer
        normalised += per_character.index(max(per_character)) == item.answer
    return {"acc": right / len(items), "acc_norm": normalised / len(items)}


OWN_TASK = """
task: own_blimp
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_scores_of_local_files_are_those_one_by_one(
    model: tuple[Path, Any, Any], files: dict[Path, list[Item]], tmp_path: Path
) -> None:
    """The command, once, in batches of 7, on a file of each format and on a task of one's own, without a network."""
    pytest.importorskip("lm_eval", reason=INSTALL)
    blimp_file = str(next(path for path in files if path.stem == "blimp"))
    (tmp_path / "own.yaml").write_text(OWN_TASK.replace("FILE", json.dumps(glob.escape(blimp_file))), encoding="utf-8")
    done = run(
        [
            *[sys.executable, "-m", "recipe", "evaluate", str(model[0]), "--micro_batch_size", "7"],
            *["--tasks", *map(str, files), "own_blimp", "--task_directory", str(tmp_path)],
            *["--output", str(tmp_path / "results.json")],
        ],
        HF_HOME=str(tmp_path / "huggingface"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"model", "tasks"}, "no text was asked for"
    for path, items in files.items():
        metrics, expected = results["tasks"][str(path)], expected_metrics(*model[1:], items)
        assert 0 < expected["acc"] < 1, "neither is without information"
        if path.stem == "blimp":  # lm-eval's own tasks leave it out
            assert results["tasks"]["own_blimp"]["acc_norm,none"] == pytest.approx(expected.pop("acc_norm"))
            assert results["tasks"]["own_blimp"]["acc,none"] == metrics["acc,none"]
        for name, value in expected.items():
            assert metrics[f"{name},none"] == pytest.approx(value, rel=1e-5), (path.stem, name)
        assert metrics["sample_len"] == ITEMS
        assert re.search(rf"^{re.escape(str(path))}  .*\bacc,none {expected['acc']:.4g}", done.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("no_such_task", "", "no_such_task"),
        ("long.jsonl", json.dumps({"text": "a " + "b" * 200}), "self.max_length"),
    ],
)
def test_what_lm_eval_cannot_score_is_one_line(
    model: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str, message: str
) -> None:
    pytest.importorskip("lm_eval", reason=INSTALL)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text(line, encoding="utf-8")
        name = str(tmp_path / name)
    with pytest.raises(RecipeError, match=message):
        evaluate_tasks(*model[1:], find_tasks([name]), None, 4)


def test_a_file_is_told_by_its_fields(files: dict[Path, list[Item]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "installed")
    tasks = find_tasks([*map(str, files), "arc_easy"])
    assert list(tasks.values()) == ["hellaswag", "lambada_openai", "blimp_adjunct_island", "arc_easy"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"question": "?"}', "line 1 of .* does not fit"),
        (b'{"text": "a b"}\n\n{"sentence_good": "a", "sentence_bad": "b"}', "line 3 of .* does not fit"),
        (b'{"sentence_good": "a", "sentence_bad": null}', "line 1 of .* does not fit"),
        (b'{"ctx": "a", "endings": ["b", "c"], "label": 1}', "line 1 of .* does not fit"),
        (b"\n", "line 1 of .* does not fit"),
        (b'{"sentence_good": "a"', "line 1 of .* does not fit"),
        (b"[1]", "line 1 of .* does not fit"),
        (b"\xff", "cannot read .*: 'utf-8'"),
        (None, "cannot read .*: No such file"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, lines: bytes | None, message: str) -> None:
    if lines is not None:
        (tmp_path / "x.jsonl").write_bytes(lines)
    with pytest.raises(RecipeError, match=message):
        find_tasks([str(tmp_path / "x.jsonl")])


def test_lm_eval_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match="pip install"):
        find_tasks(["arc_easy"])
