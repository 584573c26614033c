"""A decoder-only MoE language model."""

import math

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
    MoEMetrics,
    RMSNorm,
    RouterState,
    Stack,
    Unembedding,
    Unit,
)
from gshardx.models.moe import build_moe


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; dense and MoE blocks in a repeating pattern (``config.moe.every``).

    Args:
        config: sizes.
        vocab: size of the vocabulary, v.
    """

    def __init__(self, config: ModelConfig, vocab: int, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.embedding = Embedding(vocab, config.width, rngs=rngs)
        units = config.layers // config.moe.every
        self.stack = Stack(lambda rngs: _unit(config, rngs), units, config.remat, rngs=rngs)
        self.final_norm = RMSNorm(config.width, rngs=rngs)
        self.unembedding = Unembedding(vocab, config.width, rngs=rngs)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        rng: Array | None,
        state: RouterState,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        """Final hidden states, the extended memory, and metrics with a leading axis over MoE layers.

        Args:
            tokens: ids.
            positions: place of each token in its document.
            valid: False for padding.
            memory: what attention sees: ``Packed`` in training, ``KVCache`` in inference.
            rng: for routers that draw; None at inference, where no token is dropped.
            state: the routers', stacked; ``self.stack.initial_state()`` at first.
        """
        x = self.embedding(tokens, jnp.dtype(self.dtype))
        x, memory, metrics = self.stack(x, positions, valid, memory, rng, state)
        return self.final_norm(x), memory, metrics

    def logits(self, hidden: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        """Scores of the next token, fp32."""
        return self.unembedding(hidden)


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

    def dense() -> Block:
        ffn = FeedForward(config.width, config.hidden, config.activation, output_scale=scale, rngs=rngs)
        return Block(config.width, attention(), ffn, rngs=rngs)

    sparse = build_moe(config, scale, rngs)
    return Unit([dense() for _ in range(config.moe.every - 1)], Block(config.width, attention(), sparse, rngs=rngs))
