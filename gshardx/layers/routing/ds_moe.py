"""DS-MoE's routing (arXiv 2404.05567): dense in training, sparse at inference.

    p = softmax(x W)                                      fp32
    training: every expert, w = p
    inference: the k largest of p, w = p                  not divided by their sum
    mutual_information = -H(mean p) + mean H(p)           H: entropy; the mean is over the batch

All experts have a gradient from each token. The loss makes a token's gates few (the second term) and the experts' loads
even (the first), so that leaving out all but k at inference changes little.

"balance" and the other losses judge the k largest, as inference will choose: in training all are chosen alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import Gating, Loss, Sums
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


@dataclasses.dataclass(frozen=True)
class MutualInformationLoss(Loss):
    """``-H(mean gate) + mean H(gate)``: minus what tokens say about experts, in nats. For any router.

    0 if all tokens have the same gates; ``-ln e`` if each has one expert, and all experts as many tokens.
    """

    def sums(self, gating: Gating) -> Sums:
        real = gating.valid.astype(jnp.float32)
        return jnp.einsum("gse,gs->e", gating.gates, real), jnp.sum(_certainty(gating.gates) * real), real.sum()

    def value(self, sums: Sums) -> Float[Array, ""]:
        gate, certainty, tokens = sums
        tokens = jnp.maximum(tokens, 1.0)
        return _certainty(gate / tokens) - certainty / tokens


def _certainty(gates: Float[Array, "*g e"]) -> Float[Array, "*g"]:
    """``ln e - H``: at first gates are near uniform, and entropies near ln e would cancel out but for their rounding.
    The gradient is finite where a gate is 0."""
    return jnp.sum(gates * jnp.log(jnp.maximum(gates * gates.shape[-1], 1e-30)), axis=-1)


class DsMoeRouter(LinearRouter):
    """Args: those of :class:`LinearRouter`; ``top_k`` is of inference."""

    def choices(self, training: bool) -> int:
        return self.num_experts if training else self.top_k

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        gating = Gating(logits, gates, top_k(logits, self.choices(rng is not None)), valid)
        chosen_later = gating._replace(experts=gating.experts[..., : self.top_k])
        return self.route(gating, take(gates, gating.experts), rng=rng, judged=chosen_later)
