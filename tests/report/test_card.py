"""The model card: its numbers are the ledger's, its metadata is the Hub's, its snippet and its command do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from recipe.config.command_line import load_config
from recipe.report.card import card_files, model_card
from recipe.report.record import read_record
from recipe.report.reproduce import reproducing_command
from tests.helpers import TINY, read_ledger, read_ledger_lines, run, train, write_texts

UPDATES = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, finished run with a parity and held-out text, its card written by the command."""
    root = tmp_path_factory.mktemp("card")
    write_texts(root / "texts", count=60)
    done = train(
        *[*TINY, "--run.directory", str(root / "tiny"), "--data.text_files", f"{root}/texts/*.txt"],
        *["--data.validation_one_in", "10", "--evaluation.prompts", 'print("é|😀")', "--run.parity_check", "true"],
        *["--schedule.total_tokens", str(UPDATES * 1536), "--evaluation.sets.mine", f"{root}/texts/00*.txt"],
    )
    assert done.returncode == 0, done.stderr
    written = run([sys.executable, "-m", "recipe", "card", str(root / "tiny")])
    assert written.returncode == 0, written.stderr
    assert written.stdout.strip() == str(root / "tiny/final/README.md")
    return root / "tiny"


def edited(directory: Path, to: Path, lines: list[dict[str, Any]]) -> Path:
    """A copy of the run with another ledger."""
    shutil.copytree(directory, to)
    (to / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return to


class CardChecker(BaseHTTPRequestHandler):
    """The Hub's answer to POST /api/validate-yaml, for what its documentation of the metadata requires."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = self.problem(body) if self.path == "/api/validate-yaml" else f"no {self.path} here"
        self.send_response(400 if problem else 200)
        self.end_headers()
        self.wfile.write(problem.encode() or b'{"errors": [], "warnings": []}')

    @staticmethod
    def problem(body: dict[str, str]) -> str:
        if body["repoType"] != "model" or not body["content"].startswith("---\n"):
            return "no model card"
        metadata = yaml.safe_load(body["content"].split("---\n")[1])
        for entry in metadata.get("model-index", []):
            if not entry.get("name") or not entry.get("results"):
                return '"model-index[0].name" and "results" are required'
            for result in entry["results"]:
                known = result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")
                if not known or not all(m.get("type") and "value" in m for m in result["metrics"]):
                    return '"model-index[0].results[0]" lacks a required value'
        return ""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on this machine that checks cards."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), CardChecker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_card_is_valid_for_the_hub_and_its_metadata_comes_back(directory: Path) -> None:
    card = ModelCard.load(directory / "final/README.md")
    card.validate()
    assert card.data.to_dict() == model_card(directory, directory / "final").data.to_dict()
    last = read_ledger(directory)[-1]
    values = {
        result.metric_type: result.metric_value for result in card.data.eval_results if result.dataset_type != "mine"
    }
    mine = {
        result.metric_type: result.metric_value for result in card.data.eval_results if result.dataset_type == "mine"
    }
    assert mine["bits_per_byte"] == pytest.approx(last["validation"]["mine"]["bits_per_byte"], abs=1e-6)
    assert values["loss"] == pytest.approx(last["validation_loss"], abs=1e-6)
    assert values["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-6)
    assert values["perplexity"] == pytest.approx(2.718281828 ** last["validation_loss"], rel=1e-6)
    assert (card.data.model_name, card.data.library_name, card.data.pipeline_tag) == (
        "tiny",
        "transformers",
        "text-generation",
    )
    assert card.data.datasets is None, "local files are no dataset of the Hub"
    card.data.eval_results[0].task_type = ""
    with pytest.raises(ValueError, match="lacks a required value"):
        card.validate()


def test_card_shows_the_numbers_of_the_run(directory: Path) -> None:
    text = (directory / "final/README.md").read_text(encoding="utf-8")
    ledger, summary = read_ledger(directory), json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["validation_before"], summary["validation_after"]
    for words in (
        "12,288 of 12,288 tokens",
        "Each update is 1,536 tokens: 24 blocks of 64, from 8 lanes",
        "| 1 to 8 | 1 | 4 | 6 | 1,536 / (4 x 64 x 1 rank) = 6 |",
        f"| held out | before training | {before['loss']:.4f} |",
        f"| held out | after 8 updates | {ledger[-1]['validation_loss']:.4f} |",
        f"| mine | before training | {summary['validation_sets']['mine']['before']['loss']:.4f} |",
        f"| mine | after 8 updates | {ledger[-1]['validation']['mine']['loss']:.4f} |",
        f"Held out are {after['tokens']:,} tokens, {after['text_bytes']:,} bytes",
        f"| {summary['parity_check']['differences'][0][0]} | {summary['parity_check']['differences'][0][1]:.1e} |",
        "local files: \\*.txt",
        "one document in 10, by hash of its text",
        f"torch {huggingface_hub.utils.get_torch_version()}",
        f"{12288 / summary['parameters']:.2g} tokens per parameter, far fewer than the 20",
        "not trained to follow instructions",
    ):
        assert words in text, words
    assert "GPU-hours |" not in text, "it ran on a CPU"
    image = (directory / "final/curves.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert "](curves.png)" in text


def test_snippet_of_the_card_runs(directory: Path, tmp_path: Path) -> None:
    """In a directory of its own, in a Python that never imports this repository."""
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (directory / "final/README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    done = run([sys.executable, "-c", snippet], cwd=tmp_path, PYTHONPATH="", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('print("é|😀")')
    assert 'name = "me/tiny-gpt2"' in str(model_card(directory, "me/tiny-gpt2"))


def test_command_of_the_card_gives_the_same_configuration(directory: Path) -> None:
    text = (directory / "final/README.md").read_text(encoding="utf-8")
    config = read_record(directory).config
    command = reproducing_command(config)
    assert f"```bash\n{command}\n```" in text
    assert command.startswith("./run.sh configs/quickstart.yaml ")
    shell = run(["bash", "-c", command.replace("./run.sh", r"printf '%s\0'", 1)])  # as bash reads the page
    preset, *flags = shell.stdout.removesuffix("\0").split("\0")
    assert "--run.directory" not in flags
    again = load_config(["--config", preset, *flags, "--run.directory", config.run.directory])
    assert again == config
    large = load_config(["--config", "configs/gpt2-1.3b.yaml"])
    assert reproducing_command(large) == "./run.sh configs/gpt2-1.3b.yaml"
    sets = replace(large, evaluation=replace(large.evaluation, sets={"it": "it's.jsonl"}))
    *_, value = shlex.split(reproducing_command(sets))
    assert json.loads(value) == {"it": "it's.jsonl"}


def test_a_wrong_number_in_the_ledger_shows(directory: Path, tmp_path: Path) -> None:
    lines = read_ledger_lines(directory)
    lines[-1] |= {"validation_loss": 9.8765, "tokens": 999_999, "micro_batch_size": 77}
    text = str(model_card(edited(directory, tmp_path / "run", lines)))
    for words in (
        "value: 9.8765",
        "| held out | after 8 updates | 9.8765 |",
        "999,999 of 12,288 tokens",
        "| 8 to 8 | 1 | 77 |",
    ):
        assert words in text, words


def test_card_of_an_unfinished_run_says_so_and_invents_nothing(directory: Path, tmp_path: Path) -> None:
    """As it is pushed on the way: no summary, no model in final/, and a ledger that says nothing of the machine."""
    lines = [line for line in read_ledger_lines(directory) if line["update"] <= 5 and "event" not in line]
    unfinished = edited(directory, tmp_path / "run", lines)
    shutil.rmtree(unfinished / "final")
    (unfinished / "summary.json").unlink()
    text = str(model_card(unfinished, "me/tiny"))
    assert "**The run is not finished**: this is the model after 5 of 8 updates." in text
    assert "7,680 of 12,288 tokens" in text
    for unknown in ("Hardware", "Parity", "model-index", "GPU-hours |", "None", "nan", "finished |"):
        assert unknown not in text, unknown
    assert "was not evaluated" in text
    of_checkpoint = str(model_card(directory, "me/tiny", update=3))
    assert "after 3 of 8 updates" in of_checkpoint, "a checkpoint's card is of the checkpoint, not of the ledger's end"
    assert "4,608 of 12,288 tokens" in of_checkpoint
    refused = run([sys.executable, "-m", "recipe", "card", str(unfinished)])
    assert refused.returncode == 2
    assert "is not finished" in refused.stderr
    written = run([sys.executable, "-m", "recipe", "card", str(unfinished), "--output", str(tmp_path / "card")])
    assert written.returncode == 0, written.stderr
    assert {path.name for path in (tmp_path / "card").iterdir()} == {"README.md", "curves.png"}


def test_every_part_of_a_run_is_in_the_card(directory: Path, tmp_path: Path) -> None:
    """Ledger lines as two GPUs, then three, would have written them, on a Hub dataset."""
    lines = read_ledger_lines(directory)
    start = next(line for line in lines if line.get("event") == "start")
    h100 = {**start, "device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
    entries = [line | {"mfu": 0.412, "update_seconds": 450.0} for line in lines if "event" not in line]
    first = [line | {"world_size": 2} for line in entries[:4]]
    second = [line | {"world_size": 3, "micro_batch_size": 3, "gradient_accumulation_steps": 3} for line in entries[4:]]
    resume = {"event": "resume", "update": 4, "checkpoint": "/home/me/run/step-000004"}
    resume["changes"] = {"batch.micro_batch_size": [4, 3], "schedule.total_tokens": [9_216, 12_288]}
    ledger = [h100 | {"world_size": 2}, *first, h100 | {"world_size": 3, "update": 4}, resume, *second]
    ledger.append({"event": "sample", "update": 8, "prompt": "", "text": "a ``` fence | <b>"})
    run_directory = edited(directory, tmp_path / "run", ledger)
    config = (run_directory / "config.yaml").read_text(encoding="utf-8")
    config = re.sub(r"text_files:\n(  - .*\n)+", "text_files: []\n", config)
    config = config.replace("dataset: python-standard-library", "dataset: HuggingFaceFW/fineweb-edu")
    config = config.replace("revision: null", "revision: 87f0914").replace("init_from: null", "init_from: me/first")
    (run_directory / "config.yaml").write_text(config, encoding="utf-8")
    card = model_card(run_directory)
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "me/first"
    assert metadata["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert metadata["model-index"][0]["results"][0]["dataset"]["revision"] == "87f0914"
    for words in (
        "2 x NVIDIA H100 80GB HBM3",
        "3 x NVIDIA H100 80GB HBM3",
        "| GPU-hours | 2.5 |",  # 450 s x (4 x 2 + 4 x 3) ranks
        "| MFU | 41.2\N{NO-BREAK SPACE}% |",
        "| 1 to 4 | 2 | 4 | 6 |",
        "| 5 to 8 | 3 | 3 | 3 |",
        "checkpoint step-000004; changes batch.micro_batch_size 4 → 3",
        "| revision | 87f0914 |",
        "trained from the weights of me/first on",
        "What me/first had been trained on before",
        "schedule.total_tokens changed on the way",
        "````text\na ``` fence | <b>\n````",
    ):
        assert words in str(card), words


def test_card_without_the_drawing_library_has_no_image(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(card_files(directory)) == {"README.md", "curves.png"}
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # what an import finds where it is not installed
    files = card_files(directory)
    assert set(files) == {"README.md"}
    assert b"curves.png" not in files["README.md"]
