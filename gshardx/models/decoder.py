"""A decoder-only MoE language model."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.config import ModelConfig
from gshardx.layers import (
    Attention,
    Block,
    Dispatcher,
    Einsum,
    Embedding,
    Experts,
    FeedForward,
    Gather,
    GShardRouter,
    Memory,
    MoE,
    MoEMetrics,
    RMSNorm,
    Stack,
    Unembedding,
    Unit,
)

DISPATCHERS: dict[str, type[Dispatcher]] = {"gather": Gather, "einsum": Einsum}


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; dense and MoE blocks in a repeating pattern (``config.moe.every``).

    Args:
        config: sizes.
        vocab: size of the vocabulary, v.
    """

    def __init__(self, config: ModelConfig, vocab: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = Embedding(vocab, config.width, rngs=rngs)
        self.stack = Stack(lambda rngs: _unit(config, rngs), config.layers // config.moe.every, rngs=rngs)
        self.final_norm = RMSNorm(config.width, rngs=rngs)
        self.unembedding = Unembedding(vocab, config.width, rngs=rngs)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        rng: Array | None,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        """Final hidden states, the extended memory, and metrics with a leading axis over MoE layers.

        Args:
            tokens: ids.
            positions: place of each token in its document.
            valid: False for padding.
            memory: what attention sees: ``Packed`` in training, ``KVCache`` in inference.
            rng: for routers that draw; None at inference, where no token is dropped.
        """
        x = self.embedding(tokens, jnp.dtype(self.config.dtype))
        x, memory, metrics = self.stack(x, positions, valid, memory, rng)
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

    moe = config.moe
    sparse = MoE(
        GShardRouter(config.width, moe.num_experts, moe.top_k, moe.second_expert, rngs=rngs),
        DISPATCHERS[moe.dispatcher](),
        Experts(moe.num_experts, config.width, moe.hidden, config.activation, output_scale=scale, rngs=rngs),
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        capacity_factor=moe.capacity_factor,
        group_size=moe.group_size,
    )
    return Unit([dense() for _ in range(moe.every - 1)], Block(config.width, attention(), sparse, rngs=rngs))
