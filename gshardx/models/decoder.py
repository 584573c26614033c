"""A decoder-only MoE language model."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.config import ModelConfig
from gshardx.layers import (
    Attention,
    Block,
    Embedding,
    FeedForward,
    Memory,
    MoE,
    MoEMetrics,
    RMSNorm,
    RouterState,
    Stack,
    Unembedding,
    Unit,
)
from gshardx.layers.draws import dropout, folded
from gshardx.models.moe import build_moe

_AT_EMBEDDING = 2**32 - 1
"""Where blocks fold their number into a row's key, the embedding folds this."""


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; dense and MoE blocks in a repeating pattern (``config.moe.every``).

    Args:
        config: sizes.
        vocab: size of the vocabulary, v.
        stack: how units are arranged: :class:`Stack`, or :class:`gshardx.layers.Layers` for inference.
    """

    def __init__(self, config: ModelConfig, vocab: int, *, rngs: nnx.Rngs, stack: Callable[..., Stack] = Stack) -> None:
        self.residual_dtype, self.logits_dtype = _dtype(config, "residual"), _dtype(config, "logits")
        self.dropout, self.logit_cap = config.dropout, config.logit_cap
        self.embedding = Embedding(vocab, config.width, rngs=rngs)
        units = config.layers // config.moe.every
        self.stack = stack(lambda rngs: _unit(config, rngs), units, config.remat, rngs=rngs)
        self.final_norm = RMSNorm(config.width, rngs=rngs)
        self.unembedding = None if config.tie_embeddings else Unembedding(vocab, config.width, rngs=rngs)

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
        x = dropout(x, None if keys is None else folded(keys, _AT_EMBEDDING), self.dropout)
        x, memory, metrics = self.stack(x, positions, valid, memory, keys, state)
        return self.final_norm(x, self.logits_dtype), memory, metrics

    def logits(self, hidden: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        """Scores of the next token, fp32; capped to ``cap tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118)."""
        logits = self.embedding.scores(hidden) if self.unembedding is None else self.unembedding(hidden)
        return logits if self.logit_cap is None else self.logit_cap * jnp.tanh(logits / self.logit_cap)


def _dtype(config: ModelConfig, part: str) -> str:
    return "float32" if part in config.float32 else config.dtype


def _unit(config: ModelConfig, rngs: nnx.Rngs) -> Unit:
    # Residual branches start small, 1 / sqrt(2 layers) of their input's scale each (GPT-2).
    scale = 1.0 / math.sqrt(2 * config.layers)

    def attention() -> Attention:
        return Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            rope_base=config.rope_base,
            output_scale=scale,
            rngs=rngs,
        )

    def block(feed_forward: FeedForward | MoE, part: str) -> Block:
        dtypes = (_dtype(config, "attention"), _dtype(config, part))
        return Block(config.width, attention(), feed_forward, dtypes=dtypes, dropout=config.dropout, rngs=rngs)

    def dense() -> Block:
        ffn = FeedForward(config.width, config.hidden, config.activation, output_scale=scale, rngs=rngs)
        return block(ffn, "feed_forward")

    sparse = build_moe(config, scale, rngs)
    return Unit([dense() for _ in range(config.moe.every - 1)], block(sparse, "experts"))
