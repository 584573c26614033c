"""How far back the queries of a layer look: everywhere, over a sliding window, or within chunks of the text."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gshardx.errors import BadInput

EVERYWHERE = 2**30
"""Earlier positions; more than any text has, and far enough from what an int32 can't hold."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """Which layers are full, that is, see everything, and what the others see.

    Attributes:
        window: the last so many positions, one's own among them (Mistral, arXiv 2310.06825); None: no such limit.
        chunk: the positions of one's own chunk of so many, up to one's own (Llama 4); None: no such limit.
        full_every: every how many layers one is full, the nth first; None: none, if there is a limit, else all.
    """

    window: int | None = None
    chunk: int | None = None
    full_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise BadInput(f"{name} = {value}: must be 1 or more")
        if self.full_every is not None and not self.limited:
            raise BadInput(f"full_every = {self.full_every} without window or chunk: all layers are full; set one")

    @property
    def limited(self) -> bool:
        """Whether any layer may see less than everything."""
        return self.window is not None or self.chunk is not None

    def full(self, layer: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Whether a layer sees everything; of a number that is known while tracing, a bool."""
        if not self.limited or self.full_every is None:
            return not self.limited
        return (layer + 1) % self.full_every == 0

    def of(self, layer: int | Int[Array, ""], positions: Int[Array, "b t"]) -> Int[Array, "b t"] | None:
        """How many earlier positions each token sees; None: all of them."""
        if (full := self.full(layer)) is True:
            return None
        reach = jnp.full_like(positions, EVERYWHERE if self.window is None else self.window - 1)
        if self.chunk is not None:
            reach = jnp.minimum(reach, positions % self.chunk)
        return reach if full is False else jnp.where(full, EVERYWHERE, reach)
