"""The configuration, as frozen dataclasses. Imports no torch.

The values here are what the `gpt2-*` presets share; a preset holds only what differs. Field docstrings are the text of
`--help`, so each says what the field means and in which unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

STANDARD_LIBRARY = "python-standard-library"
HELD_OUT = "held_out"  # the validation set of the held-out documents; no name in evaluation.sets
MOST_RETRY_SECONDS = 1200


@dataclass(frozen=True)
class RunConfig:
    """The run: where it is written, how long it goes, what chance it uses."""

    directory: str = "runs/default"
    """Directory of this run: config.yaml, ledger.jsonl, final/."""
    max_updates: int | None = None
    """Stop after this many updates; the schedules stay those of the whole run. Null: all of them."""
    seed: int = 1234
    """Seed of the initialisation, the document order and dropout."""
    parity_check: bool = False
    """Before training, compute the first update's gradient with two other micro-batch sizes and with the other scaling path,
    and refuse to go on if they differ. Costs four updates' arithmetic and two copies of the gradient."""


@dataclass(frozen=True)
class BatchConfig:
    """The update: its size in tokens is a promise, the rest is how it is cut up."""

    tokens_per_update: int = 524_288
    """Target tokens of one optimizer step, over all ranks. A whole number of blocks."""
    micro_batch_size: int | Literal["auto"] = 4
    """Blocks in one forward and backward, at most. A memory setting: the update does not depend on it. auto: as many as fit
    into the device, by the plan and a real step."""
    lanes: int = 64
    """Document streams the data is dealt into, fixed for the run; at least the number of ranks."""
    scaling: Literal["accumulate", "manual"] = "accumulate"
    """accumulate: accelerator.accumulate() and accelerator.backward(). manual: the reference path, scaled by hand."""


@dataclass(frozen=True)
class DataConfig:
    """The text: a Hub dataset, local files, or Python's own standard library."""

    dataset: str = "HuggingFaceFW/fineweb-edu:sample-10BT"
    """Hub dataset to stream, `user/name` or `user/name:configuration`, or `python-standard-library` for the interpreter's own
    .py files."""
    split: str = "train"
    """Split of the Hub dataset."""
    revision: str | None = None
    """Commit, branch or tag of the Hub dataset."""
    text_files: tuple[str, ...] = ()
    """Local files or globs, or http:// and https:// addresses, which are streamed (.txt: a document per file; .jsonl,
    .jsonl.gz, .jsonl.zst, .parquet: a document per row). When given they are used instead of `dataset`."""
    text_column: str = "text"
    """Column that holds the document."""
    sequence_length: int = 2048
    """Target tokens of a block."""
    tokenizer: str | None = "gpt2"
    """Hub name or local directory of a tokenizer. Null: that of model.init_from, or, where that is null too, train a
    byte-level BPE of model.vocab_size tokens on the text."""
    shuffle_window: int = 64
    """Documents that a lane shuffles among themselves; shards are shuffled too."""
    validation_one_in: int | None = 100
    """Hold out one document in this many, chosen by hash, for validation. Null: none."""
    retry_seconds: float = 600.0
    """How long streamed text that cannot be read is tried again, with growing pauses, before the run saves itself and stops. At
    most 1,200, since the other ranks wait for the one that tries."""
    cache_directory: str | None = None
    """Trained tokenizers and memory-mapped copies of files. Null: cache/ in the run directory."""

    @property
    def repository(self) -> str:
        """The name of the Hub dataset, without its configuration."""
        return self.dataset.partition(":")[0]

    @property
    def configuration(self) -> str | None:
        """The configuration of the Hub dataset; None: its default."""
        return self.dataset.partition(":")[2] or None


@dataclass(frozen=True)
class ModelConfig:
    """The GPT-2 shape. Everything that GPT2Config would otherwise choose for us is stated here."""

    init_from: str | None = None
    """Start from the weights of this GPT-2: a local directory or a Hub name. Its shape has to be the one stated here.
    Null: start from nothing."""
    n_layer: int = 12
    """Transformer blocks."""
    n_embd: int = 768
    """Width; the feed-forward layer is 4 times as wide."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_positions: int | None = None
    """Learned positions. Null: as many as data.sequence_length."""
    vocab_size: int = 50_304
    """Rows of the embedding: the tokenizer's tokens, padded to a multiple of 64 for speed. The padding has probability 0."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals."""
    activation_function: str = "gelu_pytorch_tanh"
    """The same function as GPT-2's gelu_new, in one fused kernel."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; residual projections get this / sqrt(2 n_layer)."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in layer normalisation."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer step."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter, 2019), or plain SGD, which hides no error in the gradient's scale."""
    state: Literal["fp32", "bf16"] = "fp32"
    """fp32: parameters, gradients and moments in float32, 16 bytes per parameter. lean: all of them in bf16, rounded
    stochastically (torchao), 8 bytes per parameter; adamw with precision bf16 only, and less exact."""
    learning_rate: float = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled for AdamW; on matrices and embeddings only."""
    max_grad_norm: float | None = 1.0
    """Clip the norm of the whole update's gradient to this. Null: do not clip."""


@dataclass(frozen=True)
class PerformanceConfig:
    """How the step is computed: speed and memory. The update stays the same, to rounding."""

    loss: Literal["auto", "plain", "chunked", "linear_cross_entropy", "liger"] = "auto"
    """plain: all logits of a micro-batch at once. chunked: some rows at a time, computed again in backward.
    linear_cross_entropy: torch's, some rows at a time, whose gradient is computed in forward; for fp32. liger: Liger's kernel,
    for CUDA. auto: what was measured to be the fastest of those that hold no logits."""
    matmul: Literal["auto", "torch", "onednn"] = "auto"
    """Library of the linear layers' matrix products: torch's own choice, or on a CPU in float32 oneDNN. auto: oneDNN where the
    CPU has AVX-512, unless the model is compiled."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of scaled_dot_product_attention; one that the device has not is an error. auto: torch chooses."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model with torch.compile, in place: at most two graphs, one for each size of micro-batch. auto: on CUDA with
    Triton, and not on a CPU."""
    activation_checkpointing: int | None = None
    """Keep only the input of every n-th transformer block, which is computed again in backward. 1: every block. Null: none."""
    tf32: bool = False
    """Let CUDA round the inputs of float32 matrix products to TF32."""
    deterministic: bool = False
    """Use only deterministic kernels: the same bits in every run on the same device, at some cost."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and learning rate, both functions of the tokens seen."""

    total_tokens: int | None = None
    """Target tokens of the whole run, rounded up to whole updates. Null: tokens_per_parameter x parameters."""
    tokens_per_parameter: float = 20.0
    """Length of the run where total_tokens is null (20: Hoffmann et al., 2022)."""
    warmup_tokens: int = 104_857_600
    """Linear warm-up over this many tokens, 200 updates of 524,288."""
    final_learning_rate_fraction: float = 0.1
    """The cosine ends at this fraction of the peak."""


@dataclass(frozen=True)
class StabilityConfig:
    """What to do about updates that are not finite, and about spikes of the loss or the gradient."""

    max_skipped_updates: int = 5
    """Stop after this many updates in a row whose loss or gradient was not finite; each of them is skipped."""
    on_spike: Literal["continue", "stop", "rollback"] = "continue"
    """continue: note it in the ledger. stop: end the run, with the checkpoints before it. rollback: return to the last
    checkpoint and leave out the blocks that led to the spike."""
    spike_window: int = 128
    """A spike is told by comparison with this many updates before it."""
    spike_score: float = 7.0
    """A spike is a loss or gradient norm this many robust standard deviations (1.4826 median absolute deviations) above the
    window's median."""
    rollback_updates: int = 4
    """rollback: leave out the blocks of this many updates, that of the spike the last."""
    max_rollbacks: int = 3
    """rollback: stop after this many returns to the same checkpoint."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation loss, in nats per token and bits per byte, and samples."""

    every_tokens: int = 262_144_000
    """Evaluate whenever this many more tokens have been seen, and before and after the run."""
    tokens: int = 131_072
    """Size of a validation set, rounded up to whole documents."""
    sets: dict[str, str] = field(default_factory=dict)
    """Validation sets of your own beside the held-out documents: a name for each, and its file, glob or address. They are
    read as data.text_files are, and not held out of them."""
    prompts: tuple[str, ...] = ("",)
    """Texts that samples continue, one sample each, at each evaluation after the start. Empty text: a new document."""
    sample_tokens: int | None = 128
    """Length of a sample. Null: no samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and how much of it is kept."""

    every_tokens: int | None = 524_288_000
    """Save whenever this many more tokens have been seen, and at the end. Null: not by tokens."""
    every_minutes: float | None = 30.0
    """Save whenever this many minutes have passed since the last one. Null: not by time."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every_tokens: int | None = None
    """Never remove those at multiples of this many tokens. Null: none."""


@dataclass(frozen=True)
class LogConfig:
    """Where the ledger's values go besides ledger.jsonl."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers of accelerate that receive the same values."""


@dataclass(frozen=True)
class PushConfig:
    """What goes to the Hub, and where. The login is that of HF_TOKEN or `hf auth login`; there is no setting for a token."""

    repo_id: str | None = None
    """Model repository `user/name`, made where there is none. Null: nothing is pushed."""
    private: bool = True
    """Make the repository private, and refuse one that is public."""
    revisions: bool = True
    """Tag each pushed checkpoint `step-N`, so that it stays when main moves on."""
    training_state: bool = False
    """Push what resuming needs with each checkpoint: about three times the size."""


@dataclass(frozen=True)
class HubConfig(PushConfig):
    """Checkpoints and the finished model, pushed to the Hub in the background."""

    every_tokens: int | None = None
    """Push the next checkpoint whenever this many more tokens have been seen. Null: every checkpoint."""
    wait_seconds: float = 600.0
    """How long the end of the run waits for what is not pushed yet."""


@dataclass(frozen=True)
class Config:
    """A run of the recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    """Arithmetic of the matrix products: bf16 autocast over fp32 parameters, or fp32. auto: what the device is good at."""

    resume: str = "auto"
    """auto: go on from the newest checkpoint of the run directory that verifies, if there is one. fresh: start again, and
    move what is there to previous/. Otherwise a checkpoint: its path, or hf://user/name@revision."""

    @property
    def n_positions(self) -> int:
        """Learned positions of the model, in tokens."""
        return self.model.n_positions or self.data.sequence_length

    @property
    def cache_directory(self) -> Path:
        """Where trained tokenizers and memory-mapped copies of local files are kept."""
        return Path(self.data.cache_directory or Path(self.run.directory) / "cache")


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def flat_fields(config_class: type) -> list[tuple[str, Any]]:
    """(dotted name, dataclass field) of every value of a configuration class."""
    names: list[tuple[str, Any]] = []
    for f in fields(config_class):
        section = f.default_factory if isinstance(f.default_factory, type) else None
        if section is not None and is_dataclass(section):
            names += [(f"{f.name}.{name}", inner) for name, inner in flat_fields(section)]
        else:
            names.append((f.name, f))
    return names
