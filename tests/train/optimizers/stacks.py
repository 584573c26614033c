"""Parameters as the decoder stacks them, small, and what each is to an optimizer: written out by hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.sharding import CompiledStep, abstract_array, build_mesh
from gshardx.train.optimizer import build_optimizer
from gshardx.train.state import abstract_optimizer_state


class Parameter(NamedTuple):
    names: str
    shape: tuple[int, ...]
    unit: tuple[int, ...]
    """One matrix or vector; all else of the shape counts them."""
    decays: bool
    hidden: bool
    """Made orthogonal by Muon."""


PARAMETERS = {
    "experts": Parameter("layer expert embed hidden", (2, 4, 16, 24), (16, 24), True, True),
    "back": Parameter("layer expert hidden embed", (2, 4, 24, 16), (24, 16), True, True),
    "queries": Parameter("layer embed heads head_dim", (2, 16, 2, 4), (16, 8), True, True),
    "output": Parameter("layer heads head_dim embed", (2, 2, 4, 16), (8, 16), True, True),
    "table": Parameter("vocab embed", (32, 16), (32, 16), True, False),
    "router": Parameter("layer embed router", (2, 16, 4), (16, 4), False, False),
    "scores": Parameter("layer router", (2, 4), (4,), False, False),
    "norm": Parameter("layer embed", (2, 16), (16,), False, False),
    "bias": Parameter("layer expert hidden", (2, 4, 24), (24,), False, False),
}
AXES = {name: tuple(p.names.split()) for name, p in PARAMETERS.items()}


def units(name, array):
    """The matrices or vectors of a stack, in order."""
    return list(np.asarray(array).reshape(-1, *PARAMETERS[name].unit))


def drawn(seed, scale=1.0):
    draw = np.random.default_rng(seed)
    return {name: scale * draw.normal(size=p.shape).astype(np.float32) for name, p in PARAMETERS.items()}


class Program(NamedTuple):
    """One compiled step of an optimizer on a mesh."""

    step: CompiledStep
    abstract: dict
    state: object
    optimizer: optax.GradientTransformation

    def placed(self, weights):
        return {name: jax.device_put(weights[name], self.abstract[name].sharding) for name in weights}

    def begin(self, weights):
        params = self.placed(weights)
        places = jax.tree.map(lambda a: a.sharding, self.state)
        return params, jax.jit(self.optimizer.init, out_shardings=places)(params)


def compiled(config, steps, mesh_config):
    mesh = build_mesh(mesh_config)
    abstract = {n: abstract_array(p.shape, jnp.float32, AXES[n], mesh) for n, p in PARAMETERS.items()}
    optimizer = build_optimizer(config, steps, AXES)
    state = abstract_optimizer_state(optimizer, abstract, NamedSharding(mesh, PartitionSpec()))

    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    shardings = jax.tree.map(lambda a: a.sharding, (abstract, state))
    step = CompiledStep(update, (abstract, state, abstract), mesh, out_shardings=shardings)
    return Program(step, abstract, state, optimizer)
