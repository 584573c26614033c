"""How tokens reach experts that are split over devices, in inference: what sends, then what reads, the fewest bytes."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.layers import Dense, Dispatcher, Gather

EXCHANGES = ("replicate", "sliced", "all_to_all")
NARROWEST = 64
"""Hidden units of a slice at least: products with fewer columns leave the units that multiply half empty."""


class Exchange(NamedTuple):
    """sent: bytes that a device sends for each of its tokens, in a layer.
    read: experts whose weights the busiest device may have to read for a decoding step.
    sliced: each device has a part of every expert's hidden units, instead of all of some experts.
    """

    name: str
    dispatcher: Dispatcher
    sent: float
    read: float
    sliced: bool = False


def exchanges(config: ModelConfig, mesh: Mesh, rows: int) -> list[Exchange]:
    """Ways that the mesh and the model allow.

    What is sent grows with the tokens alike in all, so that one is best for every bucket, and all buckets give the same
    bits. Without drops an expert has a slot for each token.

    Args:
        rows: sequences at once, on all devices.
    """
    moe, size, devices = config.moe, jnp.dtype(config.dtype).itemsize, mesh.shape["expert"]
    others, chosen = devices - 1, min(moe.num_experts, rows * moe.top_k)
    some = min(chosen, moe.num_experts / devices)
    # Tokens to all devices in their own type, and sums of fp32 back.
    shown = others * config.width * (size + 4)
    # A slot for each token at each expert, there and back.
    slots = 2 * others / devices * moe.num_experts * config.width * size
    ways = [Exchange("replicate", Dense(), shown, some), Exchange("all_to_all", Gather(), slots, some)]
    parts = devices * mesh.shape["tensor"]
    if moe.hidden % parts == 0 and moe.hidden // parts >= NARROWEST:  # MoEShard (arXiv 2503.08467)
        ways.append(Exchange("sliced", Dense(), shown, chosen / devices, sliced=True))
    return ways


def choose_exchange(config: ModelConfig, mesh: Mesh, rows: int, wanted: str | None = None) -> Exchange:
    """The one named ``wanted``, or that of fewest bytes; on one device, where nothing is sent, the first.

    Raises:
        BadInput: ``wanted`` can't be done.
    """
    ways = exchanges(config, mesh, rows)
    if wanted is None:
        return min(ways, key=lambda way: (way.sent, math.ceil(way.read)))
    for way in ways:
        if way.name == wanted:
            return way
    parts = mesh.shape["expert"] * mesh.shape["tensor"]
    raise BadInput(
        f"exchange = {wanted}: {config.moe.hidden} hidden units of an expert do not make {parts} slices of {NARROWEST} "
        f"or more; use {' or '.join(way.name for way in ways)}"
    )
