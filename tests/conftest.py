"""Fixtures for all tests: state that libraries keep, and texts and runs that several folders look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """accelerate as it is in a new process, before and after."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def accelerator(accelerate_state: None) -> Any:
    """One rank on the CPU."""
    from tests.support.gradients import make_accelerator

    return make_accelerator()
