"""What names and patterns of local files stand for: names as they are, and every file once."""

from __future__ import annotations

import glob
import json
import os
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from recipe.config.command_line import load_config
from recipe.config.local_files import _paths_of
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
    assert expand_text_files([given]).paths == NAMED[given]


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
        assert set(filter(os.path.isfile, _paths_of(pattern, {}))) == expected, pattern


# ---- Every file once -----------------------------------------------------------------------------------------------------


def write_with_links() -> None:
    """Two files and a directory with a third, and further ways to each of them."""
    write("d/a.jsonl", "d/m.jsonl", "z/b.jsonl")
    Path("d/0.jsonl").symlink_to("m.jsonl")  # first by name, and a link
    os.link("d/m.jsonl", "d/n.jsonl")
    Path("d/dead.jsonl").symlink_to("nowhere")
    Path("d/loop.jsonl").symlink_to("loop.jsonl")
    for up in ("d/up", "d/up2", "d/up3"):  # two would give 2^40 paths
        Path(up).symlink_to("..")
    Path("link").symlink_to("z")


@pytest.mark.parametrize(
    ("given", "paths", "left_out"),
    [
        (["d/a.jsonl", "./d/a.jsonl", "d//a.jsonl"], ["d/a.jsonl"], ""),
        (["d/a.jsonl", "d/../d/a.jsonl"], ["d/../d/a.jsonl"], "repetitions (1): d/a.jsonl is d/../d/a.jsonl"),
        (["z/*.jsonl", "link/*"], ["z/b.jsonl"], "repetitions (1): link/b.jsonl is z/b.jsonl"),
        (["link/*"], ["link/b.jsonl"], ""),
        (
            ["d/*.jsonl"],
            ["d/a.jsonl", "d/m.jsonl"],
            "repetitions (2): d/0.jsonl is d/m.jsonl, d/n.jsonl is d/m.jsonl; dead links (2): d/dead.jsonl, d/loop.jsonl",
        ),
        (
            ["**/*.jsonl", "link/b.jsonl", "d/n.jsonl", "d/*"],
            ["d/a.jsonl", "d/m.jsonl", "z/b.jsonl"],
            "repetitions (7): d/0.jsonl is d/m.jsonl, d/n.jsonl is d/m.jsonl, d/up is ., ...; "
            "dead links (2): d/dead.jsonl, d/loop.jsonl",
        ),
    ],
)
def test_a_file_counts_once_in_whatever_order_its_paths_come(given: list[str], paths: list[str], left_out: str) -> None:
    write_with_links()
    for patterns in permutations(given):
        found = expand_text_files(patterns)
        assert found.paths == paths
        assert found.left_out == (left_out and f"data.text_files: left out {left_out}")


def test_a_file_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write(*(f"d/{number}.jsonl" for number in range(300)))
    looked_at, original = list[Any](), os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        looked_at.append(path)
        return original(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert len(expand_text_files(["d/*.jsonl", "**/*.jsonl"]).paths) == 300
    assert len(looked_at) < 310


def test_a_link_that_leads_nowhere_is_an_error_where_it_is_named() -> None:
    write_with_links()
    with pytest.raises(RecipeError, match=r"'d/dead\.jsonl' is a link that leads nowhere"):
        expand_text_files(["d/a.jsonl", "d/dead.jsonl"])
