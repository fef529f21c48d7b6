"""Ranks meet when a run starts, or say who is missing; and on several hosts they notice when a host is gone.

Without this, ranks wait for one that never comes as long as for a slow one, half an hour; and where a cable is pulled, both
sides wait for as long as TCP tries again. All of it goes through the store on rank 0's host, by which torch forms its group.
"""

import os
import platform
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from recipe.errors import RecipeError
from recipe.text import one_line

BEAT_SECONDS = 5.0
LOST_SECONDS = 60.0  # without a word from a host
LOST_EXIT_CODE = 1
_FAILED, _DONE = "recipe/failed", "done"


class Watch:
    """What a rank knows of the others, apart from collectives.

    Args:
        meet_seconds: that the ranks have to come together.
    """

    def __init__(self, meet_seconds: float) -> None:
        self.meet_seconds = meet_seconds
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.of_host = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks)))
        self._store: Any = None
        self._has_formed, self._last_word = False, time.monotonic()
        self._leaving = threading.Event()

    def meet(self) -> None:
        """Wait until all ranks are there. Collective.

        Raises:
            RecipeError: they are not, in time.
        """
        if self.ranks == 1:
            return
        from torch.distributed import TCPStore

        limit, (host, port) = (
            timedelta(seconds=self.meet_seconds),
            (os.environ[f"MASTER_{n}"] for n in ("ADDR", "PORT")),
        )
        is_server = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(
            True
        )  # as torch decides it
        try:
            self._store = TCPStore(
                host, int(port), self.ranks, is_server, limit, wait_for_workers=False, multi_tenant=True
            )
            self._store.set(f"recipe/here/{self.rank}", platform.node())
            if self._store.add("recipe/arrived", 1) == self.ranks:
                self._store.set("recipe/all", "here")
            self._store.wait(["recipe/all"], limit)
        except (RuntimeError, ValueError) as error:
            what = self._what_is_wrong(f"{host}:{port}")
            # As a host that is lost: again, perhaps when the last one is up, may be better
            advice = self._advice(error)
            raise RecipeError(f"{what}: {advice}", on_this_rank_only=True, exit_code=LOST_EXIT_CODE) from error
        if self.of_host < self.ranks:
            self._store.set_timeout(timedelta(seconds=LOST_SECONDS))
            threading._register_atexit(self._leave)  # type: ignore[attr-defined]  # before `run_command` leaves
            for work in (self._talk, self._guard):
                threading.Thread(target=work, name="watch", daemon=True).start()

    def formed(self) -> None:
        """The ranks can reach each other: from here on one that ends is noticed by its connections."""
        self._has_formed = True

    def _what_is_wrong(self, address: str) -> str:
        if self._store is None and self.rank:
            return f"rank 0 is not reached at {address} within {self.meet_seconds:g} s"
        if self._store is None:
            return f"rank 0 cannot listen at {address}"
        try:
            missing = [rank for rank in range(self.ranks) if not self._store.check([f"recipe/here/{rank}"])]
        except RuntimeError:
            return "rank 0 has ended; its message says why"
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return f"after {self.meet_seconds:g} s {len(missing)} of {self.ranks} ranks are missing ({shown})"

    def _advice(self, error: Exception) -> str:
        if "in use" in str(error):
            return "another process has this port: choose another --main_process_port, --master_port or MASTER_PORT"
        return (
            "start the same command on every machine, with the address of rank 0's, or set a longer --run.meet_seconds "
            f"({one_line(str(error))[:160]})"
        )

    def _talk(self) -> None:
        """Tell the store that this host is there, and look for what others have told it."""
        host, hosts, beats = self.rank // self.of_host, self.ranks // self.of_host, 0
        seen = {other: ("", time.monotonic()) for other in range(1, hosts)} if self.rank == 0 else {}
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                # Asked for the answer too: what is set goes into the socket, cable or not
                if self._store.check([_FAILED]) and not self._has_formed:
                    self._end("another rank cannot start; its message says why")
                if self.rank % self.of_host == 0:
                    self._store.set(f"recipe/beat/{host}", str(beats := beats + 1))
                for other, (before, when) in seen.items():
                    key = f"recipe/beat/{other}"
                    now = self._store.get(key).decode() if self._store.check([key]) else ""
                    if now != before or now == _DONE:
                        seen[other] = now, time.monotonic()
                    elif time.monotonic() - when > LOST_SECONDS:
                        name = self._store.get(f"recipe/here/{other * self.of_host}").decode()
                        self._end(f"no word from host {name} for {LOST_SECONDS:g} s")
            except RuntimeError:  # the store is gone, or not reached: `_guard` counts
                continue
            self._last_word = time.monotonic()

    def _guard(self) -> None:
        """End this rank when `_talk` has not come through for too long: what it waits in may never return."""
        while not self._leaving.wait(1.0):
            if time.monotonic() - self._last_word > LOST_SECONDS:
                self._end(f"no word from rank 0's host for {LOST_SECONDS:g} s")

    def _end(self, why: str) -> None:
        if not self._leaving.is_set():
            line = f"error (rank {self.rank}): {why}; the same command goes on from the last checkpoint"
            print(line, file=sys.stderr, flush=True)
            os._exit(LOST_EXIT_CODE)

    def _leave(self) -> None:
        """This rank ends by itself: with its host's last word, or, before all had started, with theirs."""
        self._leaving.set()
        word = threading.Thread(target=self._say_last_word, name="watch", daemon=True)
        word.start()
        word.join(BEAT_SECONDS)  # the store may be gone

    def _say_last_word(self) -> None:
        with suppress(RuntimeError):
            if not self._has_formed:
                self._store.set(_FAILED, "1")
            elif self.rank % self.of_host == 0:
                self._store.set(f"recipe/beat/{self.rank // self.of_host}", _DONE)
