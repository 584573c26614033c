"""From a config to parameters on a mesh: shapes first, values straight into their shards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.layers import RouterState, Stack
from gshardx.models.decoder import Decoder
from gshardx.sharding import variable_axes, variable_spec

Params = dict[str, Any]
"""Nested dicts of arrays: the module tree without its modules."""


class Variables(NamedTuple):
    """All that inference reads."""

    params: Params
    router: RouterState
    """Of all MoE layers, stacked; ``()`` for routers that carry nothing."""


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model's structure without its values.

    Attributes:
        graph: joins with params to a module: ``nnx.merge(graph, params)``.
        params: shapes, dtypes and shardings.
        axes: logical axis names, one tuple a parameter; a tuple of mesh axes for a dimension annotated by those.
        router: shapes, dtypes and shardings of the routers' state, which every device holds whole.
    """

    graph: nnx.GraphDef[Decoder]
    params: Params
    axes: Params
    router: RouterState
    config: ModelConfig
    vocab: int

    @property
    def memory_layers(self) -> int:
        """Layers of a memory for decoding: attention's, and after them those of routers' notes."""
        notes = self.config.moe_layers if self.bind(self.params).stack.router.keeps_notes else 0
        return self.config.layers + notes

    @property
    def variables(self) -> Variables:
        """Abstract."""
        return Variables(self.params, self.router)

    def init(self, key: Array) -> Params:
        """Draw initial values, each device its own shards; the same values on every mesh."""
        shardings = jax.tree.map(lambda p: p.sharding, self.params)

        def build(key: Array) -> Params:
            return nnx.to_pure_dict(nnx.state(Decoder(self.config, self.vocab, rngs=nnx.Rngs(key)), nnx.Param))

        return jax.jit(build, out_shardings=shardings)(key)

    def init_router(self) -> RouterState:
        """The routers' state before the first step."""
        shardings = jax.tree.map(lambda a: a.sharding, self.router)
        return jax.device_put(self.bind(self.params).stack.initial_state(), shardings)

    def bind(self, params: Params) -> Decoder:
        """The module with ``params`` in place; usable inside jit."""
        return nnx.merge(self.graph, params)


def rows_of_vocabulary(config: ModelConfig, tokens: int) -> int:
    """Rows of the embedding: one a token of the tokenizer, or as many as the config says.

    Raises:
        BadInput: the tokenizer has more tokens.
    """
    if config.vocab_size is not None and config.vocab_size < tokens:
        raise BadInput(
            f"model.vocab_size = {config.vocab_size} is less than the {tokens} tokens of the tokenizer; use {tokens}"
        )
    return config.vocab_size or tokens


def blueprint(config: ModelConfig, vocab: int, mesh: Mesh, stack: Callable[..., Stack] = Stack) -> Blueprint:
    """Work out every parameter's shape and place on ``mesh`` without allocating any; ``stack`` as in :class:`Decoder`.

    Raises:
        BadInput: a parameter has no layout or does not divide over the mesh, or the router has no such option.
    """
    module = nnx.eval_shape(lambda: Decoder(config, vocab, rngs=nnx.Rngs(0), stack=stack))
    graph, state = nnx.split(module, nnx.Param)
    flat = nnx.to_flat_state(state)
    placed, axes = [], []
    for path, variable in flat:
        name = ".".join(map(str, path))
        value = variable.get_value()
        sharding = NamedSharding(mesh, variable_spec(variable, mesh, name))
        placed.append((path, jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)))
        axes.append((path, variable_axes(variable, name)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    router = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        jax.eval_shape(module.stack.initial_state),
    )
    return Blueprint(graph, _unflatten(placed), _unflatten(axes), router, config, vocab)


def _unflatten(flat: list[tuple[tuple[Any, ...], Any]]) -> Params:
    tree: Params = {}
    for path, value in flat:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
