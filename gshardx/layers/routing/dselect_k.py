"""DSelect-k (arXiv 2106.03760): k selectors of one expert each, continuous in their weights and exactly sparse at last.

    z, alpha = x W                                        fp32; z: k times ceil(log2 E) numbers, alpha: k
    S(z) = 0 below -gamma / 2, 1 above gamma / 2, and -2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2 between
    r_i(e) = product over e's binary digits of S(z_ij) where the digit is 1, else 1 - S(z_ij)
    w_e = sum_i softmax(alpha)_i r_i(e)                   expert e is active where w_e > 0
    selector_entropy = mean over tokens of sum_i H(r_i)
    selector_reach = mean over tokens of sum_i 1 / sum_e r_i(e)

At first z is near 0 and all experts are active. Once every |z| is above gamma / 2 a selector has one expert and a token
at most k, fewer where selectors agree; the entropy hastens that. Codes from E to the next power of 2 are no expert's:
``selector_reach`` keeps selectors from them, and is k where E is a power of 2. The paper sums both over the batch.

Shapes are static: the choices are a token's ``most`` largest weights, and those that are 0 want no slot. The logits of
"z" and of the statistics are alpha.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating, Loss, Sums
from gshardx.layers.param import param
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter

_EPSILON = 1e-6
"""In the logarithm and the denominator, as in the paper's code (google-research/dselect_k_moe) in the first."""


@dataclasses.dataclass(frozen=True)
class SelectorEntropy(Loss):
    """Of a token's selectors together, in nats; at best 0. ``own``: selectors, ``[g, s, i, e]``."""

    def sums(self, gating: Gating) -> Sums:
        r = gating.own
        return _over_tokens(-jnp.sum(r * jnp.log(r + _EPSILON), axis=-1), gating)


@dataclasses.dataclass(frozen=True)
class SelectorReach(Loss):
    """1 over what a selector gives to experts that there are, summed over selectors; at best k."""

    def sums(self, gating: Gating) -> Sums:
        return _over_tokens(1 / (gating.own.sum(-1) + _EPSILON), gating)


def _over_tokens(values: Float[Array, "g s i"], gating: Gating) -> Sums:
    real = gating.valid.astype(jnp.float32)
    return jnp.sum(values.sum(-1) * real), real.sum()


class DselectKRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`, whose ``top_k`` is the number of selectors:

    most: experts of a token at most, those with the largest weights; None: all, which early training has.
    gamma: width of the smooth step.
    """

    LOSSES = {  # noqa: RUF012
        **LinearRouter.LOSSES,
        "selector_entropy": SelectorEntropy(),
        "selector_reach": SelectorReach(),
    }

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        most: int | None = None,
        gamma: float = 1.0,
        bias: bool = False,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, rngs=rngs, **common)
        self.most, self.gamma = num_experts if most is None else most, gamma
        if not top_k <= self.most <= num_experts:
            raise BadInput(f"most = {most} is not between top_k = {top_k} and num_experts = {num_experts}")
        if gamma <= 0:
            raise BadInput(f"gamma = {gamma}: must be above 0; the paper has 1.0")
        digits = top_k * (num_experts - 1).bit_length()
        # Of z and alpha, as in the paper's code.
        bounds = np.repeat(np.asarray([gamma / 100, 0.05], np.float32), [digits, top_k])

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * bounds

        self.kernel = param(rngs.params(), "embed router", (width, len(bounds)), init)
        self.bias = param(rngs.params(), "router", bounds.shape, init) if bias else None

    def choices(self, training: bool) -> int:
        return self.most

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        products = self.logits(tokens)
        z, alpha = products[..., : -self.top_k], products[..., -self.top_k :]
        steps = smooth_step(z, self.gamma).reshape(*z.shape[:2], self.top_k, -1)
        selectors = selected(steps, self.num_experts)
        gates = jnp.einsum("gsi,gsie->gse", jax.nn.softmax(alpha, axis=-1), selectors)
        experts = top_k(gates, self.most)
        weights = take(gates, experts)
        made = weights > 0
        gating = Gating(alpha, gates, experts, valid, made=made, own=selectors)
        return self.route(gating, weights, rng=rng, wanted=made & valid[..., None])


def smooth_step(x: Float[Array, "*n"], gamma: float) -> Float[Array, "*n"]:
    """A cubic from 0 to 1, flat at its ends, 0 and 1 beyond them."""
    t = jnp.clip(x / gamma, -0.5, 0.5)
    return jnp.where(t <= -0.5, 0.0, jnp.where(t >= 0.5, 1.0, t * (1.5 - 2 * t * t) + 0.5))


def selected(steps: Float[Array, "g s i digits"], num_experts: int) -> Float[Array, "g s i e"]:
    """Each selector's share of each expert; digits from the highest."""
    count = steps.shape[-1]
    shares = jnp.ones((*steps.shape[:3], num_experts))
    for digit in range(count):
        one = (np.arange(num_experts) >> (count - 1 - digit)) % 2 == 1
        shares *= jnp.where(one, steps[..., digit, None], 1 - steps[..., digit, None])
    return shares
