"""StableMoE (Dai et al., arXiv 2204.08396): learn who goes where, then leave it at that.

    s = x W;  w = sigmoid(s_a), a the expert that is chosen       fp32
    stage 1: a = argmax s, and a small router learns to say the same of the token's id alone:
             s' = V[id] U,  V [v, 50] and U [50, e] its own;  distillation = cross entropy of softmax(s') with a
    stage 2, from ``steps`` on: a = argmax s' as it is then, whatever is trained after it

balance, of a group of T tokens, n_e of them at e: 1 + 1/T sum_e (E n_e / T - 1) sum over e's tokens of sigmoid(s_e);
the paper's but for the 1, which makes it 1.0 at balance. Stage 2 has neither loss.

The state counts steps. When stage 2 begins it takes up the expert of every id, so that no momentum of the optimizer and
no weight decay can move a token afterwards, and a resumed run is in the stage that it left.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating, Loss, Sums
from gshardx.layers.param import param
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter, normalised
from gshardx.sharding import shard


class StageState(NamedTuple):
    """step: optimizer steps so far, at most ``steps + 1``. table: the expert of each id in stage 2; before it, 0."""

    step: Int[Array, ""]
    table: Int[Array, "v"]


@dataclasses.dataclass(frozen=True)
class AssignedBalanceLoss(Loss):
    """Mean over groups, weighed by their tokens; ``n_e`` has no gradient."""

    def sums(self, gating: Gating) -> Sums:
        real, e = gating.valid.astype(jnp.float32), gating.logits.shape[-1]
        here = (gating.experts == jnp.arange(e, dtype=jnp.int32)) * real[..., None]
        excess = e * here.sum(1) / jnp.maximum(real.sum(1), 1.0)[:, None] - 1.0
        return real.sum() + jnp.einsum("gse,gse,ge->", jax.nn.sigmoid(gating.logits), here, excess), real.sum()


@dataclasses.dataclass(frozen=True)
class DistillationLoss(Loss):
    """Cross entropy of what the small router makes of tokens with their experts; ``own``: its logits ``[g, s, e]``."""

    def sums(self, gating: Gating) -> Sums:
        real = gating.valid.astype(jnp.float32)
        missed = jax.nn.logsumexp(gating.own, axis=-1) - take(gating.own, gating.experts)[..., 0]
        return jnp.sum(missed * real), real.sum()


class StableRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (k is 1):

    steps: of stage 1.
    dimension: of the small router's embedding.
    vocab: v; a decoder's own.
    """

    LOSSES = {**LinearRouter.LOSSES, "balance": AssignedBalanceLoss(), "distillation": DistillationLoss()}  # noqa: RUF012

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        steps: int = 6000,
        dimension: int = 50,
        vocab: int | None,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        for name, value in (("steps", steps), ("dimension", dimension)):
            if value < 1:
                raise BadInput(f"{name} = {value}: must be 1 or more")
        if vocab is None:
            raise BadInput("stable learns an expert for each id; give the vocabulary's size as vocab")
        super().__init__(width, num_experts, 1, rngs=rngs, **common)
        directions = jax.nn.initializers.orthogonal(0.1)  # in the released code; words are N(0, 1)
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), directions)
        self.words = param(rngs.params(), "token router", (vocab, dimension), jax.nn.initializers.normal(1.0))
        self.directions = param(rngs.params(), "latent router", (dimension, num_experts), directions)
        self.steps, self.vocab = steps, vocab

    def initial_state(self) -> StageState:
        return StageState(jnp.zeros((), jnp.int32), jnp.zeros(self.vocab, jnp.int32))

    def after_step(self, state: StageState) -> StageState:
        return state._replace(step=jnp.minimum(state.step + 1, self.steps + 1))

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Any = None) -> Any:
        return self if ids is None else partial(self, ids=ids)

    def __call__(
        self,
        tokens: Float[Array, "g s m"],
        valid: Bool[Array, "g s"],
        rng: Array | None,
        state: StageState,
        *,
        ids: Int[Array, "g s"] | None = None,
    ) -> Routing:
        if ids is None:
            raise BadInput("router stable learns from the tokens' ids; give the layer its argument ids")
        logits, words = self.logits(tokens), self.words[...]
        first = state.step < self.steps
        table = jax.lax.cond(state.step == self.steps, self._all_words, lambda _: state.table, words)
        experts = jnp.where(first, top_k(logits, 1)[..., 0], table[ids])[..., None]
        scores = jax.nn.sigmoid(logits)
        distilled = self.product(shard(words[ids], "group token model"), self.directions)
        gating = Gating(logits, normalised(scores, 1e-20), experts, valid, own=distilled)
        state = StageState(state.step, table)
        routing = self.route(gating, take(scores, experts), rng=rng, state=state)
        on, losses, sums = first.astype(jnp.float32), dict(routing.losses), dict(routing.loss_sums)
        for name in {"balance", "distillation"} & set(losses):
            losses[name], sums[name] = on * losses[name], (on * sums[name][0], sums[name][1])
        return dataclasses.replace(routing, losses=losses, loss_sums=sums)

    def _all_words(self, words: Float[Array, "v d"]) -> Int[Array, "v"]:
        return top_k(self.product(words[None], self.directions), 1)[0, :, 0]
