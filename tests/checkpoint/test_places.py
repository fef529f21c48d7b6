"""Parts of a run directory that are elsewhere, behind a link or a mount, and links that somebody has put there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoint.files import take_snapshot, write_checkpoint
from recipe.checkpoint.resume import find_resume_point
from recipe.checkpoint.verify import why_invalid
from recipe.config.settings import Config, RunConfig, flat_settings
from recipe.errors import RecipeError
from recipe.model.export import export_model, load_pretrained
from recipe.run.directory import begin_run, claim_run_directory, list_checkpoints
from recipe.run.ledger import read_lines
from tests.support.checkpoints import state_of, trained, write
from tests.support.run_files import write_lines
from tests.support.runs import make_run

UPDATES = (5, 10, 15)


@pytest.fixture
def another_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory of another file system: a rename to it fails for real."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    directory = memory / f"token-budget-recipe-{os.getpid()}-{tmp_path.name}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def configured(directory: Path, **more: Any) -> Config:
    return Config(run=RunConfig(directory=str(directory)), **more)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints, with a ledger and events of 15 updates, a rollback to 5, and an end."""
    directory = tmp_path_factory.mktemp("original")
    model, optimizer, tokenizer = trained()
    gpt2: Any = model.gpt2
    for update in UPDATES:
        state = replace(state_of(update), config=flat_settings(configured(directory)))
        write_checkpoint(directory / "checkpoints", take_snapshot(model, optimizer), state, gpt2.config, tokenizer)
    write_lines(directory / "ledger.jsonl", ({"update": update} for update in range(1, 16)))
    rollback = {"event": "rollback", "update": 5, "skipped_blocks": [[6, 8]]}
    write_lines(
        directory / "events.jsonl", [{"event": "start", "update": 0}, rollback, {"event": "spike", "update": 12}]
    )
    export_model(gpt2, tokenizer, directory / "final")
    (directory / "summary.json").write_text("{}", encoding="utf-8")
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    return directory


def move_and_link(path: Path, target: Path) -> None:
    """Put a directory elsewhere, and a link in its place."""
    if path.exists():
        shutil.move(path, target)
    else:
        target.mkdir()
    path.symlink_to(target)


def names(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


def updates_in(path: Path) -> list[int]:
    return [line["update"] for line in read_lines(path)]


@pytest.mark.parametrize("resume", ["auto", "path", "path elsewhere", "link to a checkpoint", "relative"])
def test_a_rollback_is_known_wherever_the_checkpoints_are(
    resume: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, link = tmp_path / "run", tmp_path / "best"
    shutil.copytree(original, run, dirs_exist_ok=True)
    whole = find_resume_point(configured(run))
    assert (whole.update, whole.skipped_blocks) == (15, ((6, 8),))
    move_and_link(run / "checkpoints", tmp_path / "elsewhere")
    link.symlink_to(run / "checkpoints/step-000015")
    monkeypatch.chdir(run)
    given = {
        "auto": "auto",
        "path": str(run / "checkpoints/step-000015"),
        "path elsewhere": str(tmp_path / "elsewhere/step-000015"),
        "link to a checkpoint": str(link),
        "relative": "checkpoints/step-000015",
    }[resume]
    point = find_resume_point(configured(run, resume=given))
    assert asdict(replace(point, changes={})) == asdict(replace(whole, changes={})), "also under its own name"
    if resume != "path elsewhere":  # from where nothing leads back to the run
        foreign = find_resume_point(
            configured(tmp_path / "other", resume=str(tmp_path / "run/checkpoints/step-000010"))
        )
        assert (foreign.update, foreign.skipped_blocks) == (10, ((6, 8),))


def test_a_rollback_is_known_to_a_checkpoint_that_is_a_link(original: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(original, tmp_path / "run")
    move_and_link(directory / "checkpoints/step-000015", tmp_path / "elsewhere")
    point = find_resume_point(configured(directory))
    assert (point.update, point.skipped_blocks) == (15, ((6, 8),))


def test_a_rollback_that_cannot_be_read_is_not_forgotten(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    write_lines(tmp_path / "events.jsonl", [{"event": "rollback", "update": 5}])
    with pytest.raises(RecipeError, match=r"events\.jsonl has a rollback that does not say which blocks it left out"):
        find_resume_point(configured(tmp_path))


@pytest.mark.parametrize("linked", ["", "checkpoints", "previous", "final"])
def test_what_is_newer_is_set_aside_on_its_own_disk(
    linked: str, accelerator: Any, original: Path, tmp_path: Path, another_disk: Path
) -> None:
    directory, elsewhere = tmp_path / "run", another_disk / "there"
    shutil.copytree(original, directory, dirs_exist_ok=True)
    if linked:
        move_and_link(directory / linked, elsewhere)
    begin_run(make_run(configured(directory), accelerator), 10, directory / "checkpoints/step-000010")
    assert not linked or (directory / linked).readlink() == elsewhere
    assert names(directory / "checkpoints") == ["step-000010", "step-000005"]
    set_aside = directory / (
        "checkpoints/previous/1" if linked in ("checkpoints", "previous") else "previous/1/checkpoints"
    )
    assert why_invalid(set_aside / "step-000015") is None
    assert updates_in(directory / "ledger.jsonl") == list(range(1, 11))
    assert updates_in(directory / "previous/1/ledger.jsonl") == list(range(1, 16))
    final = directory / ("final/previous/1" if linked in ("final", "previous") else "previous/1/final")
    load_pretrained(str(final))
    assert not list((directory / "final").glob("*.safetensors")), "an earlier end is not this one's"


@pytest.mark.parametrize("linked", ["checkpoints", "previous", "final", "run"])
def test_a_new_run_sets_the_earlier_one_aside_and_keeps_links(
    linked: str, accelerator: Any, original: Path, tmp_path: Path, another_disk: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(original, directory, dirs_exist_ok=True)
    path = directory if linked == "run" else directory / linked
    move_and_link(path, another_disk / "there")
    for number in (1, 2):
        run = make_run(configured(directory), accelerator)
        begin_run(run, 0, None)
        run.ledger.close()
        assert path.readlink() == another_disk / "there"
        assert names(directory / "checkpoints") == []
        set_aside = "checkpoints/previous/1" if linked in ("checkpoints", "previous") else "previous/1/checkpoints"
        assert names(directory / set_aside) == ["step-000015", "step-000010", "step-000005"]
        assert updates_in(directory / "previous/1/ledger.jsonl") == list(range(1, 16))
        assert updates_in(directory / f"previous/{number}/events.jsonl")[0] == 0
        load_pretrained(
            str(directory / ("final/previous/1" if linked in ("final", "previous") else "previous/1/final"))
        )
        assert (directory / "notes.txt").exists()


def contents(directory: Path) -> dict[str, bytes]:
    """What the files of a run hold, by their names."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Killed(BaseException):
    """The process ends here."""


ERROR = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("failure", "resume_from", "linked"),
    [(ERROR, 10, ""), (ERROR, None, "previous"), (Killed(), 10, "checkpoints"), (Killed(), None, "")],
)
def test_nothing_is_lost_by_a_failure_at_any_point_of_making_room(
    failure: BaseException,
    resume_from: int | None,
    linked: str,
    accelerator: Any,
    original: Path,
    tmp_path: Path,
    another_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an error all is as it was; a kill leaves everything somewhere, and what resumes has its ledger and rollbacks."""
    before = contents(original)
    for point in range(100):
        directory, elsewhere = tmp_path / f"run-{point}", another_disk / str(point)
        shutil.copytree(original, directory)
        if linked:
            move_and_link(directory / linked, elsewhere)
        checkpoint = directory / "checkpoints/step-000010" if resume_from else None
        calls = iter(range(10**6))
        with monkeypatch.context() as patched:
            for module, name in ((os, "replace"), (os, "fsync"), (shutil, "copyfile")):
                patched.setattr(module, name, failing(getattr(module, name), calls, point, failure))
            try:
                begin_run(make_run(configured(directory), accelerator), resume_from or 0, checkpoint)
            except (RecipeError, Killed):
                pass
            else:
                break
        after = contents(directory) | (
            {f"checkpoints/{k}": v for k, v in contents(elsewhere).items()} if linked else {}
        )
        assert set(before.values()) <= set(after.values())
        if isinstance(failure, OSError):
            for name, content in before.items():
                assert (directory / name).read_bytes() == content, name
        for path in list_checkpoints(directory / "checkpoints")[:1]:
            update = int(path.name.removeprefix("step-"))
            assert updates_in(directory / "ledger.jsonl")[:update] == list(range(1, update + 1))
            assert find_resume_point(configured(directory, resume=str(path))).skipped_blocks == ((6, 8),)
        shutil.rmtree(elsewhere, ignore_errors=True)
    assert point > 5, "there are that many points"


def failing(
    original: Callable[..., Any], calls: Iterator[int], point: int, failure: BaseException
) -> Callable[..., Any]:
    """Let the `point`-th of all calls fail."""

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == point:
            raise failure
        return original(*arguments, **options)

    return call


def test_a_mount_stays_and_what_is_in_it_changes(
    accelerator: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the operating system has it: a mount cannot be renamed, nor anything over its border."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    mounts = [tmp_path / "checkpoints", tmp_path / "final"]
    rename = os.replace

    def replace_(old: Any, new: Any) -> None:
        mount_of = [[mount for mount in mounts if mount in Path(path).parents] for path in (old, new)]
        if {Path(old), Path(new)} & set(mounts):
            raise OSError(errno.EBUSY, "Device or resource busy")
        if mount_of[0] != mount_of[1]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace_)
    nodes = [mount.stat().st_ino for mount in mounts]
    begin_run(make_run(configured(tmp_path), accelerator), 0, None)
    assert names(tmp_path / "checkpoints/previous/1") == ["step-000015", "step-000010", "step-000005"]
    load_pretrained(str(tmp_path / "final/previous/1"))
    write(tmp_path / "checkpoints", 5, trained())
    assert why_invalid(tmp_path / "checkpoints/step-000005") is None
    model, _, tokenizer = trained(seed=2)
    export_model(model.gpt2, tokenizer, tmp_path / "final")
    found, _ = load_pretrained(str(tmp_path / "final"))
    assert found.transformer.ln_f.weight.equal(model.gpt2.transformer.ln_f.weight)
    assert [mount.stat().st_ino for mount in mounts] == nodes
    assert not list(tmp_path.rglob(".tmp-*"))


def test_the_finished_model_goes_where_a_link_says(tmp_path: Path, another_disk: Path) -> None:
    (tmp_path / "final").symlink_to(another_disk)
    for seed in (1, 2):  # the second takes the place of the first
        model, _, tokenizer = trained(seed=seed)
        export_model(model.gpt2, tokenizer, tmp_path / "final")
        found, _ = load_pretrained(str(tmp_path / "final"))
        assert found.transformer.ln_f.weight.equal(model.gpt2.transformer.ln_f.weight)
    assert (tmp_path / "final").readlink() == another_disk
    assert not list(another_disk.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["checkpoints", "final", "previous", ""])
@pytest.mark.parametrize("kind", ["dangling", "file"])
def test_a_directory_that_is_none_is_refused_before_training(name: str, kind: str, tmp_path: Path) -> None:
    path = (tmp_path / "run" / name) if name else tmp_path / "run"
    path.parent.mkdir(exist_ok=True)
    if kind == "dangling":
        path.symlink_to("/no/such/disk")
    else:
        path.write_text("mine", encoding="utf-8")
    words = "is a link to /no/such/disk, which is no directory" if kind == "dangling" else "is no directory"
    with pytest.raises(RecipeError, match=words) as refused:
        claim_run_directory(make_run(configured(tmp_path / "run")))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.yaml", "ledger.jsonl", "events.jsonl", "summary.json", ".lock"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_no_file_of_a_run_is_written_through_a_link(name: str, kind: str, tmp_path: Path) -> None:
    """Nor is a pipe waited for."""
    directory, precious = tmp_path / "run", tmp_path / "precious"
    directory.mkdir()
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to(precious)
        if kind == "link":
            precious.write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match=f"{name} is (a link to|no file)"):
        claim_run_directory(make_run(configured(directory)))
    assert kind == "link" or not precious.exists()
    assert kind != "link" or precious.read_text(encoding="utf-8") == "mine"


def test_a_link_that_appears_later_is_not_followed_either(accelerator: Any, tmp_path: Path) -> None:
    directory, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").write_text("mine", encoding="utf-8")
    run = make_run(configured(directory), accelerator)
    claim_run_directory(run)
    for name in (".tmp-config.yaml", "config.yaml", "events.jsonl"):
        (directory / name).symlink_to(precious / "letter")
    run.ledger.directory.joinpath("ledger.jsonl").symlink_to(precious / "new")
    (directory / "checkpoints").mkdir()
    for name in (".tmp-step-000005", "step-000005"):
        (directory / "checkpoints" / name).symlink_to(precious)
    assert why_invalid(write(directory / "checkpoints", 5, trained())) is None
    with pytest.raises(RecipeError, match=r"cannot write .*events\.jsonl"):
        run.ledger.event("start", 0)
    begin_run(run, 0, None)
    assert not (directory / "config.yaml").is_symlink()
    assert contents(precious) == {"letter": b"mine"}


def test_two_runs_do_not_share_their_checkpoints(tmp_path: Path) -> None:
    """Each would take the other's files for its own leftovers."""
    runs = [make_run(configured(tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "shared").mkdir()
    for run in runs:
        run.directory.mkdir()
        (run.directory / "checkpoints").symlink_to(tmp_path / "shared")
    claim_run_directory(runs[0])
    with pytest.raises(
        RecipeError, match=r"another process is training in .*two', whose checkpoints lead to .*/shared"
    ):
        claim_run_directory(runs[1])
    for name in ("three", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "three/final").symlink_to(tmp_path / "model")
    claim_run_directory(make_run(configured(tmp_path / "three")))
    assert list((tmp_path / "model").iterdir()) == [], "a finished model has no lock"


def test_what_was_being_written_when_a_run_was_killed_is_removed_at_the_next_start(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").write_text("mine", encoding="utf-8")
    directory = tmp_path / "run"
    write(directory / "checkpoints", 5, trained())
    for name in ("checkpoints/.tmp-step-000010", ".tmp-final", "final/.tmp-new"):
        (directory / name / "training").mkdir(parents=True)
        (directory / name / "model.safetensors").write_bytes(b"half")
    (directory / ".tmp-ledger.jsonl").write_text("half", encoding="utf-8")
    (directory / "checkpoints/.tmp-step-000015").symlink_to(precious)
    claim_run_directory(make_run(configured(directory)))
    assert not list(directory.rglob(".tmp-*"))
    assert names(directory / "checkpoints") == ["step-000005"]
    assert contents(precious) == {"letter": b"mine"}
