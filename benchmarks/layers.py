"""MoE layers, and what they are held against, as compiled calls: shared by the benchmarks of the layer."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gshardx.layers import Capacity, Dispatcher, Experts, FeedForward, GShardRouter, MoE
from gshardx.sharding import CompiledStep, abstract_array

Call = Callable[[], Any]
Function = Callable[..., Any]
"""``(params, x) -> ((out, loss), aux)``."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one layer and its input, in GShard's letters."""

    groups: int
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int = 2
    factor: float | None = 1.25
    activation: str = "swiglu"

    def small(self) -> "Case":
        """A shape for a test run: it checks that the program works, and measures nothing."""
        sizes = {"tokens": min(self.tokens, 32), "experts": min(self.experts, 16), "groups": min(self.groups, 8)}
        return dataclasses.replace(self, width=16, hidden=16, **sizes)

    @property
    def slots(self) -> int:
        """Of an expert, for one group: c."""
        return Capacity(self.factor).slots(self.tokens, self.experts, self.top_k, training=True)

    def letters(self, which: str = "gsmhekc") -> str:
        """The sizes for a title."""
        values = {"g": self.groups, "s": self.tokens, "m": self.width, "h": self.hidden, "e": self.experts}
        values |= {"k": self.top_k, "c": self.slots}
        return ", ".join(f"{letter} = {values[letter]:,}" for letter in which)

    def router(self) -> GShardRouter:
        capacity = Capacity(self.factor)
        return GShardRouter(self.width, self.experts, self.top_k, capacity=capacity, rngs=nnx.Rngs(0))

    def bank(self) -> Experts:
        return Experts(self.experts, self.width, self.hidden, self.activation, rngs=nnx.Rngs(1))

    def layer(self, dispatcher: Dispatcher) -> MoE:
        return MoE(self.router(), dispatcher, self.bank())

    def dense(self) -> FeedForward:
        """As many active FLOPs: every token passes k * capacity experts' worth of hidden units."""
        hidden = round(self.hidden * self.experts * self.slots / self.tokens)
        return FeedForward(self.width, hidden, self.activation, rngs=nnx.Rngs(1))


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to time: a module, a function over its parameters, and the shape and logical axes of its input."""

    build: Callable[[], nnx.Module]
    call: Callable[[Any, jax.Array], tuple[tuple[jax.Array, Any], Any]]
    shape: tuple[int, ...]
    axes: str
    mesh: Mesh

    def abstract(self) -> tuple[Any, Any]:
        """(graph, params): shapes and places of the parameters, nothing allocated."""
        graph, params = nnx.split(nnx.eval_shape(self.build), nnx.Param)

        def place(param: nnx.Param) -> Any:
            names = param.get_metadata()["axes"]
            return param.replace(abstract_array(param.shape, param.dtype, names, self.mesh))

        return graph, jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))

    @property
    def x(self) -> Any:
        return abstract_array(self.shape, jnp.float32, self.axes.split(), self.mesh)

    def compiled(self, *, backward: bool) -> CompiledStep:
        """Of ``(params, x)``, or ``(params, x, cotangent)`` with gradients of both arguments."""
        graph, params = self.abstract()

        def forward(params: Any, x: jax.Array) -> Any:
            return self.call(nnx.merge(graph, params), x)

        def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            (out, _), pull, aux = jax.vjp(forward, params, x, has_aux=True)
            return out, pull((cotangent, jnp.float32(0.01))), aux

        args = (params, self.x, self.x) if backward else (params, self.x)
        return CompiledStep(both if backward else forward, args, self.mesh)

    @functools.cached_property
    def values(self) -> tuple[Any, jax.Array, jax.Array]:
        """Parameters, an input and a cotangent, in their places."""
        _, params = self.abstract()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, self.x, self.x))

        def draw(key: jax.Array) -> Any:
            x, cotangent = jax.random.normal(key, (2, *self.shape))
            return nnx.state(self.build(), nnx.Param), x, cotangent

        with jax.set_mesh(self.mesh):
            return jax.block_until_ready(jax.jit(draw, out_shardings=shardings)(jax.random.key(0)))

    def ready(self, *, backward: bool) -> Call:
        """A call on those values."""
        step = self.compiled(backward=backward)
        return partial(step, *self.values[: 3 if backward else 2])


def moe(case: Case, dispatcher: Dispatcher, mesh: Mesh, *, metrics: bool = True) -> Subject:
    """The layer on all real tokens, in training; without ``metrics``, XLA drops the statistics."""

    def call(module: Any, x: jax.Array) -> Any:
        out, found = module(x, jnp.ones(x.shape[:2], bool), jax.random.key(0))
        return (out, sum(found.losses.values())), found if metrics else ()

    return Subject(
        lambda: case.layer(dispatcher), call, (case.groups, case.tokens, case.width), "batch time model", mesh
    )


def bare_experts(case: Case, mesh: Mesh) -> Subject:
    """The experts alone on as many slots, which already lie where the experts do."""
    shape = (case.experts, case.groups, case.slots, case.width)
    return Subject(case.bank, _only, shape, "expert expert_group slot model", mesh)


def dense(case: Case, mesh: Mesh) -> Subject:
    return Subject(case.dense, _only, (case.groups, case.tokens, case.width), "batch time model", mesh)


def _only(module: Any, x: jax.Array) -> Any:
    return (module(x), jnp.float32(0.0)), ()
