"""Token rounding (SonicMoE, arXiv 2512.14080): as many tokens for each expert as fill whole tiles of a grouped product.

    n_e: the group's tokens that chose expert e;  r_e: the multiple of the tile nearest to n_e, the even one of two
    fewer: of those that chose e, the r_e with the largest gates stay
    more:  those with the largest gates among the others join, r_e - n_e of them

Of equal gates the earlier token's counts as larger. An expert has at most half a tile more or fewer than chose it;
where a group has too few tokens that could join, less than a tile fewer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput


def rounded(
    chosen: Bool[Array, "g s e"], could: Bool[Array, "g s e"], gates: Float[Array, "g s e"], tile: int
) -> Bool[Array, "g s e"]:
    """Whom each expert takes.

    Args:
        chosen: who chose it.
        could: who may go there, those who chose it among them.
        gates: who is taken first.
        tile: what each expert's tokens of a group are a multiple of.
    """
    tiles, rest = jnp.divmod(chosen.sum(1, keepdims=True), tile)
    up = (2 * rest > tile) | ((2 * rest == tile) & (tiles % 2 == 1))
    enough = (tiles + 1) * tile <= could.sum(1, keepdims=True)
    count = (tiles + (up & enough)) * tile
    order = jnp.lexsort((-jax.lax.stop_gradient(gates), ~chosen, ~could), axis=1)
    return jnp.argsort(order, axis=1) < count


def check_tile(tile: int, tokens: int, top_k: int, num_experts: int) -> None:
    """Raise BadInput if an expert's mean number of a group's ``tokens`` is below a tile: most would round to none."""
    mean = tokens * top_k // num_experts
    if tile > max(mean, 1):
        raise BadInput(
            f"round_to = {tile}: of a group of {tokens} tokens an expert has {mean} on average, and most would round "
            f"to 0; use {max(mean, 1)} or less, or a larger model.moe.group_size"
        )
