"""Tensors that several ranks have written in rows are read whole, or in the rows of other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipe.checkpoint.parts import TensorFiles, Writers, save_tensors
from tests.helpers import expect_error

WHOLE = {
    "matrix": torch.arange(35.0).view(7, 5),
    "row": torch.arange(7, dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
}


def write_parts(directory: Path, ranks: int) -> list[Path]:
    """Rows of the first two as `fully_shard` cuts them, so that the last may have few or none; the number on rank 0 alone."""
    paths, size = [], -(-7 // ranks)
    for rank in range(ranks):
        start, stop = min(rank * size, 7), min((rank + 1) * size, 7)
        parts = {name: tensor[start:stop].clone() for name, tensor in WHOLE.items() if tensor.ndim}
        rows = dict.fromkeys(parts, (start, 7))
        paths.append(directory / f"{ranks}-{rank}.safetensors")
        save_tensors(parts | ({"step": WHOLE["step"]} if rank == 0 else {}), paths[-1], rows)
    return paths


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 9])
def test_any_rows_are_read_from_any_parts(ranks: int, tmp_path: Path) -> None:
    files = TensorFiles(write_parts(tmp_path, ranks)[::-1])
    assert files.kinds == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in WHOLE.items()}
    for name, tensor in WHOLE.items():
        assert files.read(name).equal(tensor)
        for start in range(8 if tensor.ndim else 0):
            for stop in range(start, 8):
                assert files.read(name, (start, stop)).equal(tensor[start:stop])


def test_rows_that_are_missing_or_there_twice_are_refused(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path, 3)
    for paths in ([first, third], [second, third], [first, second, second, third]):
        expect_error(["has not all rows of", "once"], lambda paths=paths: TensorFiles(paths))  # type: ignore[misc]
    second.write_bytes(second.read_bytes()[:100])
    expect_error([f"{second} cannot be loaded"], lambda: TensorFiles([first, second, third]))


def test_a_single_writer_has_everything_and_meets_its_own_errors() -> None:
    writers = Writers()
    assert writers.all_do(lambda: 7) == [7]
    assert writers.to_first(WHOLE, {}) is WHOLE
    with pytest.raises(ZeroDivisionError):
        writers.all_do(lambda: 1 // 0)
