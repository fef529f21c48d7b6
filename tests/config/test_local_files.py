"""What names and patterns of local files stand for: names as they are, and every file once."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import pytest

from recipe.config.command_line import load_config
from recipe.config.local_files import paths_of
from recipe.config.text_files import expand_text_files
from recipe.errors import RecipeError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: each test makes its own files in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    """Files whose text is their name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")


# ---- Names and patterns ------------------------------------------------------------------------------------------------


NAMED = {
    "shard[1].jsonl": ["shard[1].jsonl"],
    "shard[0-9].jsonl": ["shard1.jsonl", "shard2.jsonl"],
    "shard[[]1].jsonl": ["shard[1].jsonl"],  # as `glob.escape` writes it
    "*.jsonl": ["*.jsonl"],
    "?.jsonl": ["*.jsonl", "a.jsonl"],
    "dir[1]/*.jsonl": ["dir[1]/a.jsonl", "dir[1]/b.jsonl"],
    "dir[1]/[ab].jsonl": ["dir[1]/a.jsonl", "dir[1]/b.jsonl"],
    "dir[1]/a.jsonl": ["dir[1]/a.jsonl"],
    "dir[13]/*.jsonl": ["dir1/a.jsonl"],
    "*/dir[1]/?.jsonl": ["in/dir[1]/c.jsonl"],
    "**/dir[1]/*.jsonl": ["dir[1]/a.jsonl", "dir[1]/b.jsonl", "in/dir[1]/c.jsonl"],
    "a * ?/*": ["a * ?/d.jsonl"],
    "a * ?/d.jsonl": ["a * ?/d.jsonl"],
    "[]x.jsonl": ["[]x.jsonl"],
    '["x"].jsonl': ['["x"].jsonl'],
}


def write_named() -> None:
    """Also the files that the names are patterns of."""
    write("shard[1].jsonl", "shard1.jsonl", "shard2.jsonl", "*.jsonl", "a.jsonl", "[]x.jsonl", '["x"].jsonl')
    write("dir[1]/a.jsonl", "dir[1]/b.jsonl", "dir1/a.jsonl", "in/dir[1]/c.jsonl", "a * ?/d.jsonl", "a b c/d.jsonl")


@pytest.mark.parametrize("given", NAMED)
def test_a_name_that_exists_is_a_name(given: str) -> None:
    write_named()
    assert sorted(expand_text_files([given])) == NAMED[given]


def test_names_come_through_the_command_line_as_they_are() -> None:
    write_named()
    assert load_config(["--data.text_files", *NAMED]).data.text_files == tuple(NAMED)
    sets = [f"--evaluation.sets.{number}={given}" for number, given in enumerate(NAMED)]
    config = load_config(["--data.text_files", '["x"].jsonl', *sets])
    assert config.data.text_files == ('["x"].jsonl',)
    assert [*config.evaluation.sets.values()] == [*NAMED]
    assert load_config(["--data.text_files=[]x.jsonl"]).data.text_files == ("[]x.jsonl",)


@pytest.mark.parametrize("given", ["dir[1]/*.jsonl", "dir[1]/a.jsonl", "dir[1]"])
def test_a_directory_that_exists_is_no_pattern_for_another(given: str) -> None:
    write("dir1/a.jsonl")
    Path("dir[1]").mkdir()
    with pytest.raises(RecipeError, match=r"no file matches 'dir\[1\]/|'dir\[1\]' is a directory"):
        expand_text_files([given])


def test_patterns_find_what_the_standard_library_finds(place: Path) -> None:
    write("a.txt", ".hidden.txt", ".d/a.txt", "d/a.txt", "d/.hidden.txt", "d/e/a.txt", "d/e/.f/a.txt", "d/f g/b.txt")
    patterns = [
        "*",
        "**",
        "**/*",
        "**/*.txt",
        "*/*",
        "*/**",
        "d/**",
        "**/e/*",
        "./*.txt",
        ".*",
        "d/.*",
        "[d]/?/*",
        "**.txt",
        "x/*",
    ]
    for pattern in [*patterns, *(f"{place}/{pattern}" for pattern in patterns)]:
        expected = {os.path.normpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        assert set(filter(os.path.isfile, paths_of(pattern))) == expected, pattern
