"""Sentence-level routing (Kudugunta et al., arXiv 2110.03742): experts are chosen for the sentence, not for the token.

    z = mean over the sentence of x_s W                   fp32; the mean of x times W, as W is linear
    p = softmax(z) over experts;  chosen: the k largest;  w = p over their sum

The paper's encoder takes the whole sentence. Here the mean is over what a token's attention sees: of a decoder the
token itself and the earlier ones of its document, so that no choice hangs on what comes later. Choices change while a
document is young and settle as it grows. The tokens' own scores are the notes that a decoder's cache keeps.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.notes import MeanOf
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.top_k import TopKRouter


class SentenceRouter(TopKRouter):
    """Args as :class:`TopKRouter`. Where nobody recalls notes (a layer outside of a model), a group is a sentence."""

    keeps_notes = True

    def recall(
        self, tokens: Float[Array, "b t m"], ids: Any, positions: Any, memory: Any, mean_of: MeanOf
    ) -> tuple[Float[Array, "b t e"], Any]:
        return mean_of(self.logits(tokens), memory)

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Float[Array, "g s e"] | None = None) -> Any:
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
        logits = running_mean(self.logits(tokens), valid) if recalled is None else recalled
        return self.choose(logits, valid, rng)


def running_mean(notes: Float[Array, "g s n"], valid: Bool[Array, "g s"]) -> Float[Array, "g s n"]:
    """Of each token's notes and those before it in its group; padding has none."""
    total = jnp.cumsum(jnp.where(valid[..., None], notes, 0.0), axis=1)
    return total / jnp.maximum(jnp.cumsum(valid, axis=1), 1)[..., None]
