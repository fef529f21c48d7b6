"""A checkpoint: a plain Hugging Face model directory, `training/`, and a manifest that is written last.

```
step-000500/  model.safetensors config.json tokenizer.json ...   <- from_pretrained(dir) just works
              training/*.safetensors training/state.json         <- optimizer, and where the run is
              manifest.json                                      <- size and sha256 of every file above
```

Written into a temporary directory, synced, renamed; only then is an older one pruned. No pickle is written or read.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from recipe.checkpoint.parts import Rows, TensorFiles, Writers, save_tensors
from recipe.data.lanes import Position
from recipe.errors import RecipeError
from recipe.model.export import load_weights, write_model
from recipe.model.sharding import local, rows_of
from recipe.plan.schedule import crosses
from recipe.run.directory import FORMAT, list_checkpoints
from recipe.run.files import new_directory, sha256_of, sync
from recipe.run.noise_scale import Smoothed

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
STATE = "training/state.json"
OPTIMIZER = "training/optimizer.safetensors"  # or a file for each rank that holds a part, optimizer-00001-of-00008
BRANCH_FACTS = {"checkpoint", "update", "tokens", "blocks_sha256", "changes"}
LARGEST_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class TrainingState:
    """Where a run is. Everything else follows from it."""

    update: int  # updates done
    tokens: int  # target tokens seen
    config: dict[str, Any]  # dotted name -> value of every setting
    blocks_sha256: str  # hash of the blocks of that last update
    # State of every lane before that last update, in lane order; owned by no rank. Reading its blocks again leads
    # exactly to the next update, and their hash proves that the data is what it was
    lane_states: list[dict[str, Any]]
    # Mean loss of lane 0's first targets of that last update, with the weights of this checkpoint
    verification_loss: float
    # Blocks of every lane that rollbacks have left out (see `recipe.data.lanes.Ranges`)
    skipped_blocks: list[list[int]] = field(default_factory=list)
    # [loss, gradient norm] of the updates that a spike is compared with
    recent: list[list[float]] = field(default_factory=list)
    # Of the gradient noise scale (see `recipe.run.noise_scale.Smoothed`); none if it is not measured yet
    noise: list[float] = field(default_factory=list)
    # Which text it is (see `recipe.data.record`); of earlier versions nothing is known
    text: str = ""
    # Of a branch: checkpoint, update and tokens at which it left another run, and the settings that changed
    branched_from: dict[str, Any] | None = None
    format: int = FORMAT  # version of this layout


@dataclass(frozen=True)
class Snapshot:
    """Copies on the CPU of what training goes on changing, as far as this rank holds it: name -> tensor."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rows: Rows = field(default_factory=dict)  # of those that are cut
    writers: Writers = field(default_factory=Writers)  # who hold the whole between them


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, before: Snapshot | None = None) -> Snapshot:
    """Copy this rank's weights of an unwrapped `CausalLanguageModel` and its optimizer's state to the CPU.

    `before` is an earlier snapshot to overwrite: memory that is new to the process costs more time than the copy.
    """
    gpt2: Any = model.gpt2
    old = before or Snapshot({}, {})
    weights, state = dict(gpt2.named_parameters()), _optimizer_tensors(model, optimizer)
    rows = {name: part for name, tensor in (weights | state).items() if (part := rows_of(tensor))}
    return replace(old, model=_copy(weights, old.model), optimizer=_copy(state, old.optimizer), rows=rows)


def write_checkpoint(root: Path, snapshot: Snapshot, state: TrainingState, gpt2_config: Any, tokenizer: Any) -> Path:
    """Write `root/step-N`, whole or not at all. Each of the snapshot's writers calls it.

    Raises:
        OSError: the disk of one of them is full, a permission is missing, ...; what was there before is untouched.
    """
    final, writers = root / f"step-{state.update:06d}", snapshot.writers
    with ExitStack() as until_renamed:

        def begin() -> Path | None:
            if not writers.is_first:
                return None
            place = until_renamed.enter_context(new_directory(final))
            (place / "training").mkdir()
            return place

        temporary = writers.all_do(begin)[0]
        assert temporary is not None
        weights = writers.to_first(snapshot.model, snapshot.rows)

        def write() -> dict[str, dict[str, Any]]:
            own = temporary / _optimizer_file(writers)
            parts = {n: tensor for n, tensor in snapshot.optimizer.items() if n in snapshot.rows or writers.is_first}
            save_tensors(parts, own, snapshot.rows)
            written = [own]
            if writers.is_first:
                weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: one tensor
                write_model(weights, gpt2_config, tokenizer, temporary)
                (temporary / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
                others = "training/optimizer*"
                written += [p for p in temporary.rglob("*") if p.is_file() and not p.match(others)]
            for path in written:
                sync(path)
            names = {path.relative_to(temporary).as_posix(): path for path in written}
            return {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in names.items()}

        files = {name: found for of_writer in writers.all_do(write) for name, found in of_writer.items()}
        if writers.is_first:
            manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (temporary / MANIFEST, temporary / "training", temporary):
                sync(path)
    sync(root)
    return final


def _optimizer_file(writers: Writers) -> str:
    return (
        OPTIMIZER
        if writers.count == 1
        else f"training/optimizer-{writers.rank + 1:05d}-of-{writers.count:05d}.safetensors"
    )


def optimizer_files(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files with the optimizer's state, by a checkpoint's manifest."""
    return [name for name in manifest["files"] if PurePath(name).match("training/optimizer*.safetensors")]


def read_state(directory: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        ValueError: it is none.
    """
    values = read_json(directory / STATE)
    try:
        # of a version in which all updates had one size
        if isinstance(values, dict) and values.pop("skipped_batches", None):
            raise ValueError("it says in another unit than this version what rollbacks have left out")
        state = TrainingState(**values)
        counts = [state.update, state.tokens]
        counts += [count for start, stop in state.skipped_blocks for count in (start, stop)]
        numbers = [state.verification_loss, *state.noise, *(number for pair in state.recent for number in pair)]
        for lane in state.lane_states:
            position = Position.of(lane)
            counts += [position.token, position.window, position.block, *position.source_tokens]
            counts += [count for stream in position.streams for count in (stream.epoch, stream.shard)]
            numbers += position.weights
        fits = (
            all(type(count) is int and count >= 0 for count in counts)
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and all(len(pair) == 2 for pair in state.recent)
            and len(state.noise) in (0, len(fields(Smoothed)))
            and (type(state.config), type(state.blocks_sha256)) == (dict, str)
            and (state.branched_from is None or state.branched_from.keys() >= BRANCH_FACTS)
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(error) from None
    if not fits:
        raise ValueError("a value is not of its kind")
    return state


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a verified checkpoint into an unwrapped `CausalLanguageModel` and its optimizer, in place, bit for bit.

    Raises:
        RecipeError: other tensors than this model and optimizer have.
    """
    try:
        weights, manifest = load_file(directory / WEIGHTS), read_json(directory / MANIFEST)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{directory} cannot be loaded: {error}") from None
    load_weights(model.gpt2, weights, str(directory))
    saved = TensorFiles([directory / name for name in optimizer_files(manifest)])
    if not saved.kinds:  # the optimizer has no state, or had not stepped yet
        optimizer.state.clear()
        return
    everything: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
    expected = {(name, f"{tensor.dtype} {tuple(tensor.shape)}") for name, tensor in tensors.items()}
    found = {(name, f"{dtype} {shape}") for name, (dtype, shape) in saved.kinds.items()}
    if found != expected:
        name, kind = min(found ^ expected)
        raise RecipeError(f"{directory} does not fit this optimizer: one of them has no {name}, {kind}")
    for name, tensor in tensors.items():  # in place: a second state would not fit everywhere
        part, own = rows_of(tensor), local(tensor)
        own.copy_(saved.read(name, (part[0], part[0] + len(own)) if part else None))
    set_optimizer_state_dict(model, optimizer, everything, options=_FLAT)


def prune(root: Path, keep: int, keep_every_tokens: int | None, tokens_after: Callable[[int], int]) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every_tokens`.

    Returns: the removed.
    """
    removed = []
    for path in list_checkpoints(root)[max(keep, 1) :]:
        update = int(path.name.removeprefix("step-"))
        before, after = tokens_after(update - 1), tokens_after(update)
        if keep_every_tokens is None or not crosses(before, after, keep_every_tokens):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state's tensors by flat name; what is no tensor (rates, betas) is configuration. SGD has none.

    Without state yet, torch would make one by a step of its own, on this rank alone.
    """
    if not optimizer.state:
        return {}
    everything: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {name: value for name, value in everything.items() if isinstance(value, Tensor)}


def _copy(tensors: dict[str, Tensor], memory: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: local(tensor.detach()) for name, tensor in tensors.items()}
    return {
        name: (memory[name] if name in memory else torch.empty_like(part, device="cpu")).copy_(part)
        for name, part in parts.items()
    }


def read_json(path: Path) -> Any:
    """The value of a file; ValueError if it has none, or one that JSON does not have."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
