"""Print every derived number of a run before it starts: `python -m recipe plan ...`. Imports no torch."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from recipe.config.command_line import make_parser, parse_run
from recipe.config.settings import Above, AtLeast, AtMost, Config, MixtureSource
from recipe.config.text_files import FLAT, expand_files, is_remote, token_file_format
from recipe.format import Number, aligned
from recipe.plan import run_plan
from recipe.plan.batch_advice import batch_numbers
from recipe.plan.devices import Device, Machine, device_rows, find_device
from recipe.plan.memory import largest_micro_batch
from recipe.plan.optimizer_memory import optimizer_numbers
from recipe.plan.scaling import parallel_numbers, scaling_numbers

Table = dict[str, list[Number]]  # heading of a column -> its numbers; the only column has none


@dataclass(frozen=True)
class PlanConfig(Config):
    """The settings of a run, and the devices to plan it for."""

    world_size: Annotated[int | None, AtLeast(1), AtMost(2**16)] = None
    """Ranks, one device each. Null: WORLD_SIZE, or 1."""
    device: str | None = None
    """h100, a100, ..., cpu: its memory and its peak; help: list them. Null: no limit and no time."""
    memory_gb: Annotated[float | None, Above(0), AtMost(10**9)] = None
    """Memory of a device, 10^9 bytes. Null: that of the device; for cpu, a rank's share of this machine's."""
    mfu: Annotated[float, AtLeast(1e-4), AtMost(1, "a share of the peak; 0.4 is 40 %")] = 0.4
    """Share of the peak that the model's own arithmetic uses: an assumption until the run's ledger has it."""
    flops: Annotated[float | None, AtLeast(10**6), AtMost(10**24)] = None
    """Peak FLOP/s of a device. Null: that of the device in bf16."""
    link_gb_per_second: Annotated[float | None, Above(0), AtMost(10**6)] = None
    """Bandwidth between ranks in one direction, 10^9 bytes a second: nccl-tests' bus bandwidth of all ranks. Null: 0.8 of
    NVLink's; beyond 8 ranks, for H100, H200, B200 and A100, 0.8 of what eight network adapters of 50 have (A100: 25)."""
    price_per_hour: Annotated[float | None, AtLeast(0), AtMost(10**9)] = None
    """Price of a device for an hour."""


def main() -> None:
    """The command."""
    print(planned(sys.argv[1:]))


def planned(arguments: Sequence[str]) -> str:
    """What `python -m recipe plan ARGUMENTS` prints; with `--device help`, or nothing behind it, the devices alone.

    Raises:
        RecipeError: settings that cannot be used, an unknown device, or one that is too small for one block.
    """
    parser = make_parser(PlanConfig, "python -m recipe plan", "Print every derived number of a run before it starts.")
    parser.add_argument("--json", action="store_true", help="Print the same numbers as JSON, each with its derivation.")
    if arguments[-1:] == ["--device"]:
        arguments = [*arguments, "help"]
    config, rest = parse_run(parser, PlanConfig, arguments)
    if config.device == "help":
        return aligned(device_rows())
    tables = plan_tables(config)
    if rest["json"]:
        return json.dumps({title: as_dictionary(table) for title, table in tables.items()}, indent=2)
    return "\n\n".join(f"{title.replace('_', ' ')}\n{as_text(table)}" for title, table in tables.items())


def plan_tables(config: PlanConfig) -> dict[str, Table]:
    """The division of an update, the memory of a rank, and the run on the device."""
    world_size = config.world_size or run_plan.world_size_of_launcher()
    device = None if config.device is None else find_device(config.device)
    device_type, memory_bytes = device.type if device else "cuda", _memory_bytes(config, device, world_size)
    precision = run_plan.planned_precision(config, device_type)
    largest = None
    if memory_bytes is not None:
        largest = largest_micro_batch(config, world_size, memory_bytes, device_type, precision)
    plan = run_plan.make_plan(config, world_size, largest)
    masked = max(phase.update.masked_micro_batches for phase in plan.phases)
    padding = f"{{}}; {masked:,} masked blocks, for ranks with fewer blocks than steps" if masked else "{}"
    *division, state = plan.numbers()
    division += [Number("planned_updates", plan.planned_updates, "updates")]
    division += [Number("padding_tokens", 0, "tokens", padding), *parallel_numbers(plan)]
    configs = {config.optimizer.state: config}
    if precision == "bf16" and config.optimizer.name == "adamw" and config.performance.sharding == "none":
        other: Literal["fp32", "bf16"] = "fp32" if config.optimizer.state == "bf16" else "bf16"
        configs[other] = replace(config, optimizer=replace(config.optimizer, state=other))
    data = (
        {"data": {"": source_numbers(config, plan.total_tokens)}}
        if config.data.sources or config.data.token_files
        else {}
    )
    flops = config.flops or (device.bf16_flops if device and precision == "bf16" else None)
    link = config.link_gb_per_second and config.link_gb_per_second * 1e9
    machine = Machine(device, flops and flops * config.mfu, link)
    scaling = scaling_numbers(config, plan, machine, memory_bytes)
    return {
        "plan": {"": division},
        **data,
        "batch": {"": batch_numbers(config, plan, machine)},
        **({"optimizer_memory": {"": memory}} if (memory := optimizer_numbers(config, plan)) else {}),
        "memory_of_a_rank": {
            f"{name}_state": run_plan.memory_numbers(of, plan.update, device_type, memory_bytes)
            for name, of in configs.items()
        },
        "classic_table": {"": [run_plan.classic_number(plan.parameters), state]},
        "run": {"": run_plan.time_numbers(plan, flops, config.mfu, config.price_per_hour)},
        **({"scaling_model": {"": scaling}} if scaling else {}),
    }


def source_numbers(config: Config, total_tokens: int) -> list[Number]:
    """Tokens of the run from each source, and the passes over those whose files say how many they have.

    Raises:
        RecipeError: files of token ids that cannot be read.
    """
    weights = math.fsum(source.weight for source in config.data.mixture)
    numbers = []
    for source in config.data.mixture:
        tokens, known = round(total_tokens * source.weight / weights), _known_tokens(source)
        passes = "" if known is None else f", {tokens / known:,.2f} passes over its {known:,}"
        text = f"{source.weight / weights:.4g} x {total_tokens:,} = {{}}{passes}"
        numbers.append(Number(source.label, tokens, "tokens", text))
    return numbers


def _known_tokens(source: MixtureSource) -> int | None:
    """How many tokens its flat files have to train on; None: to know that takes longer than a plan may."""
    if not source.token_files or any(map(is_remote, source.token_files)):
        return None
    paths = expand_files(source).paths
    if token_file_format(paths[0]) != FLAT:
        return None
    from recipe.data.token_formats import find_token_files, is_validation_file

    training = [path for path in paths if not is_validation_file(path)]
    return sum(file.tokens for file in find_token_files(training or paths, source.token_dtype))


def _memory_bytes(config: PlanConfig, device: Device | None, world_size: int) -> float | None:
    """Memory of a rank; None if no device is given."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    if device is None or device.memory_bytes is not None:
        return device.memory_bytes if device else None
    import psutil

    return psutil.virtual_memory().total / world_size


def as_text(table: Table) -> str:
    """Names, values and derivations; with several columns, the derivations of the first. Rows of zeros are left out."""
    if "" in table:
        return aligned([(number.name, str(number)) for number in table[""] if number.is_shown])
    rows = [
        (row[0].name, *(n.shown for n in row), row[0].derivation)
        for row in zip(*table.values(), strict=True)
        if any(n.value != 0 for n in row)
    ]
    return aligned([("", *(heading.replace("_", " ") for heading in table), ""), *rows])


def as_dictionary(table: Table) -> dict[str, Any]:
    """The same for JSON."""
    columns: dict[str, Any] = {}
    for heading, numbers in table.items():
        columns[heading] = {n.key: {"value": n.value, "unit": n.unit, "derivation": str(n)} for n in numbers}
    return columns.get("", columns)
