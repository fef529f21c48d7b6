"""A `Run` for tests that call a part of the recipe, without the process of a training."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from recipe.config.settings import Config
from recipe.plan.budget import UpdatePlan
from recipe.plan.phases import Phase
from recipe.plan.run_plan import make_plan
from recipe.run.console import Console
from recipe.run.ledger import Ledger
from recipe.run.run import Run
from recipe.run.stop import KEPT_GROUPS, StopRequest


def stand_in(rank: int = 0, ranks: int = 1) -> Any:
    """In place of an Accelerator if nothing is computed with it."""
    return SimpleNamespace(
        process_index=rank, num_processes=ranks, is_main_process=rank == 0, device=torch.device("cpu")
    )


def make_run(config: Config, accelerator: Any = None, update: UpdatePlan | None = None) -> Run:
    """A run of `config` on the ranks of `accelerator`, which neither prints nor has taken a signal; writes nothing yet.

    Args:
        config: the settings.
        accelerator: None: a stand-in for one rank.
        update: how an update is split, if not as `config` says.
    """
    accelerator = accelerator or stand_in()
    if torch.distributed.is_initialized():
        KEPT_GROUPS.append(torch.distributed.group.WORLD)
    plan = make_plan(config, accelerator.num_processes)
    if update is not None:
        plan = replace(plan, phases=(Phase(1, 0, update),))
    console = Console(False, plan.planned_updates)
    ledger = Ledger(config, accelerator, console.say)
    return Run(config, plan, accelerator, "fp32", StopRequest(), console, ledger)
