"""The run: a record of what exists once, given first to whatever works on it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from recipe.config.settings import Config, flat_settings
from recipe.errors import RecipeError
from recipe.format import aligned
from recipe.plan.memory import largest_micro_batch
from recipe.plan.run_plan import RunPlan, make_plan, world_size_of_launcher
from recipe.run.alike import check_alike
from recipe.run.console import Console
from recipe.run.environment import available_bytes, choose_precision, device_type, installation, start_accelerator
from recipe.run.launch import check_launch, ignored_settings, stop_with_launcher, with_sharding_of_launch
from recipe.run.ledger import Ledger
from recipe.run.stop import StopRequest
from recipe.run.trackers import check_trackers
from recipe.run.watch import Watch
from recipe.streams import Unbreakable

Result = TypeVar("Result")


@dataclass
class Run:
    """What exists once on each rank. No loop, no hooks."""

    config: Config  # the settings
    # What follows from them, replaced when the micro-batch changes
    plan: RunPlan
    accelerator: Any  # accelerate's
    precision: str  # `bf16` or `fp32`, in use
    stop: StopRequest  # through which ranks agree to stop
    console: Console  # what a person sees
    ledger: Ledger  # what is written of each update, and of everything else that happens
    kernels: dict[str, Any] = field(default_factory=dict)  # which ones compute the model, for the start event
    text: str = ""  # what was opened, on rank 0, for the start event
    text_record: str = ""  # which text it reads, for its checkpoints
    branched_from: dict[str, Any] | None = None  # of a branch, for its checkpoints: where it left another run
    noise: Any = None  # measures the gradients of micro-batches (`recipe.step.noise`), if `log` says so
    lock: Any = None  # holds the run directory until the process ends

    @property
    def directory(self) -> Path:
        """Where the run is written."""
        return Path(self.config.run.directory)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the parameters, and not all of them each."""
        return self.config.performance.sharding != "none" and int(self.accelerator.num_processes) > 1

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> Any:
        """The torch device of this rank."""
        return self.accelerator.device

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Do something on rank 0 and give its result, or its error, to all ranks, so that none is left waiting. Collective."""
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except RecipeError as error:
                error.is_on_all_ranks = True
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather_on_main(self, tensor: Any) -> Any:
        """A tensor of each rank on rank 0, [ranks, ...]; on the others their own, [1, ...]. Collective."""
        import torch

        if self.accelerator.num_processes == 1:
            return tensor[None]
        of_ranks = [torch.empty_like(tensor) for _ in range(self.accelerator.num_processes)] if self.is_main else None
        torch.distributed.gather(tensor, of_ranks, dst=0)
        return torch.stack(of_ranks) if of_ranks else tensor[None]


def start_run(config: Config) -> Run:
    """Start accelerate, take signals as requests to stop, and print the plan. Writes nothing.

    Raises:
        RecipeError: a launch, a precision, a budget or a tracker that cannot work.
    """
    sys.stdout = Unbreakable(sys.stdout)
    check_launch()
    config = with_sharding_of_launch(config)
    stop = StopRequest()
    stop.listen()
    stop.prepare()
    stop_with_launcher()
    plan = make_plan(config, world_size_of_launcher())
    precision, reason = choose_precision(config.precision, device_type())
    watch = Watch(config.run.meet_seconds)
    watch.meet()
    accelerator = start_accelerator(precision)
    stop.connect(accelerator.num_processes)
    watch.formed()
    settings = {name: value for name, value in flat_settings(config).items() if name != "data.cache_directory"}
    check_alike(lambda: {"settings": settings, **installation()})
    if plan.micro_batch_is_auto:
        plan = resolve_auto_micro_batch(config, accelerator, precision)
    console = Console(accelerator.is_main_process, plan.planned_updates, plan.tokens_after)
    console.section("plan", aligned([*plan.rows(), ("precision", f"{precision}: {reason}")]))
    for line in ignored_settings(precision):
        console.say(line)
    run = Run(config, plan, accelerator, precision, stop, console, Ledger(config, accelerator, console.say))
    run.on_main(lambda: check_trackers(config))
    return run


def resolve_auto_micro_batch(config: Config, accelerator: Any, precision: str) -> RunPlan:
    """The plan with the micro-batch that should fit into the smallest memory of any rank. Collective.

    Raises:
        RecipeError: not even one block fits.
    """
    import torch

    ranks, device = accelerator.num_processes, accelerator.device
    memory = torch.tensor([available_bytes(device)], device=device)
    smallest = int(accelerator.gather(memory).min())
    return make_plan(config, ranks, largest_micro_batch(config, ranks, smallest, device.type, precision))
