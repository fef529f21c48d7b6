"""What a model's directory may decide: its function and its vocabulary. Not how it generates, not code that runs here."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.commands import evaluate as evaluate_command
from recipe.commands import generate as generate_command
from recipe.config.settings import Config, DataConfig, ModelConfig
from recipe.data.tokenizer import load_tokenizer, train_tokenizer
from recipe.errors import RecipeError, run_command
from recipe.model.export import export_model, load_pretrained
from recipe.model.gpt2 import build_gpt2
from tests.helpers import ROOT

PROMPT, TOKENS = "import os", 12
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Whatever transformers takes from generation_config.json that changes what is generated, set to do so.
NASTY: dict[str, Any] = {
    **{"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.2, "min_p": 0.3, "typical_p": 0.2, "top_h": 0.2},
    **{"num_beams": 3, "num_return_sequences": 2, "length_penalty": 5.0, "early_stopping": True},
    **{
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "sequence_bias": [[[260], 50.0]],
        "bad_words_ids": [[261]],
    },
    **{"min_new_tokens": TOKENS, "max_length": 4, "max_time": 1e-9, "exponential_decay_length_penalty": [1, 9.0]},
    **{"eos_token_id": list(range(100, 200)), "forced_bos_token_id": 262, "forced_eos_token_id": 263},
    **{"suppress_tokens": list(range(200)), "begin_suppress_tokens": list(range(200, 400)), "guidance_scale": 3.0},
    **{"epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "prompt_lookup_num_tokens": 3, "cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model, whose weights are so large that its choices differ."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("load") / "model"
    tokenizer = train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")], 400)
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    end = tokenizer.eos_token_id
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5, bos_token_id=end, eos_token_id=end))
    export_model(gpt2, tokenizer, directory)
    return directory


@pytest.fixture
def changed(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model with other files: text, JSON values, or None for one that is not there."""

    def copy(files: dict[str, Any]) -> Path:
        directory = shutil.copytree(model, tmp_path / "changed")
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).unlink() if content is None else (directory / name).write_text(text, encoding="utf-8")
        return directory

    return copy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command here, with "y" on its stdin; (exit code, stdout, stderr)."""

    def run(module: Any, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["recipe", *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        capsys.readouterr()
        code = 0
        try:
            run_command(module.main)
        except SystemExit as request:
            code = int(request.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, list[str]]]:
    """Each command that reads a model, with what stands behind the model's name."""
    directory = tmp_path_factory.mktemp("text")
    (directory / "some.txt").write_text("import this\n" * 20, encoding="utf-8")
    (directory / "lambada.jsonl").write_text(json.dumps({"text": "import this"}) + "\n", encoding="utf-8")
    with_text = [
        (generate_command, ["--prompt", PROMPT]),
        (evaluate_command, ["--data.text_files", f"{directory}/some.txt"]),
    ]
    with_tasks = [(evaluate_command, ["--tasks", f"{directory}/lambada.jsonl"])]
    return with_text + with_tasks if importlib.util.find_spec("lm_eval") else with_text


def greedy(directory: Path) -> str:
    """By the definition: the most likely token, one after the other."""
    gpt2, tokenizer = load_pretrained(str(directory))
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in range(TOKENS):
        ids.append(int(gpt2.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_is_generated_depends_on_our_settings_alone(
    file: str, model: Path, changed: Callable[..., Path], command: Callable[..., tuple[int, str, str]]
) -> None:
    """The most likely tokens, or those that a seed draws; also in lm-eval, which generates with the model itself."""
    nasty = changed({file: json.loads((model / file).read_text(encoding="utf-8")) | NASTY})
    options = ["--prompt", PROMPT, "--max_new_tokens", str(TOKENS)]
    assert command(generate_command, str(nasty), *options, "--temperature", "0") == (0, greedy(model) + "\n", "")
    drawn = [command(generate_command, str(of), *options, "--temperature", "2") for of in (model, nasty)]
    assert drawn[0] == drawn[1]
    assert drawn[0][1] != greedy(model) + "\n", "so it says something"
    gpt2, tokenizer = load_pretrained(str(nasty))
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = gpt2.generate(**prompt, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    assert tokenizer.decode(output[0]) == greedy(model)


def assert_refused(answer: tuple[int, str, str], words: str) -> None:
    """One line, and exit code 2."""
    code, output, errors = answer
    assert (code, output, errors.count("\n")) == (2, "", 1), answer
    assert errors.startswith("error: ")
    assert words in errors


def test_a_model_without_a_tokenizer_is_refused_in_every_command(
    changed: Callable[..., Path], command: Callable[..., tuple[int, str, str]], readers: list[tuple[Any, list[str]]]
) -> None:
    """transformers makes one of a single token, by which every text is perfect."""
    name = str(changed(dict.fromkeys(TOKENIZER_FILES)))
    for module, arguments in readers:
        assert_refused(command(module, name, *arguments), "has no tokenizer: copy tokenizer.json and")
    alone = Config(model=ModelConfig(init_from=name), data=DataConfig(tokenizer=None))
    with pytest.raises(RecipeError, match=r"init_from = .* has no tokenizer: set --data\.tokenizer to the one that"):
        load_tokenizer(alone, None, name)  # type: ignore[arg-type]  # no source: nothing is trained
    with pytest.raises(RecipeError, match=r"data\.tokenizer = .* has no vocabulary"):
        load_tokenizer(Config(data=DataConfig(tokenizer=name)), None)  # type: ignore[arg-type]


def test_a_run_from_a_model_without_a_tokenizer_takes_the_one_it_is_given(
    model: Path, changed: Callable[..., Path]
) -> None:
    name = str(changed(dict.fromkeys(TOKENIZER_FILES)))
    shape = ModelConfig(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=448, init_from=name)
    config = Config(model=shape, data=DataConfig(tokenizer=str(model), sequence_length=32))
    tokenizer = load_tokenizer(config, None, name)  # type: ignore[arg-type]  # no source: nothing is trained
    gpt2 = build_gpt2(config, len(tokenizer), tokenizer.eos_token_id, name).gpt2
    assert torch.equal(gpt2.transformer.wte.weight[:400], load_pretrained(str(model))[0].transformer.wte.weight)


def tokenizer_of(size: int) -> dict[str, Any]:
    tokenizer = train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")], size)
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return values


def with_settings(model: Path, **settings: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {"tokenizer_config.json": values | settings}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: {"tokenizer_config.json": '{"eos_tok'}, "cannot load the tokenizer of"),
        (lambda _: {"tokenizer_config.json": "null"}, "cannot load the tokenizer of"),
        (lambda model: with_settings(model, eos_token=None), "end-of-text token: None"),
        (lambda model: with_settings(model, eos_token="<other>"), "401 tokens but"),
        (lambda model: with_settings(model, eos_token=5), "cannot load the tokenizer of"),
        (lambda model: with_settings(model, model_max_length="long"), "cannot load the tokenizer of"),
        (lambda _: {"tokenizer.json": None}, "cannot load the tokenizer of"),
        (lambda _: {"tokenizer.json": ""}, "cannot load the tokenizer of"),
        (lambda _: {"tokenizer.json": {}}, "cannot load the tokenizer of"),
        (lambda _: {"tokenizer.json": tokenizer_of(500)}, "the tokenizer has 500 tokens but"),
        (lambda _: {"config.json": '{"model_type"'}, "cannot load the model"),
        (lambda _: {"config.json": {"model_type": "gpt2", "n_embd": 16, "n_head": 2}}, "cannot load the model"),
    ],
)
def test_damaged_files_are_one_line(
    damage: Callable[[Path], dict[str, Any]],
    words: str,
    model: Path,
    changed: Callable[..., Path],
    command: Callable[..., tuple[int, str, str]],
) -> None:
    assert_refused(command(generate_command, str(changed(damage(model))), "--prompt", PROMPT), words)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, model: Path) -> None:
    """Of more tokens than embeddings, and of less than half as many; a padded embedding is none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    for rows, is_fine in ((399, False), (400, True), (448, True), (800, True), (801, False)):
        directory = shutil.copytree(model, tmp_path / str(rows))
        GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(
            directory
        )
        if is_fine:
            load_pretrained(str(directory))
        else:
            with pytest.raises(RecipeError, match=rf"400 tokens but .* has embeddings of {rows}"):
                load_pretrained(str(directory))


def test_a_model_with_fewer_layers_than_its_weights_is_refused(model: Path, changed: Callable[..., Path]) -> None:
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(RecipeError, match=r"more layers in its weights than n_layer = 1"):
        load_pretrained(str(changed({"config.json": values | {"n_layer": 1}})))


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize("model_type", ["gpt2", "mine"])
def test_no_code_of_a_model_runs(
    model_type: str,
    model: Path,
    tmp_path: Path,
    changed: Callable[..., Path],
    command: Callable[..., tuple[int, str, str]],
    readers: Sequence[tuple[Any, list[str]]],
) -> None:
    """Where transformers knows no class, it asks on stdin; the answer there is yes."""
    marker = tmp_path / "ran"
    names: dict[str, Any] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "mine.Mine")
    names["AutoTokenizer"] = ["mine.Mine", "mine.Mine"]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": model_type, "auto_map": names}
    tokenizer = with_settings(model, auto_map=names, tokenizer_class="Mine")
    directory = changed({"config.json": config, "mine.py": CODE.format(marker=str(marker)), **tokenizer})
    for module, arguments in readers if model_type == "mine" else readers[:2]:  # lm-eval would take its time
        code, _, errors = answer = command(module, str(directory), *arguments)
        if model_type == "mine":
            assert_refused(answer, "custom code")
        assert "Traceback" not in errors, (code, errors)
        assert not marker.exists(), arguments
    (directory / "config.json").unlink()  # a directory with a tokenizer alone
    with pytest.raises(RecipeError, match=r"cannot load data\.tokenizer = "):
        load_tokenizer(Config(data=DataConfig(tokenizer=str(directory))), None)  # type: ignore[arg-type]
    assert not marker.exists()
