"""BASE layers (arXiv 2103.16716): each expert gets equally many tokens of each group, those that suit it best together.

    a = x W                                               fp32; affinities
    training:  experts maximise sum_t a[t, expert_t], with at most ceil(tokens / E) tokens of the group each
    inference: each token's largest a
    w = sigmoid(a)                                        of the chosen; no auxiliary loss is needed

An auction finds the assignment. Each round the tokens without a place bid for the expert with the largest a - price,
and bid that expert's price plus what it is better than the next best, plus a step. An expert keeps the highest
ceil(tokens / E) bids; once it has as many, its price is the lowest of them. The step is a 200th of the range of a,
at least 1e-4, and after 1000 rounds the rest is finished faster: tokens left go where there is room. The paper's code
has a 50th and 100 rounds, and experts bid for tokens; with tokens that bid for equal places (Bertsekas and Castanon,
Parallel Computing 12:1) a round sorts s numbers and not e s, and E need not divide the tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.balance import Gating
from gshardx.layers.param import param
from gshardx.layers.routing.choice import assign_slots, take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter
from gshardx.sharding import manual

_STEP = 10
"""What a bid adds at least, in units; affinities are rounded to 200 of these steps, and the auction is one of integers.
Tokens whose affinities differ by rounding alone are then equal, on any mesh, and the earlier one goes first."""
_SMALLEST_STEP = 1e-4
_STEPS = 200
"""In the range. With half as many, and 200 rounds, sums of two tokens an expert fell below 0.99 of the best."""
_ROUNDS = 1000
_BELOW = 2**11
"""More than all affinities: bids of tokens that are left stay below those of the auction."""


class BaseRouter(LinearRouter):
    """Args: those of :class:`LinearRouter`; k is 1. The kernel starts orthogonal with gain 0.1, as in the paper's
    code."""

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs, **common: Any) -> None:
        super().__init__(width, num_experts, 1, rngs=rngs, **common)
        orthogonal = jax.nn.initializers.orthogonal(0.1)
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), orthogonal)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        if rng is None:
            experts = top_k(logits, 1)
        else:  # on each device alone: whether to go on is then no question to the others
            experts = manual(assignment, ("group", "group"), "group", check_vma=False)(units(logits, valid), valid)
        gating = Gating(logits, jax.nn.softmax(logits, axis=-1), experts, valid)
        return self.route(gating, jax.nn.sigmoid(take(logits, experts)), rng=rng)


class Auction(NamedTuple):
    experts: Int[Array, "g s 1"]
    bids: Float[Array, "g s"]
    placed: Bool[Array, "g s"]
    rounds: Int[Array, ""]


def units(affinity: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> Float[Array, "g s e"]:
    """Integers: 0 for the smallest of a group, 2000 for the largest, or less if they are within 200 smallest steps."""
    real, affinity = valid[..., None], jax.lax.stop_gradient(affinity)
    lowest = jnp.where(real, affinity, jnp.inf).min((1, 2), keepdims=True)
    highest = jnp.where(real, affinity, -jnp.inf).max((1, 2), keepdims=True)
    step = jnp.maximum((highest - lowest) / _STEPS, _SMALLEST_STEP)
    rounded = jnp.nan_to_num(jnp.round(_STEP * (affinity - lowest) / step))  # NaN: of a group of padding alone, too
    return jnp.clip(rounded, 0, _STEPS * _STEP)


def assignment(affinity: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> Int[Array, "g s 1"]:
    """The expert of each real token, by an auction. Integers below 2**21 (a round raises the highest price by at most
    201 steps), which fp32 holds exactly."""
    e = affinity.shape[-1]
    number = jnp.arange(e, dtype=jnp.int32)
    room = -(-valid.sum(1, dtype=jnp.int32) // e)[:, None, None]

    def waiting(auction: Auction) -> Bool[Array, ""]:
        return jnp.any(valid & ~auction.placed)

    def bidding(auction: Auction) -> Auction:
        late = auction.rounds >= _ROUNDS
        here = auction.placed[..., None] & (auction.experts == number)
        full = here.sum(1, keepdims=True) == room
        lowest = jnp.where(here, auction.bids[..., None], jnp.inf).min(1, keepdims=True)
        worth = affinity - jnp.where(full, jnp.where(late, jnp.inf, lowest), 0.0)
        best = top_k(worth, 1)
        next_best = jnp.where(number == best, -jnp.inf, worth).max(-1)
        suits = take(affinity, best)[..., 0]
        offer = jnp.where(late, suits - _BELOW, suits - next_best + _STEP)  # the price cancels out
        bidders = valid & ~auction.placed  # padding stays as it is, however long others bid
        experts = jnp.where(bidders[..., None], best, auction.experts)
        bids = jnp.where(bidders, offer, auction.bids)
        place, _ = assign_slots(experts, valid[..., None], e, bids)
        return Auction(experts, bids, valid & (place < room)[..., 0], auction.rounds + 1)

    nothing = jnp.zeros(valid.shape, jnp.int32)
    start = Auction(nothing[..., None], nothing.astype(jnp.float32), jnp.zeros_like(valid), jnp.int32(0))
    return jax.lax.while_loop(waiting, bidding, start).experts
