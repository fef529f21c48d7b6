"""What has to be the same on all ranks, compared once: where hosts differ, a run would be another without a word."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any

from recipe.errors import RecipeError


def check_alike(look: Callable[[], Mapping[str, Any]]) -> None:
    """Compare the JSON values that `look` gives with those of rank 0; None is not compared. Collective.

    One rank alone does not look.

    Raises:
        RecipeError: on all ranks: what differs first, and on which host.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if PartialState().num_processes == 1:
        return
    facts = look()
    first, *others = gather_object([{name: _digest(value) for name, value in facts.items()}])
    name = next((name for name in facts if any(of[name] not in (None, first[name]) for of in others)), None)
    if name is None:
        return
    (here, expected), *elsewhere = gather_object([(platform.node(), facts[name])])
    for rank, (host, found) in enumerate(elsewhere, start=1):
        if found is None or found == expected:
            continue
        if isinstance(found, dict) and isinstance(expected, dict):
            name = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
            expected, found = expected.get(name), found.get(name)
        error = RecipeError(
            f"{name} on rank {rank} (host {host}): {_shown(found)}; on rank 0 (host {here}): {_shown(expected)}; it has to be "
            "the same on all hosts"
        )
        error.is_on_all_ranks = True
        raise error


def _shown(value: Any) -> str:
    return "none" if value is None else "all there" if isinstance(value, dict) else f"{value!s:.200}"


def _digest(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
