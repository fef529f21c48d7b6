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
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from recipe.data.lanes import Position
from recipe.errors import RecipeError
from recipe.model.export import load_weights, write_model
from recipe.plan.schedule import crosses
from recipe.run.directory import FORMAT, list_checkpoints
from recipe.run.files import new_directory, sha256_of, sync, where_supported
from recipe.run.noise_scale import Smoothed

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
STATE = "training/state.json"
OPTIMIZER = "training/optimizer.safetensors"
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
    """Copies of what training goes on changing: name -> tensor on the CPU."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, memory: Snapshot | None = None) -> Snapshot:
    """Copy the weights of an unwrapped `CausalLanguageModel` and its optimizer's state to the CPU.

    `memory` is an earlier snapshot to overwrite: memory that is new to the process costs more time than the copy.
    """
    gpt2: Any = model.gpt2
    old = memory or Snapshot({}, {})
    weights = _copy(dict(gpt2.named_parameters()), old.model)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: one tensor, copied once
    return Snapshot(weights, _copy(_optimizer_tensors(model, optimizer), old.optimizer))


def write_checkpoint(root: Path, snapshot: Snapshot, state: TrainingState, gpt2_config: Any, tokenizer: Any) -> Path:
    """Write `root/step-N`, whole or not at all.

    Raises:
        OSError: the disk is full, a permission is missing, ...; what was there before is untouched.
    """
    final = root / f"step-{state.update:06d}"
    with new_directory(final) as temporary:
        (temporary / "training").mkdir()
        write_model(snapshot.model, gpt2_config, tokenizer, temporary)
        _save_optimizer(snapshot.optimizer, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            sync(path)
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
        for path in (temporary / MANIFEST, temporary / "training", temporary):
            sync(path)
    sync(root)
    return final


def why_invalid(directory: Path) -> str | None:
    """None if every file is what the manifest says and the training state is one, else the reason."""
    if not os.path.lexists(directory / MANIFEST):
        return "it has no manifest, so it was never finished"
    try:
        manifest = _read_json(directory / MANIFEST)
        if manifest["format"] != FORMAT:
            return (
                f"its format is {manifest['format']!r:.50}, of another version of this recipe; this one reads {FORMAT}"
            )
        files = manifest["files"]
        for name, expected in files.items():
            path, parts = directory / name, PurePath(name)
            if parts.is_absolute() or ".." in parts.parts or not name.isprintable():
                return f"its manifest names {name!r}, which is not in it"
            if not path.is_file():  # a pipe would be waited for
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
        for name in (WEIGHTS, OPTIMIZER, STATE):
            if name not in files:
                return f"its manifest has no {name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    try:
        read_state(directory)
    except (OSError, ValueError) as error:
        return f"its training state cannot be used ({error})"
    return None


def read_state(directory: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        ValueError: it is none.
    """
    values = _read_json(directory / STATE)
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
        weights, saved = load_file(directory / WEIGHTS), load_file(directory / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{directory} cannot be loaded: {error}") from None
    load_weights(model.gpt2, weights, str(directory))
    if not saved:  # the optimizer has no state, or had not stepped yet
        optimizer.state.clear()
        return
    everything: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    found, expected = (
        {(name, f"{value.dtype} {tuple(value.shape)}") for name, value in tensors.items() if isinstance(value, Tensor)}
        for tensors in (saved, everything)
    )
    if found != expected:
        name, kind = min(found ^ expected)
        raise RecipeError(f"{directory} does not fit this optimizer: one of them has no {name}, {kind}")
    for name, tensor in saved.items():
        everything[name].copy_(tensor)  # in place: a second state would not fit everywhere
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
    return {
        name: (memory[name] if name in memory else torch.empty_like(tensor, device="cpu")).copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def _save_optimizer(tensors: dict[str, Tensor], path: Path) -> None:
    """A plain safetensors file: torch's writer of this format copies everything twice, which takes ten times as long."""
    save_file(tensors, path)
    with where_supported():
        path.chmod(0o666 & path.parent.stat().st_mode)  # the library makes it private


def _read_json(path: Path) -> Any:
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
