"""SMoE-Dropout (arXiv 2303.01610): a random router that is never trained, and more and more experts a token.

    z = x W                                               fp32; W stays as it was drawn
    k(t) = fewest + round((top_k - fewest) t / steps)     t: optimizer steps so far; top_k from ``steps`` on
    chosen: the k(t) largest of z;  w = softmax of z over the chosen

Every expert learns to do with any number of others beside it, so that a model may be served with fewer than it was
trained with (``serve``) and gets better with each. t is in the router's state: a resumed run goes on where k was.

Shapes are static: a token has ``top_k`` choices from the first step on, and those beyond k(t) want no slot.
"""

from bisect import bisect_left
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter


class ScheduleState(NamedTuple):
    """step: optimizer steps so far, at most ``steps``."""

    step: Int[Array, ""]


class SmoeDropoutRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`, whose ``top_k`` is reached at last:

    fewest: experts of a token in the first step.
    steps: after which a token has ``top_k``.
    serve: experts of a token at inference; None: ``top_k``.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        fewest: int = 1,
        steps: int = 10_000,
        serve: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, **common)
        self.serve = top_k if serve is None else serve
        for name, value in (("fewest", fewest), ("serve", self.serve)):
            if not 1 <= value <= top_k:
                raise BadInput(f"{name} = {value} is not between 1 and top_k = {top_k}")
        if steps < 1:
            raise BadInput(f"steps = {steps}: must be 1 or more")
        self.steps, self.fewest = steps, fewest
        self.grows_at = tuple(grows_at(fewest, top_k, steps))

    def choices(self, training: bool) -> int:
        return self.top_k if training else self.serve

    def initial_state(self) -> ScheduleState:
        return ScheduleState(jnp.zeros((), jnp.int32))

    def after_step(self, state: ScheduleState) -> ScheduleState:
        return ScheduleState(jnp.minimum(state.step + 1, self.steps))

    def product(self, tokens: Float[Array, "g s m"], kernel: nnx.Param[Array] | Array) -> Float[Array, "g s e"]:
        """Tokens have a gradient, the kernel has none."""
        return super().product(tokens, jax.lax.stop_gradient(kernel[...]))

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: ScheduleState
    ) -> Routing:
        k = self.choices(training=rng is not None)
        logits = self.logits(tokens)
        experts = top_k(logits, k)
        now = self.fewest + jnp.sum(state.step >= jnp.asarray(self.grows_at, jnp.int32)) if rng is not None else k
        made = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32) < now, experts.shape)
        weights = jax.nn.softmax(jnp.where(made, take(logits, experts), -jnp.inf), axis=-1)
        gating = Gating(logits, jax.nn.softmax(logits, axis=-1), experts, valid, made=made)
        return self.route(gating, weights, rng=rng, wanted=made & valid[..., None], state=state)


def grows_at(fewest: int, most: int, steps: int) -> list[int]:
    """The steps in which tokens get one expert more, from ``fewest`` to ``most``; exact, where fp32 is not."""

    def k(step: int) -> int:
        return fewest + round(Fraction((most - fewest) * step, steps))

    return [bisect_left(range(steps + 1), number, key=k) for number in range(fewest + 1, most + 1)]
