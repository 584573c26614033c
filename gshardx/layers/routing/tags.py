"""Which task or domain a document is of: that of the tag, a token, in it. What `task` and `demix` share."""

from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.notes import MeanOf
from gshardx.layers.routing.sentence import running_mean


class Tagged:
    """For routers that go by tags; n of them.

    A token's note says which tag it is, if any, so that the mean of a document's notes tells which ones it has.
    """

    keeps_notes = True

    def __init__(self, tags: list[int] | None) -> None:
        if not tags:
            raise BadInput("tags = none: list the ids of the tokens that name the tasks or domains")
        if len(set(tags)) < len(tags):
            raise BadInput(f"tags = {tags}: each must be another token")
        self.tags = tuple(tags)

    def recall(
        self, tokens: Any, ids: Int[Array, "b t"] | None, positions: Any, memory: Any, mean_of: MeanOf
    ) -> tuple[Float[Array, "b t n"], Any]:
        return mean_of(self._notes(ids), memory)

    def _notes(self, ids: Int[Array, "*b t"] | None) -> Float[Array, "*b t n"]:
        """1 where a token is the tag."""
        if ids is None:
            raise BadInput("a router that goes by tags looks at the tokens' ids; give the layer its argument ids")
        return (ids[..., None] == jnp.asarray(self.tags, ids.dtype)).astype(jnp.float32)

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Float[Array, "g s n"] | None = None) -> Any:
        return partial(cast(Any, self), ids=ids, recalled=recalled)

    def seen(
        self, ids: Int[Array, "g s"] | None, recalled: Float[Array, "g s n"] | None, valid: Bool[Array, "g s"]
    ) -> Int[Array, "g s"]:
        """The tag that each token's document has up to there; of several the first of the list; n: none."""
        share = running_mean(self._notes(ids), valid) if recalled is None else recalled
        has = share > 0
        return jnp.where(has.any(-1), jnp.argmax(has, axis=-1), len(self.tags)).astype(jnp.int32)
