"""A decoder-only MoE language model."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.config import ModelConfig
from gshardx.layers import (
    NORMS,
    Attention,
    Block,
    Embedding,
    FeedForward,
    LatentAttention,
    Memory,
    MoE,
    MoEMetrics,
    RouterState,
    Stack,
    Unembedding,
    Unit,
)
from gshardx.layers.draws import dropout, folded
from gshardx.layers.param import param
from gshardx.models.attention import build_attention, check_attention
from gshardx.models.moe import build_moe, check_router_options
from gshardx.models.options import decoder_options

_AT_EMBEDDING = 2**32 - 1
"""Where blocks fold their number into a row's key, the embedding folds this."""


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; dense and MoE blocks in a repeating pattern (``config.moe.every``), perhaps
    after dense ones (``config.moe.dense_first``).

    Args:
        config: sizes.
        vocab: size of the vocabulary, v.
        stack: how units are arranged: :class:`Stack`, or :class:`gshardx.layers.Layers` for inference.
    """

    def __init__(self, config: ModelConfig, vocab: int, *, rngs: nnx.Rngs, stack: Callable[..., Stack] = Stack) -> None:
        self.residual_dtype, self.logits_dtype = _dtype(config, "residual"), _dtype(config, "logits")
        self.dropout, self.logit_cap = config.dropout, config.logit_cap
        self.embedding_scale, self.logit_scale = config.scales.get("embedding"), config.scales.get("logits")
        options = decoder_options(config)
        self.embedding = Embedding(vocab, config.width, rngs=rngs)
        first = config.moe.dense_first
        self.stack = stack(lambda rngs: _unit(config, vocab, rngs), config.moe_layers, config.remat, first, rngs=rngs)
        self.final_norm = NORMS[options.norm](config.width, rngs=rngs, epsilon=config.norm_epsilon)
        self.unembedding = None if config.tie_embeddings else Unembedding(vocab, config.width, rngs=rngs)
        self.first = nnx.List([_dense(config, rngs) for _ in range(first)])
        bias = options.logits_bias
        self.logits_bias = param(rngs.params(), "vocab", (vocab,), jax.nn.initializers.zeros) if bias else None

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        keys: Array | None,
        state: RouterState,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        """Final hidden states, the extended memory, and metrics with a leading axis over MoE layers.

        Args:
            tokens: ids.
            positions: place of each token in its document.
            valid: False for padding.
            memory: what attention sees: ``Packed`` in training, ``KVCache`` in inference.
            keys: one a row, for dropout and routers that draw; None at inference, where no token is dropped.
            state: the routers', stacked; ``self.stack.initial_state()`` at first.
        """
        x = self.embedding(tokens, jnp.dtype(self.residual_dtype))
        x = x if self.embedding_scale is None else x * self.embedding_scale
        x = dropout(x, None if keys is None else folded(keys, _AT_EMBEDDING), self.dropout)
        for layer, block in enumerate(self.first):
            own = None if keys is None else folded(keys, layer)
            x, memory, _ = block(x, positions, valid, memory, layer, own, ())
        x, memory, metrics = self.stack(x, positions, valid, memory, keys, state, tokens)
        return self.final_norm(x, self.logits_dtype), memory, metrics

    def logits(self, hidden: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        """Scores of the next token, fp32; capped to ``cap tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118)."""
        if self.unembedding is None:
            logits = self.embedding.scores(hidden, self.logit_scale)
        else:
            logits = self.unembedding(hidden if self.logit_scale is None else hidden * self.logit_scale)
        logits = logits if self.logits_bias is None else logits + self.logits_bias[...]
        return logits if self.logit_cap is None else self.logit_cap * jnp.tanh(logits / self.logit_cap)


def check_model(config: ModelConfig) -> None:
    """Raise BadInput unless all options that ``config`` names in mappings exist, and fit."""
    decoder_options(config)
    check_router_options(config.moe)
    check_attention(config)


def _dtype(config: ModelConfig, part: str) -> str:
    return "float32" if part in config.float32 else config.dtype


def _unit(config: ModelConfig, vocab: int, rngs: nnx.Rngs) -> Unit:
    sparse = build_moe(config, _output_scale(config), rngs, vocab)
    dense = [_dense(config, rngs) for _ in range(config.moe.every - 1)]
    return Unit(dense, _block(config, build_attention(config, _output_scale(config), rngs), sparse, "experts", rngs))


def _dense(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    ffn = FeedForward(config.width, config.hidden, config.activation, output_scale=_output_scale(config), rngs=rngs)
    return _block(config, build_attention(config, _output_scale(config), rngs), ffn, "feed_forward", rngs)


def _output_scale(config: ModelConfig) -> float:
    """Residual branches start small, 1 / sqrt(2 layers) of their input's scale each (GPT-2)."""
    return 1.0 / math.sqrt(2 * config.layers)


def _block(
    config: ModelConfig,
    attention: Attention | LatentAttention,
    feed_forward: FeedForward | MoE,
    part: str,
    rngs: nnx.Rngs,
) -> Block:
    return Block(
        config.width,
        attention,
        feed_forward,
        dtypes=(_dtype(config, "attention"), _dtype(config, part)),
        dropout=config.dropout,
        norm=decoder_options(config).norm,
        norm_epsilon=config.norm_epsilon,
        residual_scale=config.scales.get("residual"),
        rngs=rngs,
    )
