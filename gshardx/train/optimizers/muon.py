"""Muon: momentum made orthogonal, one orthogonalisation for each matrix of each layer and expert."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params
from gshardx.sharding import RULES, Rules, axis_size, manual, shard
from gshardx.train.optimizers.adamw import adamw
from gshardx.train.optimizers.groups import STACKED, Names, by_names, is_hidden_matrix, matrix_of, own_dimensions

_RMS = 0.2  # of an update's values, as AdamW's have: arXiv 2502.16982 section 2.2


def muon(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for the matrices inside the network, AdamW for
    embedding, logits, routers, norms and biases.

    Nesterov momentum (``momentum``), five Newton-Schulz iterations (optax's coefficients, Jordan's), and a step of
    ``0.2 sqrt(max(inputs, outputs))``, so that its values have the size of AdamW's, and one learning rate and one
    weight decay serve both (Moonlight, arXiv 2502.16982). State: one value a parameter, two of AdamW's.

    On a mesh every matrix is whole while it is made orthogonal, on one device of those that hold pieces of it: pieces
    travel by one all-to-all over ``fsdp`` (``tensor``), and back by another, where the layers, or the experts of a
    device, divide over that axis; where they do not, the matrices are gathered over it, and each of its devices does
    all. Nothing crosses ``expert`` or ``data``. Left to the partitioner, optax's flattening of layers and experts into
    one dimension gathers every expert on every device, and each product of an iteration is exchanged anew.
    """

    def label(names: Names) -> str:
        return "muon" if is_hidden_matrix(names) else "adamw"

    matrices = by_names(lambda names: names if is_hidden_matrix(names) else optax.MaskedNode(), axes)
    orthogonal = optax.stateless(lambda updates, _: jax.tree.map(orthogonalise, updates, matrices))
    return optax.partition(
        {"muon": optax.chain(nesterov_momentum(config.momentum), orthogonal), "adamw": adamw(config, axes)},
        by_names(label, axes),
    )


class MomentumState(NamedTuple):
    step: Int[Array, ""]
    mu: Any


def nesterov_momentum(beta: float) -> optax.GradientTransformation:
    """The running mean of the gradient, looked at one step ahead and corrected for its start at 0, as
    :func:`optax.contrib.scale_by_muon` takes it."""

    def init(params: Params) -> MomentumState:
        return MomentumState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(gradients: Params, state: MomentumState, params: Params | None = None) -> tuple[Params, MomentumState]:
        step = optax.safe_increment(state.step)
        mu = optax.tree.update_moment(gradients, state.mu, beta, 1)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(step))
        now = optax.tree.bias_correction(gradients, beta, step)
        return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now), MomentumState(step, mu)

    return optax.GradientTransformation(init, update)


def orthogonalise(x: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    """Each matrix of a stack with singular values near 1 (0.7 to 1.2), times ``0.2 sqrt(max(inputs, outputs))``."""
    matrix = matrix_of(names)
    assert matrix is not None
    # Without momentum of its own scale_by_muon is the orthogonalisation alone.
    rule = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(*matrix))
    sizes = [math.prod(x.shape[at] for at in side) for side in matrix]

    def whole(x: Array) -> Array:
        return _RMS * math.sqrt(max(sizes)) * rule.update(x, rule.init(x))[0]

    written, layouts = " ".join(names), _layouts(names, x.shape)
    for rules in layouts:
        x = shard(x, written, rules)
    x = manual(whole, [written], written, layouts[-1])(x)
    for rules in reversed(layouts):
        x = shard(x, written, rules)
    return x


def _layouts(names: Names, shape: tuple[int, ...]) -> list[Rules]:
    """The way of a stack from where its parameter lives to whole matrices.

    On each step one mesh axis leaves the matrices, for layers or experts if it divides them: of two at once the
    partitioner makes gathers instead of all-to-alls.
    """
    rules = {name: RULES[name] for name in names}
    layouts: list[Rules] = [dict(rules)]
    for name in (names[at] for at in own_dimensions(names)):
        for axis in rules[name]:
            rules[name] = tuple(other for other in rules[name] if other != axis)
            for stacked in (other for other in STACKED if other in names):
                there = (*rules[stacked], axis)
                if shape[names.index(stacked)] % math.prod(map(axis_size, there)) == 0:
                    rules[stacked] = there
                    break
            layouts.append(dict(rules))
    return layouts
