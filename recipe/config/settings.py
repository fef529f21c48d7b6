"""The configuration, as frozen dataclasses. Imports no torch.

The defaults are what the `gpt2-*` presets share; a preset holds only what differs. A field's docstring is its text in `--help`:
what it means, and in which unit. Its type says which numbers are valid: `Annotated[int, AtLeast(1)]`.
"""

from __future__ import annotations  # without it, --help prints each Annotated type in full

import operator
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from recipe.config.text_files import public_name

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

STANDARD_LIBRARY = "python-standard-library"
Scaling = Literal["accumulate", "manual"]
Sharding = Literal["none", "full", "hybrid"]
# One standard-library file in this many is held out, whatever data.validation_one_in says for other sources.
STANDARD_LIBRARY_VALIDATION_ONE_IN = 50
HELD_OUT = "held_out"  # the validation set of the documents that are not trained on


@dataclass(frozen=True)
class Bound:
    """Which numbers a field takes: those for which `holds(number, limit)`."""

    words: str
    holds: Callable[[float, float], bool]
    limit: float
    why: str = ""


AtLeast = partial(Bound, "at least", operator.ge)
AtMost = partial(Bound, "at most", operator.le)
Above = partial(Bound, "greater than", operator.gt)
Below = partial(Bound, "below", operator.lt)

# The limits are far above what anybody needs, and low enough that all arithmetic on them is short and exact.
Count = Annotated[int, AtLeast(1), AtMost(2**40)]
CountOrNull = Annotated[int | None, AtLeast(1), AtMost(2**40)]
Tokens = Annotated[int, AtLeast(1), AtMost(10**15)]
TokensOrNull = Annotated[int | None, AtLeast(1), AtMost(10**15)]
Positive = Annotated[float, Above(0), AtMost(1000)]
# Ranks wait half an hour for each other.
WaitSeconds = Annotated[float, AtLeast(0), AtMost(1200, "since the other ranks wait for the one that tries")]


@dataclass(frozen=True)
class RunConfig:
    """The run: its directory, its length, its seed."""

    directory: str = "runs/default"
    """Directory of the run: config.yaml, ledger.jsonl, checkpoints/, final/."""
    max_updates: CountOrNull = None
    """Stop after this many updates. The schedules still stretch over the whole run. Null: do not stop early."""
    seed: Annotated[int, AtLeast(0), Below(2**32)] = 1234
    """Seed of the initial weights, the order of the data and dropout."""
    meet_seconds: Annotated[float, Above(0), AtMost(86_400)] = 60.0
    """Seconds that ranks have to come together when a run starts; then it ends, with the numbers of those that are missing."""
    branch: bool = False
    """Branch: go on from the checkpoint that `resume` names, of another run, with other settings of `optimizer` (but name and
    state), `schedule`, `batch.schedule` and weights of sources. Once there are checkpoints in `directory`, from these."""
    skip_tokens: Annotated[int, AtLeast(0), AtMost(10**15)] = 0
    """branch: leave out this many tokens of the data behind the checkpoint, for branches that differ in their data alone."""
    parity_check: bool = False
    """Before training, compute the gradient of the first update again with two other micro-batch sizes and with the other
    scaling path, and stop if they differ. Costs four updates of arithmetic and two copies of the gradient."""


@dataclass(frozen=True)
class BudgetChange:
    """Another budget, from some place of the run on."""

    from_tokens: Tokens
    """The first update that begins at or after so many target tokens of the run is the first of this budget."""
    tokens_per_update: Count
    """Target tokens of each update from then on."""


@dataclass(frozen=True)
class BatchConfig:
    """The update: its size in tokens is a promise; how it is split is not."""

    tokens_per_update: Count = 524_288
    """Target tokens of one optimizer step, over all ranks: a whole number of blocks."""
    micro_batch_size: Annotated[int | Literal["auto"], AtLeast(1), AtMost(2**40)] = 4
    """Blocks in one forward and backward, at most: memory and speed, never the update. auto: as many as fit into the device, by
    the plan and one real step."""
    lanes: Annotated[int, AtLeast(1), AtMost(2**16)] = 64
    """Streams that the documents are dealt into, at least as many as ranks. They decide the order of the data."""
    schedule: tuple[BudgetChange, ...] = ()
    """Other budgets later in the run: `[{from_tokens: 500000000, tokens_per_update: 1048576}, ...]`, each a whole number of
    blocks per lane. What that does to the learning rate is schedule.learning_rate_rule."""
    scaling: Scaling = "accumulate"
    """accumulate: accelerator.accumulate() and accelerator.backward(). manual: the reference path, which scales by hand."""


@dataclass(frozen=True)
class SourceConfig:
    """Where text, or tokens, come from: a Hub dataset, files, or Python's own standard library."""

    dataset: str | None = None
    """`user/name` or `user/name:configuration` of a Hub dataset, of text or of token ids, or `python-standard-library`: the
    interpreter's .py files."""
    split: str = "train"
    """Split of the Hub dataset."""
    revision: str | None = None
    """Commit, branch or tag of the Hub dataset. Null: its main branch."""
    text_files: tuple[str, ...] = ()
    """Local files, globs, or addresses to stream (https://, hf://datasets/, s3://, gs:// and what else fsspec knows); they take
    the place of `dataset`. A name that exists is never a pattern. .txt: one document per file. .jsonl or .json, also with .gz
    or .zst, and .parquet: one per row."""
    token_files: tuple[str, ...] = ()
    """Files of token ids; they take the place of `dataset`. Rows of .parquet, .arrow or .jsonl files, also behind addresses; or
    flat local files of nanoGPT, llm.c, datatrove, OLMo or Megatron. Files called val.bin, NAME_val_000.bin or the like are
    the held-out documents."""
    text_column: str = "text"
    """Column that holds the document."""
    token_column: str | None = None
    """Column that holds token ids. Null: input_ids, token_ids, tokens or ids, if there is no text column."""
    rows_are: Literal["documents", "packed"] = "documents"
    """Rows of token ids are whole documents, each to end with one end-of-text token, or pieces of one stream that has them."""
    token_dtype: Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"] | None = None
    """Integers of flat files that do not say it themselves: nanoGPT and OLMo."""
    encoding: str | None = None
    """Encoding of .txt files, such as latin-1. Null: UTF-8, or what a byte-order mark says."""

    @property
    def repository(self) -> str:
        """`user/name` of the Hub dataset."""
        return (self.dataset or "").partition(":")[0]

    @property
    def configuration(self) -> str | None:
        """The configuration of the Hub dataset; None: its default."""
        return (self.dataset or "").partition(":")[2] or None

    @property
    def files(self) -> tuple[str, ...]:
        """What takes the place of the dataset."""
        return self.text_files or self.token_files

    @property
    def is_standard_library(self) -> bool:
        """Whether Python's own standard library is read: files take its place too."""
        return not self.files and self.dataset == STANDARD_LIBRARY

    @property
    def public(self) -> Self:
        """Addresses without credentials, queries and fragments."""
        text, tokens = (tuple(map(public_name, files)) for files in (self.text_files, self.token_files))
        return replace(self, text_files=text, token_files=tokens)


@dataclass(frozen=True)
class MixtureSource(SourceConfig):
    """One of several sources."""

    weight: Annotated[float, Above(0), AtMost(10**12)] = 1.0
    """Share of the tokens, relative to the other weights."""
    name: str | None = None
    """In the ledger and the report. Null: that of the dataset or the first file."""
    max_passes: CountOrNull = None
    """Read its documents so many times at most. Null: as often as the weights want."""

    @property
    def label(self) -> str:
        """Its name."""
        if self.name is not None:
            return self.name
        last = public_name(self.files[0] if self.files else self.dataset or "").rstrip("/").rpartition("/")[2]
        return re.sub(r"[^\w-]+", "-", last.partition(".")[0]).strip("-")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The text, or the tokens: a Hub dataset, files, Python's own standard library, or a mixture of these."""

    dataset: str | None = "HuggingFaceFW/fineweb-edu:sample-10BT"
    """`user/name` or `user/name:configuration` of a Hub dataset, of text or of token ids, or `python-standard-library`: the
    interpreter's .py files."""
    sources: tuple[MixtureSource, ...] = ()
    """A mixture: `[{dataset: user/name, weight: 0.7}, {text_files: [a.jsonl], weight: 0.3}]`. Each has the settings from
    `dataset` to `encoding`, a weight in tokens, and may have a name and max_passes. It takes the place of all of these."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row, or a .txt file, that holds no text: stop and name it, or leave it out and count it."""
    sequence_length: Annotated[int, AtLeast(2), AtMost(2**24)] = 2048
    """Target tokens of a block."""
    tokenizer: str | None = "gpt2"
    """Hub name or local directory of a tokenizer. Null: that of model.init_from; without one, train a byte-level BPE of
    model.vocab_size tokens on the text."""
    shuffle_blocks: Annotated[int, AtLeast(1), AtMost(2**16)] = 128
    """Blocks that a lane shuffles among themselves, after the order of the shards. 1: blocks come as they are packed."""
    document_mask: bool = False
    """Attention stays inside a document, and positions start again with each. False: inside a block."""
    validation_one_in: Annotated[int | None, AtLeast(2, "since 1 would hold out everything"), AtMost(2**40)] = 100
    """Hold out one document in this many for validation, chosen by a hash of its text. Null: none."""
    retry_seconds: WaitSeconds = 600.0
    """Try for this long, with growing pauses, to read streamed text again; then save the run and stop. At most 1,200."""
    cache_directory: str | None = None
    """Directory of trained tokenizers, packed validation sets and copies of text. Null: cache/ in the run directory."""

    @property
    def mixture(self) -> tuple[MixtureSource, ...]:
        """What is read: `sources`, or the one source that the other settings say."""
        if self.sources:
            return self.sources
        return (MixtureSource(**{f.name: getattr(self, f.name) for f in fields(SourceConfig)}),)

    def validation_set(self, pattern: str) -> MixtureSource:
        """What one of `evaluation.sets` names: text, or token ids where nothing else is read."""
        first = self.mixture[0]
        if all(source.token_files for source in self.mixture):
            return replace(first, token_files=(pattern,))
        return replace(first, text_files=(pattern,), token_files=())


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT-2. No field is left to a default of GPT2Config that is wrong for pre-training."""

    init_from: str | None = None
    """Start from the weights of this GPT-2: a local directory or a Hub name. Its config.json then decides n_layer, n_embd,
    n_head, n_positions, layer_norm_epsilon, activation_function and vocab_size (rounded up to a multiple of 64), whatever is
    set for them. Null: start from random weights."""
    n_layer: Annotated[int, AtLeast(1), AtMost(2**16)] = 12
    """Transformer blocks."""
    n_embd: Annotated[int, AtLeast(1), AtMost(2**20)] = 768
    """Width; the feed-forward layer is 4 times as wide."""
    n_head: Annotated[int, AtLeast(1), AtMost(2**20)] = 12
    """Attention heads; they divide n_embd."""
    n_positions: Annotated[int | None, AtLeast(1), AtMost(2**24)] = None
    """Learned positions. Null: as many as data.sequence_length."""
    vocab_size: Annotated[int, AtLeast(2), AtMost(2**24)] = 50_304
    """Rows of the embedding: the tokenizer's tokens, padded to a multiple of 64 for speed. The padding has probability 0."""
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0
    """Dropout of embeddings, attention and residuals."""
    activation_function: str = "gelu_pytorch_tanh"
    """Function of the feed-forward layer. gelu_pytorch_tanh is GPT-2's gelu_new in one fused kernel."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights; residual projections get this / sqrt(2 n_layer)."""
    layer_norm_epsilon: Positive = 1e-5
    """Added to the variance in layer normalisation."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer step."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter, 2019); Muon (Jordan et al., 2024) for the blocks' matrices, with AdamW for everything else
    at the same rate and decay; or plain SGD, which hides no error in the gradient's scale."""
    state: Literal["fp32", "bf16"] = "fp32"
    """Precision of parameters, gradients and moments. fp32: 16 bytes per parameter. bf16: 8 bytes, rounded stochastically by
    torchao, and less exact; it needs adamw and precision bf16."""
    learning_rate: Positive = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    """AdamW: decay of the first moment."""
    beta2: Annotated[float, AtLeast(0), Below(1)] = 0.95
    """AdamW: decay of the second moment in an update. With batch.schedule that of batch.tokens_per_update: its memory in tokens
    stays."""
    beta2_half_life_tokens: TokensOrNull = None
    """AdamW: tokens after which a gradient counts half in the second moment, in place of beta2; beta2 is not below 0.8. Null:
    beta2."""
    epsilon: Positive = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: Annotated[float, AtLeast(0), AtMost(1000)] = 0.1
    """Decay of matrices and embeddings, and of nothing else; decoupled from the gradient in AdamW."""
    max_grad_norm: Annotated[float | None, Above(0), AtMost(10**12)] = 1.0
    """Clip the norm of the whole update's gradient to this. Null: do not clip."""


@dataclass(frozen=True)
class PerformanceConfig:
    """How the update is computed: speed and memory. The update stays the same, up to rounding."""

    matmul: Literal["auto", "torch", "onednn"] = "auto"
    """Library of the linear layers' matrix products. torch: the one that torch takes. onednn: oneDNN, for float32 on a CPU.
    auto: oneDNN if the CPU has AVX-512 and the model is not compiled."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model in place with torch.compile: at most two graphs, one for each size of micro-batch. auto: on CUDA with
    Triton."""
    sharding: Sharding = "none"
    """Cut parameters, gradients and the optimizer's state over the ranks (FSDP2): over all of them, or hybrid: over those of a
    host, and the hosts hold the same. none: each rank holds everything (DDP)."""
    activation_checkpointing: CountOrNull = None
    """Keep only the input of every n-th transformer block, and compute it again in backward. 1: every block. Null: none."""
    tf32: bool = False
    """Let CUDA round the inputs of float32 matrix multiplications to TF32."""
    deterministic: bool = False
    """Use only deterministic kernels: the same bits in every run on the same device, at some cost in speed."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and learning rate, both functions of the tokens seen."""

    total_tokens: TokensOrNull = None
    """Target tokens of the whole run, rounded up to whole updates. Null: tokens_per_parameter x parameters."""
    tokens_per_parameter: Annotated[float, Above(0), AtMost(10**6)] = 20.0
    """Length of the run if total_tokens is null (20: Hoffmann et al., 2022)."""
    warmup_tokens: Annotated[int, AtLeast(0), AtMost(10**15)] = 104_857_600
    """Linear warm-up over this many tokens: 200 updates of 524,288."""
    shape: Literal["cosine", "wsd", "linear"] = "cosine"
    """How the rate falls behind the warm-up. cosine: as half a cosine. linear: in a line. wsd: it stays at the peak, and falls
    over the last decay_tokens, by the root of their share: so far the run may get another length on resume."""
    decay_tokens: TokensOrNull = None
    """wsd: tokens over which the rate falls, up to the end of the run. Null: a fifth of the run."""
    final_learning_rate_fraction: Annotated[float, AtLeast(0), AtMost(1)] = 0.1
    """Fraction of the peak at which the run ends."""
    learning_rate_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    """What a budget of batch.schedule does to the learning rate: nothing, or times the root of its ratio to
    batch.tokens_per_update, or times the ratio."""


@dataclass(frozen=True)
class StabilityConfig:
    """Updates that are not finite, and spikes of the loss or the gradient norm."""

    max_skipped_updates: Count = 5
    """Skip an update whose loss or gradient is not finite, and stop after this many in a row."""
    on_spike: Literal["continue", "stop", "rollback"] = "continue"
    """continue: record the spike and go on. stop: end the run. rollback: return to the last checkpoint, and skip the batches
    that led to the spike."""
    spike_window: Annotated[int, AtLeast(4), AtMost(2**20)] = 128
    """Number of updates before an update that it is compared with."""
    spike_score: Annotated[float, Above(0), AtMost(10**12)] = 7.0
    """A spike is a loss or gradient norm this many robust standard deviations (1.4826 median absolute deviations) above the
    median of the window."""
    rollback_updates: Annotated[int, AtLeast(1), AtMost(2**20)] = 4
    """rollback: skip the batches of this many updates, up to that of the spike."""
    max_rollbacks: Count = 3
    """rollback: stop after this many returns to the same checkpoint."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation loss, in nats per token and bits per byte, and samples."""

    every_tokens: Tokens = 262_144_000
    """Tokens between evaluations. The run also begins and ends with one."""
    tokens: Count = 131_072
    """Size of a validation set, rounded up to whole documents."""
    sets: dict[str, str] = field(default_factory=dict)
    """Validation sets of your own beside the held-out documents: for each name a file, glob or address. They are read like
    data.text_files, or like data.token_files in a run that reads nothing else, and not held out of them."""
    prompts: tuple[str, ...] = ("",)
    """Texts to continue at each evaluation after the start, one sample for each. Empty text: start a new document."""
    sample_tokens: Annotated[int | None, AtLeast(1), AtMost(2**24)] = 128
    """Tokens of a sample. Null: no samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save the whole state, and how many checkpoints to keep."""

    every_tokens: TokensOrNull = 524_288_000
    """Tokens between checkpoints. The run also ends with one. Null: not by tokens."""
    every_minutes: Annotated[float | None, Above(0), AtMost(10**9)] = 30.0
    """Minutes between checkpoints. Null: not by time."""
    keep: Count = 3
    """Number of newest checkpoints to keep."""
    keep_every_tokens: TokensOrNull = None
    """Never remove the checkpoints at multiples of this many tokens. Null: none."""


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers of ledger.jsonl go as well."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers to start through accelerate."""
    noise_scale_every: CountOrNull = 1
    """Measure the gradient noise scale in every n-th update. Null: never."""


@dataclass(frozen=True)
class PushConfig:
    """What to push to the Hub, and where. The login is that of HF_TOKEN or `hf auth login`; no setting takes a token."""

    repo_id: str | None = None
    """Model repository `user/name`, created if there is none. Null: push nothing."""
    private: bool = True
    """Create the repository as a private one, and refuse one that is public."""
    revisions: bool = True
    """Tag each pushed checkpoint `step-N`, so that it stays when main moves on."""
    training_state: bool = False
    """Push with each checkpoint what resuming needs: about three times the size."""


@dataclass(frozen=True)
class HubConfig(PushConfig):
    """Push checkpoints and the finished model to the Hub in the background."""

    every_tokens: TokensOrNull = None
    """Tokens between pushed checkpoints. Null: push every checkpoint."""
    wait_seconds: WaitSeconds = 600.0
    """At the end of the run, wait this long for what is not pushed yet. At most 1,200."""


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

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
    """Precision of the matrix products. bf16: autocast over fp32 parameters. auto: the one that is fast on the device."""

    resume: str = "auto"
    """auto: go on from the newest checkpoint of the run directory that verifies, if there is one. fresh: start again, and move
    the files of the earlier run to previous/. Otherwise go on from a checkpoint: its path, or hf://user/name@revision."""

    @property
    def n_positions(self) -> int:
        """Learned positions of the model, in tokens."""
        return self.model.n_positions or self.data.sequence_length

    @property
    def public(self) -> Config:
        """The settings as they are written down: addresses of text without credentials, queries and fragments."""
        sets = {name: public_name(pattern) for name, pattern in self.evaluation.sets.items()}
        data = replace(self.data.public, sources=tuple(source.public for source in self.data.sources))
        return replace(self, data=data, evaluation=replace(self.evaluation, sets=sets))

    @property
    def cache_directory(self) -> Path:
        """Directory of what is made once of the text."""
        return Path(self.data.cache_directory or Path(self.run.directory) / "cache")


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    return operator.attrgetter(name)(config)


def flat_fields(config_class: type) -> list[tuple[str, Any]]:
    """(dotted name, type) of every value of a configuration class; bounds are in the metadata of the type."""
    types = get_type_hints(config_class, include_extras=True)
    names: list[tuple[str, Any]] = []
    for f in fields(config_class):
        if is_dataclass(types[f.name]):
            names += [(f"{f.name}.{name}", inner) for name, inner in flat_fields(types[f.name])]
        else:
            names.append((f.name, types[f.name]))
    return names


def sections_of(config_class: type) -> list[str]:
    """Names of the fields that are sections."""
    types = get_type_hints(config_class)
    return [f.name for f in fields(config_class) if is_dataclass(types[f.name])]


def flat_settings(config: Config) -> dict[str, Any]:
    """Dotted names to the values of `config.public` as JSON and YAML give them back: a tuple is a list."""
    public = config.public
    return {name: _plain(value_of(public, name)) for name, _ in flat_fields(Config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(inner) for name, inner in asdict(value).items()}
    return list(map(_plain, value)) if isinstance(value, tuple) else value
