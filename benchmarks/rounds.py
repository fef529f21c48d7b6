"""The order in which what is compared takes turns. It imports nothing that would count as memory of a peer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def in_turn(items: Iterable[Item], number: int) -> list[Item]:
    """The same items in another order each round: from the one of this number on, and around."""
    whole = list(items)
    first = number % len(whole)
    return whole[first:] + whole[:first]
