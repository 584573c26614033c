"""What the device computes: one call over any tokens (``step``), and several tokens in turn for each row (``decode``).

Both are the training model's own forward pass over a paged cache, and both multiply at most ``tile`` rows at a time on
each device: a call of more tokens goes over its tiles one after the other, as often as there are tokens. So few sizes
of matrix products occur, and :mod:`gshardx.infer.programs` can see to it that all of them give the same bits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from gshardx.errors import BadInput
from gshardx.infer.buffer import Layout
from gshardx.infer.request import MAX_STOP_TOKENS
from gshardx.infer.sampling import TOP, Context, Draw, Drawn, draw
from gshardx.layers import Paged, Pool, abstract_pool, has_kernel
from gshardx.models.attention import kept
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import abstract_array, shard


class Sizes(NamedTuple):
    """What programs are compiled for.

    shards: of the mesh's batch axes, b. slots: sequences at once on each. pages: of each, with page 0. page_size:
    tokens of a page. max_length: of a sequence. tile: rows of a matrix product. steps: tokens that a row draws in one
    call of ``decode`` at most. kv_dtype: of keys and values; None: the model's. attention: "xla" or "pallas".
    """

    shards: int
    slots: int
    pages: int
    page_size: int
    max_length: int
    tile: int
    steps: int
    kv_dtype: str | None = None
    attention: str = "xla"

    @property
    def table(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_length // self.page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """What the device keeps from call to call; donated to each. The last slot is nobody's.

    pools: pages, as in :class:`gshardx.layers.Paged`. last: the newest token of each slot. history, bias, allowed:
    as :class:`gshardx.infer.sampling.Context`, for each slot.
    """

    pools: tuple[Pool, ...]
    last: Int[Array, "b slots"]
    history: Int[Array, "b slots v"]
    bias: Float[Array, "b slots v"]
    allowed: UInt32[Array, "b slots words"]


def abstract_state(blueprint: Blueprint, sizes: Sizes, mesh: Mesh) -> DeviceState:
    """Shapes, dtypes and shardings.

    Raises:
        BadInput: there is no kernel for such pages.
    """
    config = blueprint.config
    heads, width, values = kept(config)
    pool = (sizes.shards, sizes.pages, heads, sizes.page_size, width)
    by_slot = (sizes.shards, sizes.slots + 1)

    def place(shape: tuple[int, ...], dtype: str, axes: str) -> Any:
        return abstract_array(shape, jnp.dtype(dtype), axes.split(), mesh, tensor="engine state")

    kv_dtype, platform = sizes.kv_dtype or config.dtype, mesh.devices.flat[0].platform
    kernel = platform if sizes.attention == "pallas" else None
    if kernel and values is None and not has_kernel(kernel, kv_dtype, sizes.page_size, width):
        raise BadInput(
            f"attention = pallas: there is no kernel of a {platform} for {kv_dtype} pages of {sizes.page_size} tokens "
            f"and heads of {width}; use xla"
        )
    return DeviceState(
        pools=tuple(abstract_pool(kv_dtype, pool, kernel, place, values) for _ in range(blueprint.memory_layers)),
        last=place(by_slot, "int32", "batch slot"),
        history=place((*by_slot, blueprint.vocab), "int32", "batch slot model"),
        bias=place((*by_slot, blueprint.vocab), "float32", "batch slot model"),
        allowed=place((*by_slot, mask_words(blueprint.vocab)), "uint32", "batch slot model"),
    )


def row_fields(sizes: Sizes, rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of each sequence in a call: its slot, its pages, its settings, and the tokens that end it, -1 for none."""
    by_row = (sizes.shards, rows)
    return {
        "slot": (by_row, "int32"),
        "table": ((*by_row, sizes.table), "int32"),
        "stop": ((*by_row, MAX_STOP_TOKENS), "int32"),
        "temperature": (by_row, "float32"),
        "top_k": (by_row, "int32"),
        "top_p": (by_row, "float32"),
        "min_p": (by_row, "float32"),
        "repetition": (by_row, "float32"),
        "presence": (by_row, "float32"),
        "frequency": (by_row, "float32"),
        "seed": (by_row, "uint32"),
        "choice": (by_row, "uint32"),
        "biased": (by_row, "int32"),
        "constrained": (by_row, "int32"),
        "alternatives": (by_row, "int32"),
    }


def step_layout(sizes: Sizes, tokens: int, samples: int) -> Layout:
    """Input of ``step``: ``tokens`` tokens of up to ``slots`` sequences, and up to ``samples`` places to draw at.

    token -1: the newest one of its slot. position -1: padding. sample: an index into the tokens; sample_row: into the
    rows; sample_slot: where to note the token as the newest of its slot; target: the token there where it is known,
    else -1.
    """
    by_token, by_sample = (sizes.shards, tokens), (sizes.shards, samples)
    return Layout(
        {
            "tiles": ((), "int32"),
            "sample_tiles": ((), "int32"),
            "longest": ((), "int32"),
            "token": (by_token, "int32"),
            "row": (by_token, "int32"),
            "position": (by_token, "int32"),
            "sample": (by_sample, "int32"),
            "sample_row": (by_sample, "int32"),
            "sample_slot": (by_sample, "int32"),
            "target": (by_sample, "int32"),
            **row_fields(sizes, min(tokens, sizes.slots)),
        }
    )


def decode_layout(sizes: Sizes, rows: int) -> Layout:
    """Input of ``decode``: of each row its newest token (-1: that of its slot), its position (-1: none there), and how
    many tokens it may draw; ``steps`` of the whole call.
    """
    by_row = (sizes.shards, rows)
    return Layout(
        {
            "steps": ((), "int32"),
            "longest": ((), "int32"),
            "token": (by_row, "int32"),
            "position": (by_row, "int32"),
            "limit": (by_row, "int32"),
            **row_fields(sizes, rows),
        }
    )


def result_layout(sizes: Sizes, steps: int, rows: int, blueprint: Blueprint) -> Layout:
    """Output of both: ``steps`` tokens for each of ``rows`` places, and the experts that the token before each went to.
    For each shard, ``load``: how many choices each expert of each layer took in the whole call, and last how many none
    did."""
    shape, top = (steps, sizes.shards, rows), min(TOP, blueprint.vocab)
    stack = blueprint.bind(blueprint.params).stack
    return Layout(
        {
            "token": (shape, "int32"),
            "logprob": (shape, "float32"),
            "best": ((*shape, top), "int32"),
            "best_logprob": ((*shape, top), "float32"),
            "finite": (shape, "int32"),
            "experts": ((*shape, stack.count, stack.router.choices(training=False)), "int32"),
            "load": ((sizes.shards, stack.count, stack.router.num_experts + 1), "int32"),
        }
    )


def step(
    blueprint: Blueprint, sizes: Sizes, variables: Variables, state: DeviceState, given: dict[str, Array]
) -> tuple[DeviceState, dict[str, Array]]:
    """Store all tokens, tile by tile, and draw at the samples' places."""
    model = blueprint.bind(variables.params)
    token, row, position = (shard(given[name], "batch time") for name in ("token", "row", "position"))
    slot = _of_row(given["slot"], row)
    token = jnp.where(token < 0, jnp.take_along_axis(state.last, slot, axis=1), token)
    table, tile = shard(given["table"], "batch time slot"), min(sizes.tile, token.shape[1])

    layout = result_layout(sizes, 1, given["sample"].shape[1], blueprint)
    results = _nothing(layout)

    def compute(number: Array, carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        found, experts, load, pools = carry
        here = [jax.lax.dynamic_slice_in_dim(x, number * tile, tile, axis=1) for x in (token, row, position)]
        hidden, pools, chosen, kept = _forward(model, variables, pools, table, given["longest"], *here)
        found = jax.lax.dynamic_update_slice_in_dim(found, hidden, number * tile, axis=1)
        experts = jax.lax.dynamic_update_slice_in_dim(experts, chosen, number * tile, axis=1)
        return found, experts, load + _counted(chosen, kept, here[-1], load), pools

    empty = jnp.zeros((*token.shape, blueprint.config.width), jnp.dtype(model.logits_dtype))
    nobody = jnp.zeros((*token.shape, *results["experts"].shape[3:]), jnp.int32)
    carry = (shard(empty, "batch time model"), _by_row(nobody), _by_row(results.pop("load")), state.pools)
    hidden, experts, load, pools = jax.lax.fori_loop(0, given["tiles"], compute, carry)

    state = dataclasses.replace(state, pools=pools)
    at = jnp.take_along_axis(position, given["sample"], axis=1) + 1
    places = min(sizes.tile, given["sample"].shape[1])

    def draw_some(number: Array, results: Any) -> Any:
        sample, row, new, target = (
            jax.lax.dynamic_slice_in_dim(x, number * places, places, axis=1)
            for x in (given["sample"], given["sample_row"], at, given["target"])
        )
        sampled = jnp.take_along_axis(hidden, sample[..., None], axis=1)
        chosen = jnp.take_along_axis(experts, sample[..., None, None], axis=1)
        rows = {name: _of_row(given[name], row) for name in (*Draw._fields, "slot")}
        drawn = _result(_draw(model, sizes, state, shard(sampled, "batch time model"), rows, new, target), chosen)
        return {
            name: jax.lax.dynamic_update_slice_in_dim(results[name], drawn[name], number * places, axis=2)
            for name in results
        }

    results = jax.lax.fori_loop(0, given["sample_tiles"], draw_some, results)
    return _noted(state, given["sample_slot"], results["token"][0]), {**results, "load": load}


def decode(
    blueprint: Blueprint, sizes: Sizes, variables: Variables, state: DeviceState, given: dict[str, Array]
) -> tuple[DeviceState, dict[str, Array]]:
    """Store each row's newest token and draw the next one, ``steps`` times; a row stops at its limit or its stop."""
    model = blueprint.bind(variables.params)
    given = {name: shard(x, " ".join(["batch", "time", "slot"][: x.ndim])) for name, x in given.items()}
    slot, table, rows = given["slot"], given["table"], {name: given[name] for name in (*Draw._fields, "slot")}
    token = jnp.where(given["token"] < 0, jnp.take_along_axis(state.last, slot, axis=1), given["token"])
    row = jnp.broadcast_to(jnp.arange(token.shape[1], dtype=jnp.int32), token.shape)
    results = _nothing(result_layout(sizes, sizes.steps, token.shape[1], blueprint))
    unknown = jnp.full_like(token, -1)

    def once(number: Array, carry: tuple[Any, Array, Array, Array, Any]) -> tuple[Any, Array, Array, Array, Any]:
        state, token, position, load, results = carry
        pools, pieces = state.pools, list[tuple[Array, Array, Array]]()
        for first in range(0, token.shape[1], sizes.tile):
            here = [x[:, first : first + sizes.tile] for x in (token, row, position)]
            hidden, pools, chosen, kept = _forward(model, variables, pools, table, given["longest"], *here)
            pieces.append((hidden, chosen, kept))
        state = dataclasses.replace(state, pools=pools)
        hidden, chosen, kept = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
        drawn = _draw(model, sizes, state, hidden, rows, position + 1, unknown)
        state = _noted(state, jnp.where(position < 0, sizes.slots, slot), drawn.token)
        new, load = _result(drawn, chosen), load + _counted(chosen, kept, position, load)
        results = {
            name: jax.lax.dynamic_update_slice_in_dim(results[name], new[name], number, axis=0) for name in results
        }
        ended = (drawn.token[..., None] == given["stop"]).any(-1) | (number + 1 >= given["limit"])
        return state, drawn.token, jnp.where(ended | (position < 0), -1, position + 1), load, results

    carry = (state, token, given["position"], _by_row(results.pop("load")), results)
    state, _, _, load, results = jax.lax.fori_loop(0, given["steps"], once, carry)
    return state, {**results, "load": load}


def admit(
    state: DeviceState, shard_number: Int[Array, ""], slot: Int[Array, ""], history: Int[Array, "v"],
    bias: Float[Array, "v"],
) -> DeviceState:  # fmt: skip
    """Start a slot with its own history and bias."""
    put = _putting(state, shard_number, slot)
    return dataclasses.replace(state, history=put(state.history, history), bias=put(state.bias, bias))


def constrain(
    state: DeviceState, shard_number: Int[Array, ""], slot: Int[Array, ""], allowed: UInt32[Array, "words"]
) -> DeviceState:
    """Say what a slot's next token may be."""
    return dataclasses.replace(state, allowed=_putting(state, shard_number, slot)(state.allowed, allowed))


def mask_words(vocab: int) -> int:
    """Of 32 bits, one a token."""
    return -(-vocab // 32)


def _putting(state: DeviceState, shard_number: Array, slot: Array) -> Callable[[Array, Array], Array]:
    """Puts a row into a table at one shard's slot, and at the others' slot that is nobody's."""
    shards, slots = state.last.shape
    at = jnp.where(jnp.arange(shards, dtype=jnp.int32) == shard_number, slot, slots - 1)
    put = jax.vmap(lambda table, slot, row: table.at[slot].set(row), in_axes=(0, 0, None))
    return lambda table, row: put(table, at, row)


def _forward(
    model: Any,
    variables: Variables,
    pools: tuple[Pool, ...],
    table: Int[Array, "b r pages"],
    longest: Int[Array, ""],
    token: Int[Array, "b t"],
    row: Int[Array, "b t"],
    position: Int[Array, "b t"],
) -> tuple[Float[Array, "b t m"], tuple[Pool, ...], Int[Array, "b t layer k"], Bool[Array, "b t layer k"]]:
    """Hidden states, pages, each token's experts, and which of them took it."""
    memory = Paged(pools, table, row, position, longest)
    place, valid = jnp.maximum(position, 0), position >= 0
    hidden, memory, metrics = model.hidden(token, place, valid, memory, None, variables.router)
    experts, kept = (_by_row(jnp.moveaxis(x, 0, 2)) for x in (metrics.experts.astype(jnp.int32), metrics.kept))
    return hidden, memory.pools, experts, kept


def _by_row(x: Array) -> Array:
    """Each shard keeps its own."""
    return shard(x, " ".join(["batch", *["model"] * (x.ndim - 1)]))


def _counted(
    experts: Int[Array, "b t layer k"],
    kept: Bool[Array, "b t layer k"],
    position: Int[Array, "b t"],
    load: Int[Array, "b layer counted"],
) -> Int[Array, "b layer counted"]:
    """How many choices each expert took of tokens that are there, and how many none took."""
    took = jnp.where(kept, experts, load.shape[-1] - 1)[..., None] == jnp.arange(load.shape[-1], dtype=jnp.int32)
    return (took & (position >= 0)[:, :, None, None, None]).sum((1, 3), dtype=jnp.int32)


def _draw(
    model: Any,
    sizes: Sizes,
    state: DeviceState,
    hidden: Float[Array, "b s m"],
    rows: dict[str, Array],
    position: Int[Array, "b s"],
    target: Int[Array, "b s"],
) -> Drawn:
    """Draw for each place; the result has leading axes b and s."""
    b, s, _ = hidden.shape
    pieces = [hidden[:, first : first + sizes.tile] for first in range(0, s, sizes.tile)]
    # Gathered once over ``tensor``: on parts of a vocabulary, each of the 64 steps of the two bisections would reduce.
    logits = shard(jnp.concatenate([model.logits(piece) for piece in pieces], axis=1), "batch time model")

    def flat(x: Array) -> Array:
        return x.reshape(b * s, *x.shape[2:])

    def look_up() -> Context:
        of_slot = rows["slot"][..., None]
        tables = state.history, state.bias, state.allowed
        return Context(*(flat(jnp.take_along_axis(x, of_slot, axis=1)) for x in tables))

    how = Draw(**{name: flat(rows[name]) for name in Draw._fields})
    drawn = draw(flat(logits), how, flat(position), flat(target), look_up)
    return jax.tree.map(lambda x: x.reshape(b, s, *x.shape[1:]), drawn)


def _noted(state: DeviceState, slot: Int[Array, "b s"], token: Int[Array, "b s"]) -> DeviceState:
    """The tokens as the newest ones of their slots, and in their history."""
    last = jax.vmap(lambda row, at, new: row.at[at].set(new))(state.last, slot, token)
    history = jax.vmap(lambda table, at, new: table.at[at, new].add(2))(state.history, slot, token)
    return dataclasses.replace(state, last=last, history=history)


def _of_row(values: Array, row: Int[Array, "b s"]) -> Array:
    """Of each token or sample, what its row has."""
    return jnp.take_along_axis(shard(values, "batch time"), row, axis=1)


def _nothing(layout: Layout) -> dict[str, Array]:
    return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in layout.fields.items()}


def _result(drawn: Drawn, experts: Int[Array, "b s layer k"]) -> dict[str, Array]:
    """One step's worth, with its leading axis."""
    found = {**drawn._asdict(), "finite": drawn.finite.astype(jnp.int32), "experts": experts}
    return {name: value[None] for name, value in found.items()}


def everywhere(mesh: Mesh) -> NamedSharding:
    """On every device, whole: where a call's buffers are."""
    return NamedSharding(mesh, PartitionSpec())
