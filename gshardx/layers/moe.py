"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Sums
from gshardx.layers.dispatch import Dispatcher
from gshardx.layers.draws import dropout, folded, group_keys, row_keys, thinned
from gshardx.layers.kinds import Kinds
from gshardx.layers.routing import Losses, Router, RouterState, RouterStats
from gshardx.layers.shared import Beside, nothing
from gshardx.sharding import shard

_AT_OUTPUT, _AT_TOKENS = 2**32 - 1, 2**32 - 3
"""Where routers fold small numbers into a group's key, the masking of outputs and the dropping of tokens fold these."""


class MoEMetrics(NamedTuple):
    """What a layer returns beside its output; everything gains a leading layer axis once stacked."""

    losses: Losses
    """Unweighted; "balance" is 1.0 at perfect balance."""
    loss_sums: dict[str, Sums]
    stats: RouterStats
    state: RouterState
    """For the next call; between optimizer steps, ``router.after_step(state)``."""
    experts: Int[Array, "*layer b t k"]
    """Each token's choices, kept or not: for routing traces."""
    kept: Bool[Array, "*layer b t k"]


class MoE(nnx.Module):
    """``[b, t, m] -> ([b, t, m], MoEMetrics)``.

    Args:
        router: who.
        dispatcher: how.
        experts: what: :class:`Experts`, or merged ones, which take what :class:`Dense` dispatches.
        beside: joins a dense network: :class:`Shared`, :class:`GatedShared`, :class:`Residual`.
        group_size: tokens that compete for slots; divides b * t. None: each sequence is a group.
        kinds: experts that are computed where tokens are, if the router has some (``kinds_of``).
    """

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        experts: Any,
        beside: Beside = nothing,
        *,
        group_size: int | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self.router, self.dispatcher, self.experts = router, dispatcher, experts
        self.beside, self.group_size, self.kinds = beside, group_size, kinds
        self.place: nnx.Param[Array] | None = None  # where each expert is, int32 [e], once they may move (inference)

    def __call__(
        self,
        x: Float[Array, "b t m"],
        valid: Bool[Array, "b t"],
        rng: Array | None,
        state: RouterState = (),
        ids: Int[Array, "b t"] | None = None,
        recalled: Float[Array, "b t n"] | None = None,
    ) -> tuple[Float[Array, "b t m"], MoEMetrics]:
        """Padding (``valid`` False) takes no slot, and no routed expert adds to it.

        With ``rng`` None (inference) each row is its own group and, unless the router's capacity says otherwise, has a
        slot for every choice: nothing is dropped, and a token's output depends on no other token; else it is a key, or
        one a row. ``state`` is the router's: ``router.initial_state()`` at first, ``()`` for routers without one.
        ``ids`` are the tokens', and ``recalled`` the means of their documents' notes so far, for routers that ask.
        """
        b, t, m = x.shape
        s = t if rng is None else self.group_size or t
        if b * t % s:
            raise BadInput(f"x {list(x.shape)}: group_size = {s} does not divide its {b * t} tokens; use a divisor")
        tokens = shard(x.reshape(b * t // s, s, m), "group token model")
        with jax.named_scope("gate"):
            keys = None if rng is None else group_keys(row_keys(rng, b), t, s)
            at_output, at_tokens = (None if keys is None else folded(keys, site) for site in (_AT_OUTPUT, _AT_TOKENS))
            grouped = (None if x is None else x.reshape(-1, s, *x.shape[2:]) for x in (ids, recalled))
            router = self.router.reading(*grouped)
            routing = router(tokens, thinned(valid.reshape(-1, s), at_tokens, self.router.token_drop), keys, state)
            masked = dropout(routing.weights, at_output, self.router.output_masking)
            routing = dataclasses.replace(routing, weights=masked)
        if routing.stretch is not None and t % s:
            raise BadInput(f"group_size = {s}: experts are merged for stretches of a row of {t} tokens; use a divisor")
        choices, kept = (x.reshape(b, t, -1) for x in (routing.experts, routing.keep))
        if self.place is not None:
            routing = dataclasses.replace(routing, experts=self.place[...][routing.experts])
        with jax.named_scope("dispatch"):
            expert_in = self.dispatcher.dispatch(tokens, routing)
        expert_out = self.experts(expert_in)
        with jax.named_scope("combine"):
            routed = self.dispatcher.combine(expert_out, routing)
            if routing.local is not None:
                if self.kinds is None:
                    raise BadInput("MoE: its router has experts of other kinds; give kinds=kinds_of(router, width)")
                routed += self.kinds(tokens, routing.local)
        out = shard(self.beside(x, routed.reshape(b, t, m)), "batch time model")
        return out, MoEMetrics(routing.losses, routing.loss_sums, routing.stats, routing.state, choices, kept)
