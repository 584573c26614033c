"""ReMoE's routing (arXiv 2412.14711): a ReLU instead of a softmax and a choice, continuous in the router's weights.

    w = ReLU(x W)                                         fp32; the expert is active where w > 0
    y = sum_e w_e E_e(x)                                  a token that no expert is active for: y = 0
    sparsity = lambda / T sum_t sum_e f_e w_te            f_e = E / (k T) * tokens that e is active for
    after each step: lambda *= growth ** sign(active experts a token - k), over all layers; lambda starts at 1e-8

How many experts are active differs from token to token; lambda brings their mean over tokens and layers to k. f has no
gradient: it presses hardest on the busiest experts, which balances them. lambda is in the router state and ``sparsity``
has it already, so that the weight is 1. It is a loss beside "balance", as at balance it is whatever lambda makes it.

Shapes are static: the choices are a token's ``most`` largest gates, and those that are 0 want no slot. "balance" has
the active experts for f, and the mean gates of a softmax: the gradient of a ReLU's share of a small sum has no bound.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating, Loss, Sums, evenness
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter

_LAMBDA = 1e-20, 1e20
"""Its bounds: 0 and infinity would stay what they are."""


class SparsityState(NamedTuple):
    """coefficient: lambda. active: gates above 0 since the last step, all devices; tokens: that they are of."""

    coefficient: Float[Array, ""]
    active: Float[Array, ""]
    tokens: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SparsityLoss(Loss):
    """``E / T**2 sum_e n_e sum_t w_te``, n_e the tokens that e is active for; the router puts lambda / k to it."""

    def sums(self, gating: Gating) -> Sums:
        real = gating.valid.astype(jnp.float32)
        gates = jax.nn.relu(gating.logits) * real[..., None]
        return (gates > 0).astype(jnp.float32).sum((0, 1)), gates.sum((0, 1)), real.sum()


class ReluRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`, whose ``top_k`` is the mean that active experts are brought to:

    most: experts of a token at most, those with the largest gates; None: all.
    start: the first lambda.
    growth: what a step multiplies it by, or divides it by.
    """

    LOSSES = {**LinearRouter.LOSSES, "sparsity": SparsityLoss()}  # noqa: RUF012

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        most: int | None = None,
        start: float = 1e-8,
        growth: float = 1.2,
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, **common)
        self.most = num_experts if most is None else most
        self.start, self.growth = start, growth
        if not top_k <= self.most <= num_experts:
            raise BadInput(f"most = {most} is not between top_k = {top_k} and num_experts = {num_experts}")
        if start <= 0 or growth <= 1:
            raise BadInput(f"start = {start}, growth = {growth} make nothing sparse; use 1e-8 and 1.2")

    def choices(self, training: bool) -> int:
        return self.most

    def initial_state(self) -> SparsityState:
        return SparsityState(jnp.full((), self.start), jnp.zeros(()), jnp.zeros(()))

    def after_step(self, state: SparsityState) -> SparsityState:
        """Of one layer, or of all, stacked: they share lambda."""
        too_many = jnp.sign(state.active.sum() - self.top_k * state.tokens.sum())
        coefficient = jnp.clip(state.coefficient * self.growth**too_many, *_LAMBDA)
        return SparsityState(coefficient, jnp.zeros_like(state.active), jnp.zeros_like(state.tokens))

    after_step_of_layers = after_step

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: SparsityState
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.relu(logits)
        experts = top_k(logits, self.most)
        weights = take(gates, experts)
        active = weights > 0
        total = gates.sum(-1, keepdims=True)
        gating = Gating(logits, gates / jnp.where(total > 0, total, 1.0), experts, valid, made=active)
        routing = self.route(
            gating,
            weights,
            rng=rng,
            judged=gating._replace(gates=jax.nn.softmax(logits, axis=-1)),
            wanted=active & valid[..., None],
        )
        counts, mass, real = SparsityLoss().sums(gating)
        scaled = counts, state.coefficient / self.top_k * mass, real
        return dataclasses.replace(
            routing,
            losses=routing.losses | {"sparsity": evenness(*scaled)},
            loss_sums=routing.loss_sums | {"sparsity": scaled},
            state=SparsityState(state.coefficient, state.active + counts.sum(), state.tokens + real),
        )

    def _priority(self, gating: Gating, rng: Array | None) -> Float[Array, "g s"] | None:
        """By the gate itself: its share is 1 for every token with one active expert."""
        return super()._priority(gating._replace(gates=jax.nn.relu(gating.logits)), rng)
