"""Losses that keep the experts' loads even. One convention: 1.0 a layer at perfect balance, whatever k."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def first_choice_loss(
    gates: Float[Array, "g s e"], first: Int[Array, "g s"], valid: Bool[Array, "g s"]
) -> Float[Array, ""]:
    """GShard's auxiliary loss (Algorithm 1, line 13), scaled by E**2: ``E * sum_e f_e * p_e``, averaged over tokens.

    f_e is the share of the group's first choices that went to expert e, dropped ones included; p_e its mean gate. The
    gradient flows through p_e alone. Groups weigh by their real tokens, so padding changes nothing.

    Args:
        gates: softmax over all experts.
        first: each token's first choice.
        valid: False for padding.
    """
    num_experts = gates.shape[-1]
    real = valid[..., None].astype(gates.dtype)
    tokens = real.sum(1)
    chosen = jax.nn.one_hot(first, num_experts, dtype=gates.dtype) * real
    share = chosen.sum(1) / jnp.maximum(tokens, 1.0)
    mean_gate = (gates * real).sum(1) / jnp.maximum(tokens, 1.0)
    per_group = num_experts * jnp.sum(share * mean_gate, axis=-1)
    return jnp.sum(per_group * tokens[:, 0]) / jnp.maximum(tokens.sum(), 1.0)
