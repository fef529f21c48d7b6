"""Tensors in safetensors files, whole or in rows: a rank writes the rows that it holds, and any number reads what it needs.

What is cut is said in each file's metadata, so that no file has to be read to know what is in another.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipe.errors import RecipeError
from recipe.run.files import where_supported
from recipe.run.stop import KEPT_GROUPS

ROWS = "rows"  # of a file's metadata, as JSON: name -> [first row in this file, rows of the whole tensor]
Rows = dict[str, tuple[int, int]]
Result = TypeVar("Result")


class Writers:
    """The ranks whose parts are the whole, and a group for their threads, so that none of their collectives meets another's.

    Args:
        rank: this one.
        count: the first so many ranks write; 1 if each has everything.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self._group = rank, count, None
        if count > 1:
            self._group = torch.distributed.new_group(list(range(count)), backend="gloo")
            KEPT_GROUPS.append(self._group)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what there is once."""
        return self.rank == 0

    def all_do(self, action: Callable[[], Result]) -> list[Result]:
        """Each writer does its part; what all of them got. Collective.

        Raises:
            OSError: an error of one of them; on all of them.
        """
        if self.count == 1:
            return [action()]
        outcome: tuple[Result | None, str]
        try:
            outcome = action(), ""
        except Exception as error:  # whatever it is, the others wait for this rank
            outcome = None, f"rank {self.rank}: {getattr(error, 'strerror', None) or error}"
        outcomes: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(outcomes, outcome, group=self._group)
        if failures := [failure for _, failure in outcomes if failure]:
            raise OSError("; ".join(failures))
        return [result for result, _ in outcomes]

    def to_first(self, tensors: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """All rows of tensors on the CPU, of which each writer has some, on the first writer; the others' own. Collective."""
        if self.count == 1:
            return tensors
        starts = self.all_do(lambda: rows)
        whole = {}
        for name, own in tensors.items():
            if not self.is_first:
                if len(own) and name in rows:
                    torch.distributed.send(own, 0, group=self._group)
                continue
            if name not in rows:
                whole[name] = own
                continue
            all_of_it = own.new_empty(rows[name][1], *own.shape[1:])
            all_of_it[: len(own)] = own
            bounds = [*(of_rank[name][0] for of_rank in starts), rows[name][1]]
            for source in range(1, self.count):
                if bounds[source] < bounds[source + 1]:
                    torch.distributed.recv(all_of_it[bounds[source] : bounds[source + 1]], source, group=self._group)
            whole[name] = all_of_it
        return whole if self.is_first else tensors


def save_tensors(tensors: dict[str, Tensor], path: Path, rows: Rows | None = None) -> None:
    """A plain safetensors file: torch's writer of this format copies everything twice, which takes ten times as long."""
    save_file(tensors, path, {ROWS: json.dumps(rows)} if rows else None)
    with where_supported():
        path.chmod(0o666 & path.parent.stat().st_mode)  # the library makes it private


class TensorFiles:
    """What one or several files have, by name, with all their rows together.

    Raises:
        RecipeError: one cannot be read, or rows are missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # first row, and the open file
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for path in paths:
            try:
                self._add(safe_open(path, "pt"))
            except (OSError, SafetensorError, ValueError, TypeError) as error:
                raise RecipeError(f"{path} cannot be loaded: {error}") from None
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            shapes = [file.get_slice(name).get_shape() for _, file in pieces]
            ends = [0, *(start + shape[0] for (start, _), shape in zip(pieces, shapes, strict=True) if shape)]
            if shapes[0] and ends != [*(start for start, _ in pieces), self.kinds[name][1][0]]:
                raise RecipeError(f"{paths[0].parent} has not all rows of {name} once")

    def _add(self, file: Any) -> None:
        cut = json.loads((file.metadata() or {}).get(ROWS, "{}"))
        for name in file.keys():  # noqa: SIM118  # a handle, not a dict
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            start, count = cut.get(name, (0, shape[0] if shape else 0))
            self._pieces.setdefault(name, []).append((start, file))
            self.kinds[name] = DTYPES[part.get_dtype()], (count, *shape[1:]) if shape else ()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or of its rows those from a first one up to, and without, a last one."""
        dtype, shape = self.kinds[name]
        if rows is None:
            parts = [file.get_tensor(name) for _, file in self._pieces[name]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        parts = [torch.empty(0, *shape[1:], dtype=dtype)]
        for start, file in self._pieces[name]:
            part = file.get_slice(name)
            low, high = max(rows[0] - start, 0), min(rows[1] - start, part.get_shape()[0])
            if low < high:
                parts.append(part[low:high])
        return torch.cat(parts)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
