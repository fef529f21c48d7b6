"""A user's mistake gets one line that says what to change, exit code 2, and no traceback; before anything expensive."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from recipe.config.command_line import load_config
from recipe.errors import RecipeError
from recipe.plan.run_plan import make_plan
from tests.helpers import ACCELERATE, FAULTY, ROOT, TINY, assert_one_line, run, run_and_time, train, write_texts

# Arguments after the tiny settings, words the line has to contain.
SETTINGS = {
    "unknown section": (["--modle.n_layer", "3"], ["modle.n_layer is not a setting", "model.n_layer"]),
    "shortened key": (["--batch.lane", "4"], ["batch.lane is not a setting", "batch.lanes"]),
    "null": (["--config", "BROKEN/null.yaml"], ["batch.tokens_per_update = null", "int"]),
    "section is no mapping": (["--config", "BROKEN/section.yaml"], ["run"]),
    "list without a value": (["--data.text_files"], ["--data.text_files needs a value"]),
    "seed too large": (["--run.seed", "5000000000"], ["run.seed = 5000000000", "below 4,294,967,296"]),
    "no directory": (["--run.directory", ""], ["run.directory is empty"]),
    "wrong type": (["--batch.lanes", "many"], ["--batch.lanes", "expected int", "many"]),
    "neither number nor null": (["--run.max_updates", "all"], ["--run.max_updates: expected int, null, got all"]),
    "neither number nor word": (["--batch.micro_batch_size", "x"], ["expected int, Literal['auto'], got x"]),
    "wrong choice": (["--precision", "fp8"], ["--precision", "'auto', 'bf16', 'fp32'", "fp8"]),
    "no value": (["--batch.lanes"], ["--batch.lanes", "expected one argument"]),
    "stray word": (["train"], ["unrecognized", "train"]),
    "lanes do not divide": (["--batch.lanes", "7"], ["batch.lanes = 7", "24 blocks", "[1, 2, 3, 4, 6, 8, 12, 24]"]),
    "missing file": (["--data.text_files", "no/such/*.txt"], ["no file matches 'no/such/*.txt'"]),
    "files as a list": (["--data.token_files", "[a.bin, b.bin]"], ["one behind the other, without brackets"]),
    "a directory as a file": (
        ["--data.text_files", "configs"],
        ["'configs' is a directory", "such as 'configs/*.txt'"],
    ),
    "a glob of directories": (["--data.text_files", "recip?"], ["'recipe' is a directory", "such as 'recipe/*.txt'"]),
    "a directory as a set": (["--evaluation.sets.mine", "configs"], ["evaluation.sets.mine: 'configs' is a directory"]),
    "everything held out": (
        ["--data.validation_one_in", "1"],
        ["data.validation_one_in = 1: must be at least 2", "hold out everything"],
    ),
    "unknown format": (["--data.text_files", "run.sh"], ["'run.sh'", ".jsonl.zst"]),
    "two formats": (["--data.text_files", "MIXED/*"], ["one format"]),
    "empty files": (["--data.text_files", "EMPTY/*.txt"], ["empty"]),
    "longer than positions": (["--model.n_positions", "32"], ["sequence_length = 64", "n_positions = 32"]),
    "heads do not divide": (["--model.n_head", "5"], ["n_head = 5", "n_embd = 32", "[1, 2, 4, 8, 16, 32]"]),
    "unknown activation": (
        ["--model.activation_function", "glu"],
        ["'glu' is unknown", "gelu_pytorch_tanh, hardswish"],
    ),
    "below its bound": (["--batch.micro_batch_size", "0"], ["batch.micro_batch_size = 0", "at least 1"]),
    "waiting too long": (
        ["--data.retry_seconds", "3600"],
        ["data.retry_seconds = 3600", "at most 1,200", "ranks wait"],
    ),
    "unknown format of an address": (
        ["--data.text_files", "http://host/a.csv?b=.jsonl"],
        ["a.csv'", ".parquet"],
    ),
    "branch from nothing": (["--run.branch", "true", "--resume", "fresh"], ["run.branch", "--resume PATH"]),
    "text left out by no branch": (["--run.skip_tokens", "512"], ["run.skip_tokens = 512", "--run.branch true"]),
    "muon in bf16": (["--optimizer.name", "muon", "--optimizer.state", "bf16"], ["bf16 is AdamW in bf16", "not muon"]),
    "negative rate": (["--optimizer.learning_rate", "-1"], ["optimizer.learning_rate", "greater than 0"]),
    "warm-up too long": (["--schedule.warmup_tokens", "61440"], ["warmup_tokens = 61,440", "leaves nothing"]),
    "vocabulary too small": (["--model.vocab_size", "100"], ["model.vocab_size = 100", "257"]),
    "no such preset": (["--config", "configs/gpt3.yaml"], ["--config", "configs/gpt3.yaml"]),
    "preset is no YAML": (["--config", "BROKEN/preset.yaml"], ["is not valid YAML", "line 2"]),
    "preset is binary": (["--config", "BROKEN/binary.yaml"], ["not a text file"]),
    "preset has an unknown key": (
        ["--config", "BROKEN/unknown.yaml"],
        ["batch.tokens is not a setting", "tokens_per_update"],
    ),
    "preset is a directory": (["--config", "configs"], ["--config 'configs' cannot be read: Is a directory"]),
    "preset is a pipe that nobody writes into": (["--config", "BROKEN/pipe"], ["pipe' is no regular file"]),
    "preset is a device": (["--config", "/dev/zero"], ["'/dev/zero' is no regular file of 4,000,000 bytes"]),
    "preset is far too large": (
        ["--config", "BROKEN/large.yaml"],
        ["large.yaml' is no regular file of 4,000,000 bytes"],
    ),
    "preset is the memory of a process": (["--config", "/proc/self/mem"], ["cannot be read: Input/output error"]),
    "preset is YAML on the command line": (["--config", "run: {seed: 1}"], ["'run: {seed: 1}' cannot be read"]),
    "preset is empty": (["--config", "EMPTY/a.txt"], ["has no sections of settings"]),
    "preset names another": (["--config", "BROKEN/nested.yaml"], ["config is not a setting"]),
    "aliases of aliases": (["--config", "BROKEN/bomb.yaml"], ["an alias (*name) is not taken", "line 1"]),
    "aliases in a flag": (["--evaluation.sets", "{a: &a x, b: *a}"], ["expected dict, got {a: &a x"]),
    "a key that stands twice": (["--config", "BROKEN/twice.yaml"], ["the key seed stands twice, line 3"]),
    "a key that stands twice in JSON": (["--config", "BROKEN/twice.json"], ["the key run stands twice, line 1"]),
    "a key that is a number": (["--config", "BROKEN/key.yaml"], ["a key is no text", "line 2"]),
    "deeply nested": (["--config", "BROKEN/deep.yaml"], ["not valid YAML: exceeded maximum nesting depth, line 1"]),
    "a section from a file": (["--config", "BROKEN/device.yaml"], ["mapping of settings; look at ['run', 'data']"]),
    "a section from a file in a flag": (["--run", "/dev/zero"], ["run is not a setting"]),
    "a number of 400 digits": (["--config", "BROKEN/digits.yaml"], ["a number of more than 300 digits, line 1"]),
    "a number of 400 digits in a flag": (["--optimizer.learning_rate", "9" * 400], ["999... has too many digits"]),
    "no number": (["--config", "BROKEN/infinite.yaml"], ["optimizer.learning_rate = inf: must be at most 1,000"]),
    "wider than anything": (["--model.n_embd", "1" + "0" * 18], ["model.n_embd = 1000000000000000000", "at most"]),
    "deeper than anything": (["--model.n_layer", "4294967296"], ["n_layer = 4294967296: must be at most 65,536"]),
    "an update larger than anything": (["--batch.tokens_per_update", "1" + "0" * 30], ["at most 1,099,511,627,776"]),
    "many lanes might be meant": (
        ["--batch.tokens_per_update", str(720_720 * 64), "--batch.lanes", "17"],
        ["720,720 blocks", "choose lanes among [12, 13, 14, 15, 16, 18, 20, 21], or"],
    ),
    "NUL": (["--config", "BROKEN/nul.yaml"], ["run.directory = 'a\\x00b': it cannot have the character '\\x00'"]),
    "not UTF-8": (["--run.directory", "caf\udce9"], ["run.directory", "'\\udce9'; give UTF-8"]),
    "not UTF-8 in a list": (["--data.text_files", "caf\udce9.txt"], ["data.text_files", "'\\udce9'; give UTF-8"]),
    "a name of two lines": (["--run.directory", "a\nb"], ["run.directory = 'a\\nb': it cannot have", "in one line"]),
    "a path that is too long": (
        ["--run.directory", "a/" * 3000],
        ["run.directory = 'a/a/", "it is too long; a name has 255 bytes"],
    ),
    "a name that is too long": (["--run.directory", "runs/" + "a" * 256], ["it is too long; a name has 255 bytes"]),
    "a checkpoint with a long name": (["--resume", "a" * 300], ["resume = 'aaa", "it is too long"]),
    "a stray name of escapes": (["\x1b[31m"], ["unrecognized arguments: \N{REPLACEMENT CHARACTER}[31m"]),
    "a flag without end": (["--" + "a" * 100_000], ["unrecognized arguments: --aaa"]),
    "a flag that is a dot": (["--.", "1"], ["unrecognized arguments: --."]),
    "more arguments than settings": (["--run.seed", "1"] * 1000, ["give 1,000 at most", "put a glob in quotes"]),
    "dataset without a name": (["--data.dataset", ":x"], ["data.dataset = ':x'", "user/name:configuration"]),
    "dataset without a configuration": (["--data.dataset", "user/name:"], ["data.dataset = 'user/name:'"]),
    "dataset with two colons": (["--data.dataset", "a/b:c:d"], ["data.dataset = 'a/b:c:d'", "user/name:configuration"]),
    "standard library with a configuration": (
        ["--data.dataset", "python-standard-library:x"],
        ["python-standard-library has no configurations"],
    ),
    "a set named as the held-out documents": (
        ["--evaluation.sets.held_out", "README.md"],
        ["'held_out' cannot be the name of a set"],
    ),
    "no encoding": (["--data.encoding", "klingon"], ["data.encoding = 'klingon'", "latin-1"]),
    "an encoding of no text": (["--data.encoding", "base64"], ["data.encoding = 'base64'", "latin-1"]),
    "resume from nothing": (["--resume", "never"], ["resume = 'never'", "auto, fresh, or the path of a checkpoint"]),
    "no name of a repository": (["--hub.repo_id", "model"], ["hub.repo_id = 'model'", "user/name"]),
}
# The same for a whole process: the line is all that it prints, and it ends with exit code 2.
OF_A_PROCESS = {
    "unknown key": (["--batch.tokns", "3"], ["batch.tokns is not a setting", "batch.tokens_per_update"]),
    "no whole blocks": (["--batch.tokens_per_update", "1500"], ["1,500", "23.44 blocks of 64", "1,472 or 1,536"]),
    "run directory is a file": (["--run.directory", "run.sh/x"], ["run.directory", "run.sh/x", "Not a directory"]),
}
# Settings that have other names now.
RENAMED = {
    "performance.products": "performance.matmul",
    "evaluation.text_files": "evaluation.sets",
    "run.parity_receipt": "run.parity_check",
    "data.config_name": "data.dataset",
    "data.shuffle_window": "data.shuffle_blocks",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories whose names stand in the arguments above."""
    root = tmp_path_factory.mktemp("errors")
    for name in ("MIXED", "EMPTY", "BROKEN", "RUN"):
        (root / name).mkdir()
    (root / "MIXED/a.txt").write_text("text")
    (root / "MIXED/b.jsonl").write_text('{"text": "text"}')
    (root / "EMPTY/a.txt").write_text("")
    (root / "EMPTY/b.txt").write_text("")
    (root / "BROKEN/preset.yaml").write_text("batch: [\n")
    (root / "BROKEN/binary.yaml").write_bytes(os.urandom(64) + b"\xff\xfe")
    (root / "BROKEN/null.yaml").write_text("batch:\n  tokens_per_update: null\n")
    (root / "BROKEN/section.yaml").write_text("run: 5\n")
    os.mkfifo(root / "BROKEN/pipe")
    with (root / "BROKEN/large.yaml").open("wb") as file:
        file.truncate(100_000_000)
    bomb = "".join(f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (root / "BROKEN/bomb.yaml").write_text(f"x0: &x0 lol\n{bomb}")
    (root / "BROKEN/nested.yaml").write_text("config: configs/quickstart.yaml\n")
    (root / "BROKEN/twice.yaml").write_text("run:\n  seed: 1\n  seed: 2\n")
    (root / "BROKEN/twice.json").write_text('{"run": {}, "run": {}}')
    (root / "BROKEN/key.yaml").write_text("evaluation:\n  sets: {5: a}\n")
    (root / "BROKEN/deep.yaml").write_text("[" * 100_000)
    (root / "BROKEN/device.yaml").write_text("run: /dev/zero\ndata: /dev/zero\n")
    (root / "BROKEN/digits.yaml").write_text(f"optimizer: {{learning_rate: {'9' * 400}}}\n")
    (root / "BROKEN/infinite.yaml").write_text("optimizer: {learning_rate: .inf}\n")
    (root / "BROKEN/nul.yaml").write_text('run: {directory: "a\\0b"}\n')
    (root / "BROKEN/unknown.yaml").write_text("batch:\n  tokens: 5\n")
    write_texts(root / "TEXTS", count=3)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_one_line(case: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given, words = SETTINGS[case]
    given = [str(places[part[0]].joinpath(*part[1:])) if (part := g.split("/"))[0] in places else g for g in given]
    with pytest.raises(RecipeError) as refused:
        make_plan(load_config([*TINY, *given]), world_size=1)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("case", OF_A_PROCESS)
def test_a_process_with_a_wrong_setting_prints_one_line(case: str, tmp_path: Path) -> None:
    given, words = OF_A_PROCESS[case]
    done = train(*TINY, "--run.directory", str(tmp_path / "run"), *given)
    assert_one_line(done, words)
    assert not (tmp_path / "run").exists()


def test_a_wrong_setting_is_answered_at_once_and_without_torch() -> None:
    """Half a second on an idle machine. Of torch not even the first import is begun."""
    code = "import sys, recipe.train\ntry: recipe.train.main()\nfinally: print({'torch', 'numpy'} & {*sys.modules})"
    answers = [run_and_time([sys.executable, "-c", code, *TINY, "--batch.tokns", "3"]) for _ in range(3)]
    assert all(done.stdout == "set()\n" for done, _ in answers)
    assert min(seconds for _, seconds in answers) < 1


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_setting_is_found_by_what_it_does(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is not a setting; did you mean {RENAMED[name]}\\?"):
        load_config([f"--{name}", "x"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--batch.lanes", "4"], ["3 documents", "batch.lanes = 4", "--batch.lanes to 3"]),
        (["--data.text_files", "{root}/spaces.jsonl", "--batch.lanes", "1"], ["no text"]),
        (["--data.text_files", "{root}/words.jsonl", "--batch.lanes", "1"], ["no column 'text'", "['words']"]),
        (["--batch.lanes", "3", "--data.tokenizer", "{root}/nothing"], ["data.tokenizer", "nothing"]),
    ],
    ids=["fewer documents than lanes", "empty corpus", "no such column", "no such tokenizer"],
)
def test_unusable_data_is_one_line(given: list[str], words: list[str], tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=3)
    (tmp_path / "spaces.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (tmp_path / "words.jsonl").write_text('{"words": "a b c"}\n')
    given = [g.format(root=tmp_path) for g in given]
    done = train(
        *TINY, "--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt", *given
    )
    assert_one_line(done, words)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    given = ["--data.dataset", "nobody/nothing", "--run.directory", str(tmp_path / "run"), "--data.retry_seconds", "0"]
    done = train(*TINY, *given, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert_one_line(done, ["nobody/nothing", "--data.text_files"])


def test_an_address_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/a.jsonl"
    done = train(
        *TINY, "--run.directory", str(tmp_path / "run"), "--data.text_files", address, "--data.retry_seconds", "0"
    )
    assert_one_line(done, [f"cannot read {address}", "Connection refused"])


def test_more_ranks_than_lanes_is_one_line_from_one_rank(tmp_path: Path) -> None:
    given = [*TINY, "--run.directory", str(tmp_path), "--batch.lanes", "2"]
    group = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    first = train(*given, RANK="0", LOCAL_RANK="0", **group)
    assert_one_line(first, ["3 ranks", "batch.lanes = 2", "[3, 4, 6, 8, 12, 24]"])
    second = train(*given, RANK="1", LOCAL_RANK="1", **group)
    assert (second.returncode, second.stderr) == (2, "")


@pytest.mark.slow
def test_a_launch_that_starts_one_process_says_so_in_the_plan(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one, without a word: it trains the same updates, on one rank."""
    given = [*TINY, "--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt"]
    write_texts(tmp_path / "texts")
    options = ["--quiet", "--cpu", "--num_processes", "2"]
    done = run([ACCELERATE, "launch", *options, "recipe/train.py", *given, "--run.max_updates", "1"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"world size +1, 8 lanes each\n", done.stdout)


def test_ranks_that_do_not_see_each_other_are_refused(tmp_path: Path) -> None:
    done = train(*TINY, "--run.directory", str(tmp_path), script=(FAULTY, "miscounting_accelerator"))
    assert_one_line(done, ["the launcher started 1 ranks but this one sees 2"])


def test_launches_of_another_trainer_are_refused(tmp_path: Path) -> None:
    done = train(*TINY, "--run.directory", str(tmp_path), ACCELERATE_USE_DEEPSPEED="true")
    assert_one_line(done, ["DeepSpeed is not supported", "fsdp2_8.yaml"])


@pytest.mark.slow
def test_a_local_run_looks_no_host_up(tmp_path: Path) -> None:
    """Not even to count a download: the tests' own HF_HUB_OFFLINE is taken away."""
    write_texts(tmp_path / "texts", count=8)
    script = """
import socket, os
del os.environ["HF_HUB_OFFLINE"]
asked = []
original = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: asked.append(host) or original(host, *rest, **more)
from recipe.errors import run_command
import recipe.train
run_command(recipe.train.main)
print("asked for", [host for host in asked if host not in (None, "localhost", "127.0.0.1", socket.gethostname())])
"""
    given = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt"]
    done = train(*TINY, *given, "--run.max_updates", "2", "--evaluation.sample_tokens", "null", script=("-c", script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("asked for []")
    assert "\nsample\n" not in done.stdout, "asked for no sample"


def test_a_directory_without_a_model_is_one_line(tmp_path: Path) -> None:
    for command in ("generate", "evaluate"):
        done = run([sys.executable, "-m", "recipe", command, str(tmp_path)])
        assert_one_line(done, ["not a model directory", "RUN/final"])


def test_run_sh_answers_a_wrong_preset_and_topology_at_once() -> None:
    """Before it installs anything."""
    assert_one_line(
        run(["bash", "run.sh", "configs/none.yaml"]), ["no preset configs/none.yaml", "configs/gpt2-1.3b.yaml"]
    )
    assert_one_line(run(["bash", "run.sh"], TOPOLOGY="tpu"), ["TOPOLOGY=tpu", "accelerate_configs/cpu_2.yaml"])
    done = run(["bash", "run.sh", "--help"])
    assert done.returncode == 0
    assert "TOPOLOGY" in done.stdout


def test_help_lists_every_setting_and_imports_no_torch() -> None:
    script = "import sys; sys.argv[1:] = ['--help']\ntry:\n import recipe.train; recipe.train.main()\n"
    done = run([sys.executable, "-c", script + "except SystemExit: print('torch' in sys.modules)"])
    assert done.returncode == 0, done.stderr
    from recipe.config.settings import Config, flat_fields

    for name, _ in flat_fields(Config):
        assert f"--{name}" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    given = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt"]
    done = train(*TINY, *given, script=(FAULTY, "full_disk"))
    assert_one_line(done, ["cannot write", "events.jsonl", "No space left on device"])
