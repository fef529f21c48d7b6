"""A Hub on this machine for every test that needs one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import HubServer


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server that this process, and those it starts, take for the Hub."""
    with HubServer() as server:
        server.lead(monkeypatch, tmp_path / "home")
        yield server
