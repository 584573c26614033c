"""How tokens reach experts that are split over devices, in inference: what sends the fewest bytes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from gshardx.config import ModelConfig
from gshardx.layers import Dense, Dispatcher, Gather


class Exchange(NamedTuple):
    """bytes: that a device sends for each of its tokens, in a layer."""

    name: str
    dispatcher: Dispatcher
    bytes: float


def exchanges(config: ModelConfig, devices: int) -> list[Exchange]:
    """Ways for experts that are split over so many devices; without drops an expert has a slot for each token.

    Both grow with the tokens alike, so that one is best for every bucket, and all buckets give the same bits.
    """
    moe, size = config.moe, jnp.dtype(config.dtype).itemsize
    value, others = config.width, devices - 1
    return [
        # Tokens to all devices in their own type, and sums of fp32 back.
        Exchange("replicate", Dense(), others * value * (size + 4)),
        # A slot for each token at each expert, there and back.
        Exchange("all_to_all", Gather(), 2 * others / devices * moe.num_experts * value * size),
    ]


def choose_exchange(config: ModelConfig, mesh: Mesh) -> Exchange:
    """The one of fewest bytes; the first of equals, which on one device moves nothing at all."""
    return min(exchanges(config, mesh.shape["expert"]), key=lambda way: way.bytes)
