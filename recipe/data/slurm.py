"""A job array in Slurm's queue."""

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_LOOK_SECONDS = 1.0


@dataclass
class JobArray:
    """One that is known by its name; `say` is told how many tasks wait and run, when that has changed."""

    name: str
    say: Callable[[str], None]
    _said: str = field(default="", init=False)

    def tasks(self) -> set[int] | None:
        """The tasks that have not ended. None: Slurm gives no answer."""
        command = ["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%K %T"]
        listed = subprocess.run(command, capture_output=True, text=True)
        if listed.returncode:
            return None
        states = dict(map(str.split, listed.stdout.splitlines()))
        line = ", ".join(f"{count} {state.lower()}" for state, count in sorted(Counter(states.values()).items()))
        if line not in ("", self._said):
            self._said = line
            self.say(f"Slurm's job {self.name}: {line}")
        return set(map(int, states))

    def cancel(self) -> None:
        """Cancel what is left of it, and wait until that has ended."""
        subprocess.run(["scancel", f"--name={self.name}"], capture_output=True)
        while self.tasks():
            time.sleep(_LOOK_SECONDS)
