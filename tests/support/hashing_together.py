"""Which files of a checkpoint each rank reads: `python -m tests.support.hashing_together CHECKPOINT RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object

import recipe.checkpoint.verify
from recipe.checkpoint.verify import hash_together, why_invalid
from recipe.config.settings import Config
from recipe.errors import run_command
from recipe.run.files import sha256_of
from tests.support.gradients import make_accelerator
from tests.support.runs import make_run


def main() -> None:
    accelerator, read = make_accelerator(), list[str]()
    checkpoint = Path(sys.argv[1])

    def noted(path: Path) -> str:
        read.append(path.relative_to(checkpoint).as_posix())
        return sha256_of(path)

    recipe.checkpoint.verify.sha256_of = noted
    hashes = hash_together(make_run(Config(), accelerator), checkpoint)
    of_ranks = gather_object([[*read]])
    if accelerator.is_main_process:
        read.clear()
        values = {"of_ranks": of_ranks, "why_invalid": why_invalid(checkpoint, hashes), "again": read}
        Path(sys.argv[2]).write_text(json.dumps(values), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
