"""Lory (Zhong et al., arXiv 2405.03133): experts merged for each segment of a row, by the segment before it.

    z_t = x_t W                                           fp32
    u_n = mean of z_t over the real tokens of segment n - 1;  0 for the first segment
    R_n = softmax(u_n + b)
    segment n goes through one network with the weights sum_e R_ne theta_e

The mean of the products is the product of the mean. No token has a part in the network of its own segment, so that
training is causal, and all of it has exact gradients. The paper merges for the first segment by that segment's own mean
without its gradient, which still tells a token of later ones: here the first segment knows of nothing.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.notes import MeanOf
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.merging import MergingRouter, mean_of_stretches


class LoryRouter(MergingRouter):
    """Args, beside those of :class:`MergingRouter`:

    segment: tokens that share a network; the paper's 256. A group that is shorter is one segment.
    """

    keeps_notes = True

    def __init__(self, width: int, num_experts: int, *, segment: int = 256, **common: Any) -> None:
        super().__init__(width, num_experts, num_experts, **common)
        if segment < 1:
            raise BadInput(f"segment = {segment}: must be 1 or more; the paper has 256")
        self.segment = segment

    @property
    def leak(self) -> str | None:
        return None

    def stretch(self, group: int) -> int:
        return min(self.segment, group)

    def recall(
        self, tokens: Float[Array, "b t m"], ids: Any, positions: Int[Array, "b t"], memory: Any, mean_of: MeanOf
    ) -> tuple[Float[Array, "b t e"] | None, Any]:
        """Where tokens come one by one: the mean of the segment before, from means that begin with it and after it."""
        if not memory.KEEPS:
            return None, memory
        notes, own = self.product(tokens, self.kernel), positions % self.segment
        both, memory = mean_of(notes, memory, own + self.segment)
        last, memory = mean_of(notes, memory, own)
        count = own[..., None] + 1
        in_both = jnp.minimum(count + self.segment, positions[..., None] + 1)
        return (both * in_both - last * count) / self.segment, memory

    def reading(self, ids: Any, recalled: Float[Array, "g s e"] | None = None) -> Any:
        return self if recalled is None else partial(self, recalled=recalled)

    def __call__(
        self,
        tokens: Float[Array, "g s m"],
        valid: Bool[Array, "g s"],
        rng: Array | None,
        state: RouterState = (),
        *,
        recalled: Float[Array, "g s e"] | None = None,
    ) -> Routing:
        bias = None if self.bias is None else self.bias[...]
        if recalled is not None:
            logits, gates = mixture(recalled, bias)
            return self.merged(self.everyone(logits, gates, valid), gates, valid, rng)
        s = tokens.shape[1]
        segment = self.stretch(s)
        if s % segment:
            fits = math.gcd(s, segment)
            raise BadInput(f"segment = {segment} does not divide a group of {s} tokens; use a divisor such as {fits}")
        means, some = mean_of_stretches(self.product(tokens, self.kernel), valid, segment)
        logits, gates = mixture(before(means), bias)
        return self.merged(self.everyone(logits, gates, some), gates, valid, rng=rng)


def before(means: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
    """Of each segment what the one before it had; of the first 0."""
    return jnp.pad(means[:, :-1], ((0, 0), (1, 0), (0, 0)))


def mixture(
    means: Float[Array, "*n e"], bias: Float[Array, "e"] | None
) -> tuple[Float[Array, "*n e"], Float[Array, "*n e"]]:
    """Logits and shares of the experts, by the means of the tokens' products."""
    logits = means if bias is None else means + bias
    return logits, jax.nn.softmax(logits, axis=-1)
