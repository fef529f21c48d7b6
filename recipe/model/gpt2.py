"""The GPT-2 model: built from the configuration, its parameters grouped for the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.model.attention import CAUSAL_ATTENTION, causal_attention, inside_documents
from recipe.model.export import check_vocabulary, load_model, load_weights
from recipe.model.kernels import compile_model
from recipe.model.loss import Matmul, summed_token_loss
from recipe.model.onednn import use_onednn
from recipe.run.run import Run


class CausalLanguageModel(nn.Module):
    """A GPT2LMHeadModel whose forward gives the summed token loss, so that no logits leave it.

    Rows of the embedding from `vocabulary` on are padding.
    """

    def __init__(self, gpt2: Any, vocabulary: int) -> None:
        super().__init__()
        self.gpt2 = gpt2
        self.vocabulary = vocabulary
        self.matmul: Matmul = torch.mm  # for the output layer

    @property
    def document_start(self) -> int | None:
        """The token at which attention begins anew; None if it goes over whole blocks. The weights' configuration says it."""
        has_mask = getattr(self.gpt2.config, "document_mask", False)
        return int(self.gpt2.config.eos_token_id) if has_mask else None

    def forward(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """Summed loss in nats, 0-d, of a `MicroBatch`; targets masked with `IGNORED_TARGET`."""
        inside = {} if starts is None else inside_documents(self.gpt2, starts, inputs.shape[1])
        hidden = self.gpt2.transformer(input_ids=inputs, use_cache=False, **inside).last_hidden_state
        return summed_token_loss(hidden, self.gpt2.lm_head.weight, targets, self.vocabulary, self.matmul)


def gpt2_config(config: Config, end_of_text: int) -> Any:
    """The transformers configuration, with no field left to a default that is wrong for pre-training."""
    from transformers import GPT2Config

    model = config.model
    return GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=config.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_inner=4 * model.n_embd,
        activation_function=model.activation_function,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
        layer_norm_epsilon=model.layer_norm_epsilon,
        initializer_range=model.initializer_range,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text),
        pad_token_id=None,  # packed blocks have no padding; the exported model's generation configuration names one
        **({"document_mask": True} if config.data.document_mask else {}),  # so that it travels with the weights
        use_cache=False,
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_model(run: Run, tokenizer: Any, init_from: str | None = None) -> CausalLanguageModel:
    """The model of a run, computed by `run.kernels`. Arguments and errors are those of `build_gpt2`."""
    model = build_gpt2(run.config, len(tokenizer), tokenizer.eos_token_id, init_from)
    if run.kernels["matmul"] == "onednn":
        use_onednn(model)
    if run.kernels["is_compiled"]:
        for part in model.gpt2.transformer.h if run.is_sharded else [model]:  # no graph goes over the ranks' exchanges
            compile_model(part)
    return model


def build_gpt2(config: Config, vocabulary: int, end_of_text: int, init_from: str | None = None) -> CausalLanguageModel:
    """A model with the weights of `init_from`, or freshly initialised ones that the seed decides: fp32, or bf16 for bf16 state.

    `vocabulary` is the number of the tokenizer's tokens; `init_from` a directory or Hub name of a GPT-2 of this shape.

    Raises:
        RecipeError: a tokenizer larger than the embedding, or an `init_from` that cannot be loaded.
    """
    from accelerate.utils import set_seed
    from transformers import AttentionInterface, GPT2LMHeadModel

    if vocabulary > config.model.vocab_size:
        raise RecipeError(
            f"the tokenizer has {vocabulary:,} tokens but model.vocab_size = {config.model.vocab_size:,}: "
            f"set --model.vocab_size {-(-vocabulary // 64) * 64}"
        )
    AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
    set_seed(config.run.seed)
    gpt2 = GPT2LMHeadModel(gpt2_config(config, end_of_text))
    gpt2.set_attn_implementation(CAUSAL_ATTENTION)
    if init_from is not None:
        initial = load_model(init_from)
        check_vocabulary(vocabulary, initial, init_from)
        load_weights(gpt2, initial.state_dict(), init_from)
    checkpoint_activations(gpt2, config.performance.activation_checkpointing)
    expected = torch.bfloat16 if config.optimizer.state == "bf16" else torch.float32
    gpt2.to(expected)
    wrong = {str(parameter.dtype) for parameter in gpt2.parameters() if parameter.dtype != expected}
    assert not wrong, f"parameters have to be {expected}, found {wrong}"
    return CausalLanguageModel(gpt2, vocabulary)


def checkpoint_activations(gpt2: Any, every: int | None) -> None:
    """Let every n-th transformer block keep only its input and run again in backward; None: none."""
    if every is None:
        return
    old_name = gpt2.gradient_checkpointing_enable  # before transformers 5.23
    enable = getattr(gpt2, "activation_checkpointing_enable", old_name)
    enable({"use_reentrant": False, "preserve_rng_state": gpt2.config.resid_pdrop > 0})
    for number, block in enumerate(gpt2.transformer.h):
        block.gradient_checkpointing = number % every == 0
