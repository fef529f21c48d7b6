"""What `./run.sh` installs is written down to the last version, and it notices when that changes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # with mypy and pytest

CONSTRAINTS = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_constraints_have_one_version_of_all_that_is_asked_for(python: str) -> None:
    """If not: renew them, as CONTRIBUTING.md says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "extra": ""}

    def wanted(lines: list[str]) -> list[Requirement]:
        requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]

    pins = wanted(CONSTRAINTS.splitlines())
    names = [re.sub("[-_.]+", "-", pin.name) for pin in pins]
    versions = {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, pins, strict=True)}
    assert len(versions) == len(names) > 150, "each once"
    for requirement in wanted(asked):
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        if name != project["name"]:
            assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement}: {versions[name]}"


def test_no_registry_is_named() -> None:
    assert not re.search(r"://|index", CONSTRAINTS)


def test_setup_installs_within_the_constraints_and_again_when_they_change(tmp_path: Path) -> None:
    """With a Python that only notes what it is told."""
    for name in (
        "run.sh",
        "pyproject.toml",
        ".ci/constraints.txt",
        "configs/quickstart.yaml",
        "accelerate_configs/cpu.yaml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (tmp_path / ".venv/bin" / name).write_text('#!/bin/sh\necho "$@" >>told\n')
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def told() -> list[str]:
        """What Python is told by `./run.sh PRESET --help`, but for the help itself."""
        (tmp_path / "told").unlink(missing_ok=True)
        command = ["bash", str(tmp_path / "run.sh"), "configs/quickstart.yaml", "--help"]
        done = run(command, cwd=tmp_path, TOPOLOGY="cpu", PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        *installed, last = (tmp_path / "told").read_text().splitlines()
        assert last == "recipe/train.py --help"
        return installed

    first = told()
    assert len(first) == 2
    assert all(line.startswith("-m pip install") and "--constraint .ci/constraints.txt" in line for line in first)
    assert told() == []
    for name in (".ci/constraints.txt", "pyproject.toml"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        assert told() == first, name
        assert told() == []
