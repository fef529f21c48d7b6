"""The model card: its numbers are the ledger's, its metadata is the Hub's, and what is not known is left out."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from recipe.commands import card as command
from recipe.config.command_line import load_config, read_config
from recipe.errors import RecipeError
from recipe.report.card import card_files, model_card
from recipe.report.record import read_record
from recipe.run.ledger import EVENTS, LEDGER, read_lines
from tests.support.run_files import edit_lines, events, write_lines


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


def card_text(directory: Path, model: str | None = None, update: int | None = None) -> str:
    return card_files(directory, model, update=update)["README.md"].decode()


@pytest.mark.usefixtures("hub")
def test_card_is_valid_for_the_hub_and_its_metadata_comes_back(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_text(directory), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    assert card.data.to_dict() == model_card(read_record(directory), directory / "final").data.to_dict()
    last = read_lines(directory / LEDGER)[-1]
    for name, dataset_type in (("held_out", "local-text-files"), ("mine", "mine")):
        results = [result for result in card.data.eval_results if result.dataset_type == dataset_type]
        values = {result.metric_type: result.metric_value for result in results}
        assert values["loss"] == pytest.approx(last[f"validation/{name}/loss"], abs=1e-6)
        assert values["bits_per_byte"] == pytest.approx(last[f"validation/{name}/bits_per_byte"], abs=1e-6)
        assert values["perplexity"] == pytest.approx(2.718281828 ** last[f"validation/{name}/loss"], rel=1e-6)
    assert (card.data.model_name, card.data.library_name) == ("run", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.datasets is None, "local files are no dataset of the Hub"
    card.data.eval_results[0].task_type = ""
    with pytest.raises(ValueError, match="lacks a required value"):
        card.validate()


def test_card_shows_the_numbers_of_the_run(directory: Path) -> None:
    text = card_text(directory)
    for words in (
        "GPT-2 with 39,808 parameters (2 layers, width 32, 2 heads,\n64 positions), trained from random weights on",
        "18,432 of 18,432 tokens",
        "Each update is 1,536 tokens: 24 blocks of 64, from 8 lanes",
        "| 1 to 6 | 1 | 8 | 3 | 1,536 / (8 x 64 x 1 rank) = 3 | 1,484 tokens/s |",
        "| 7 to 12 | 2 | 5 | 3 | ceil(12 blocks of the largest share / 5) = 3 |",
        "| held out | before training | 6.1000 | 445.86 | 2.5417 |",
        "| held out | after 12 updates | 4.1000 |",
        "| mine | after 12 updates | 4.2000 |",
        "| validation set, mine | 3,120 tokens, 5,432 bytes |",
        "| accumulate | 8 | 3 | the run's own way |",
        "| manual | 8 | 3 | 3.4e-08 |",
        "local files: \\*.txt",
        "one document in 10, by hash of its text",
        "| optimizer | AdamW, betas 0.9 and 0.95, epsilon 1e-08 |",
        "| initial weights | normal, standard deviation 0.02 |",
        "python 3.11.7, torch 2.13.0 | 0123abc |",
        "checkpoint step-000006; changes batch.micro_batch_size 8 → 5",
        "0.46 tokens per parameter, far fewer than the 20",
        "not trained to follow instructions",
        "![Loss and bits per byte by tokens seen](curves.png)",
        'tokenizer("print(\\"é|😀\\")", return_tensors="pt")',
    ):
        assert words in text, words
    assert "GPU-hours |" not in text, "it ran on a CPU"
    assert "\n\n\n\n" not in text
    assert 'name = "me/tiny-gpt2"' in card_text(directory, "me/tiny-gpt2")


def test_config_beside_the_card_repeats_the_run(directory: Path, tmp_path: Path) -> None:
    """It has every setting but those that say where a run is written and who hears of it."""
    config = (directory / "config.yaml").read_text(encoding="utf-8")
    config = config.replace("repo_id: null", "repo_id: me/private").replace("resume: auto", "resume: hf://me/private@x")
    (directory / "config.yaml").write_text(config.replace("trackers: []", "trackers: [tensorboard]"), encoding="utf-8")
    (tmp_path / "config.yaml").write_bytes(card_files(directory)["config.yaml"])
    kept = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert not re.search(r"me/private|tensorboard|  directory:", kept)
    record = read_record(directory)
    again = load_config(["--config", str(tmp_path / "config.yaml")])
    for section in ("batch", "data", "model", "optimizer", "schedule", "stability", "evaluation", "performance"):
        assert getattr(again, section) == getattr(record.config, section), section
    assert (again.run.seed, again.precision) == (record.config.run.seed, record.config.precision)
    assert again.run.directory == "runs/default"


def test_a_card_names_no_directory_of_the_author(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, events and snippet; and `config.yaml`, which has to find the files again, says `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("recipe.report.card.curves_png", lambda _: b"")
    author = f"{tmp_path}/secret project"
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    config["data"] |= {"tokenizer": f"{author}/of words"}
    config["evaluation"]["sets"] = {"mine": f"{author}/mine.txt"}
    config["model"]["init_from"] = f"{author}/base"
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    places = {"data.text_files": [[f"{author}/a.txt"], [f"{author}/b.txt"]]}
    reason = f"cannot write '{author}/run/x': full; (~/y/z) of https://host/a/b and runs/x"
    write_lines(
        directory / EVENTS,
        [
            {"event": "resume", "update": 6, "checkpoint": f"{author}/step-000006", "changes": places},
            {"event": "push_failed", "update": 9, "reason": reason},
        ],
    )
    card = card_text(directory)
    assert str(tmp_path) not in card
    for words in (
        f'name = "{directory.name}/final"',
        "| tokenizer | of words |",
        "the weights of base",
        "full; (z) of https://host/a/b and runs/x",
    ):
        assert words in card, words
    kept = card_files(directory)["config.yaml"].decode()
    assert str(tmp_path) not in kept
    (tmp_path / "again.yaml").write_text(kept, encoding="utf-8")
    assert read_config(tmp_path / "again.yaml").data == read_record(directory).config.data


def test_a_wrong_number_in_the_ledger_shows(directory: Path) -> None:
    wrong = {"validation/held_out/loss": 9.8765, "tokens": 999_999, "micro_batch_size": 77}
    edit_lines(directory / LEDGER, lambda line: line | wrong if line["update"] == 12 else line)
    text = card_text(directory)
    for words in (
        "value: 9.8765",
        "| held out | after 12 updates | 9.8765 |",
        "999,999 of 18,432 tokens",
        "| 12 to 12 | 2 | 77 |",
    ):
        assert words in text, words


def test_card_of_an_unfinished_run_says_so_and_invents_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is pushed on the way: no summary, no model in final/, no validation, and nothing is known of the machine."""
    of_checkpoint = card_text(directory, "me/tiny", update=3)
    assert "after 3 of 12 updates" in of_checkpoint, "a checkpoint's card is of the checkpoint, not of the ledger's end"
    assert "4,608 of 18,432 tokens" in of_checkpoint
    assert "| held out | after 3 updates |" in of_checkpoint
    edit_lines(
        directory / LEDGER,
        lambda line: {k: None if "valid" in k else v for k, v in line.items()} if line["update"] <= 5 else None,
    )
    (directory / EVENTS).unlink()
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "final")
    text = card_text(directory, "me/tiny")
    assert "**The run is not finished**: this is the model after 5 of 12 updates." in text
    assert "7,680 of 18,432 tokens" in text
    for unknown in ("Hardware", "Parity", "model-index", "GPU-hours |", "MFU", "None", "nan", "finished |", "A sample"):
        assert unknown not in text, unknown
    assert "was not evaluated" in text

    monkeypatch.setattr(sys, "argv", ["recipe", str(directory)])
    with pytest.raises(RecipeError, match="is not finished"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory), "--output", str(tmp_path / "card")])
    command.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "card/README.md")
    assert {path.name for path in (tmp_path / "card").iterdir()} == {"README.md", "curves.png", "config.yaml"}


def test_card_in_the_run_directory_leaves_its_config(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (directory / "config.yaml").read_bytes()
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory), "--output", str(directory)])
    command.main()
    assert (directory / "README.md").exists()
    assert (directory / "config.yaml").read_bytes() == before


def test_every_part_of_a_run_is_in_the_card(directory: Path) -> None:
    """What two GPUs, then three, would have written, on a Hub dataset."""
    edit_lines(directory / LEDGER, lambda line: line | (_on_gpus(line["update"]) if line["update"] else {}))
    found = [e for e in events() if e["event"] in ("start", "resume")]
    gpu = {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
    for start, ranks in zip((found[0], found[1]), (2, 3), strict=True):
        start |= gpu | {"world_size": ranks}
    found[2]["changes"]["schedule.total_tokens"] = [9_216, 18_432]
    found += [{"event": "skipped_update", "update": 7, "loss": "nan"}, {"event": "rollback", "update": 8, "why": "a|b"}]
    found.append({"event": "sample", "update": 12, "prompt": "", "text": "a ``` fence | <b>"})
    write_lines(directory / EVENTS, found)
    config = (directory / "config.yaml").read_text(encoding="utf-8")
    config = re.sub(r"text_files:\n(  - .*\n)+", "text_files: []\n", config)
    config = config.replace("dataset: python-standard-library", "dataset: HuggingFaceFW/fineweb-edu:sample-10BT")
    config = config.replace("revision: null", "revision: 87f0914").replace("init_from: null", "init_from: me/first")
    (directory / "config.yaml").write_text(config, encoding="utf-8")
    card = model_card(read_record(directory), directory / "final")
    metadata: dict[str, Any] = card.data.to_dict()
    assert metadata["base_model"] == "me/first"
    assert metadata["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    dataset = metadata["model-index"][0]["results"][0]["dataset"]
    assert (dataset["revision"], dataset["config"]) == ("87f0914", "sample-10BT")
    for words in (
        "2 x NVIDIA H100 80GB HBM3",
        "3 x NVIDIA H100 80GB HBM3",
        "| GPU-hours | 3.75 |",  # 450 s x (6 x 2 + 6 x 3) ranks
        "| MFU | 41.2\N{NO-BREAK SPACE}% |",
        "| 1 to 6 | 2 | 4 | 6 |",
        "| 7 to 12 | 3 | 3 | 3 |",
        "tokens/s; MFU 41.2",
        "checkpoint step-000006; changes batch.micro_batch_size 8 → 5",
        "| 8 | rollback | why a\\|b |",
        "| configuration | sample-10BT |",
        "| revision | 87f0914 |",
        "trained from the weights of me/first on\n[HuggingFaceFW/fineweb-edu](",
        "| initial weights | me/first |",
        "What me/first had been trained on before",
        "schedule.total_tokens changed on the way",
        "1 update gave a loss or gradient that was not finite and was skipped",
        "it returned to a checkpoint (1 x)",
        "````text\na ``` fence | <b>\n````",
    ):
        assert words in str(card), words


def _on_gpus(update: int) -> dict[str, Any]:
    first = {"world_size": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 6}
    second = {"world_size": 3, "micro_batch_size": 3, "gradient_accumulation_steps": 3}
    return {"mfu": 0.412, "update_seconds": 450.0, **(first if update <= 6 else second)}


def test_card_without_the_drawing_library_has_no_image(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = card_files(directory)
    assert set(files) == {"README.md", "curves.png", "config.yaml"}
    assert files["curves.png"].startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # what an import finds if it is not installed
    files = card_files(directory)
    assert set(files) == {"README.md", "config.yaml"}
    assert b"curves.png" not in files["README.md"]
