"""Adafactor (arXiv 1804.04235): second moments kept as rows and columns, steps in proportion to the parameter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params
from gshardx.train.optimizers.groups import Names, matrix_of, own_dimensions

# The paper's algorithm 6, which GShard's appendix repeats:
_EXPONENT = 0.8  # of the second moment's decay, 1 - t^-0.8
_TINY = 1e-30  # added to squares: epsilon 1
_LEAST_SCALE = 1e-3  # of a parameter, so that zeros can move: epsilon 2
_CLIP = 1.0  # largest root mean square of an update: d


def adafactor(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
    """``g / sqrt(v)``, clipped, times the parameter's own size, so that the learning rate is relative to it.

    With v of a matrix ``row column / mean(row)``; row and column are running means of the squared gradient over its
    outputs and inputs, with decay ``1 - t^-0.8`` (``beta2`` and ``epsilon`` are not used). Each matrix of a stack, by
    layer and expert, is one of its own for rows, columns, clipping and size; :func:`optax.scale_by_factored_rms` takes
    the two largest dimensions instead, which may be layers or experts. State: a value for each row and column, of
    vectors one a parameter; with ``beta1`` above 0 also a first moment (not corrected for its start at 0).
    """
    return optax.chain(
        scale_by_factored_rms(axes),
        optax.stateless(lambda updates, _: jax.tree.map(_clipped, updates, axes)),
        optax.stateless(lambda updates, params: jax.tree.map(_relative, updates, params, axes)),
        optax.ema(config.beta1, debias=False) if config.beta1 else optax.identity(),
    )


class FactoredState(NamedTuple):
    """Trees like the parameters. Reduced dimensions stay, with size 1; ``optax.MaskedNode`` where there is nothing."""

    step: Int[Array, ""]
    rows: Any
    """Of matrices: means over the outputs."""
    columns: Any
    """Of matrices: means over the inputs."""
    whole: Any
    """Of everything else."""


def scale_by_factored_rms(axes: Params) -> optax.GradientTransformation:
    """``g / sqrt(v)``; ``axes`` are the logical names of the parameters' dimensions."""
    # By path and not by tree: optax.tree_utils.tree_map_params calls init with a stand-in that has no leaves.
    names_at = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)))

    def init(params: Params) -> FactoredState:
        def zeros(over: str) -> Any:
            def of(path: Any, param: Any) -> Any:
                matrix = matrix_of(names_at[path])
                if (matrix is None) != (over == "whole"):
                    return optax.MaskedNode()
                gone: tuple[int, ...] = () if matrix is None else getattr(matrix, over)
                return jnp.zeros([1 if at in gone else n for at, n in enumerate(param.shape)], jnp.float32)

            return jax.tree_util.tree_map_with_path(of, params)

        return FactoredState(jnp.zeros((), jnp.int32), zeros("outputs"), zeros("inputs"), zeros("whole"))

    def update(gradients: Params, state: FactoredState, params: Params | None = None) -> tuple[Params, FactoredState]:
        step = optax.safe_increment(state.step)
        decay = 1.0 - step.astype(jnp.float32) ** -_EXPONENT
        tree: Any = jax.tree.structure(gradients)
        parts = zip(*map(tree.flatten_up_to, (gradients, axes, state.rows, state.columns, state.whole)), strict=True)
        done = [_scaled(decay, *part) for part in parts]
        update, rows, columns, whole = (tree.unflatten(column) for column in zip(*done, strict=True))
        return update, FactoredState(step, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def _scaled(
    decay: Float[Array, ""], g: Float[Array, "..."], names: Names, row: Any, column: Any, whole: Any
) -> tuple[Any, Any, Any, Any]:
    """The update of one parameter, and its new state."""
    square, matrix = jnp.square(g) + _TINY, matrix_of(names)
    if matrix is None:
        whole = decay * whole + (1 - decay) * square
        return g * jax.lax.rsqrt(whole), row, column, whole
    row = decay * row + (1 - decay) * _mean(square, matrix.outputs)
    column = decay * column + (1 - decay) * _mean(square, matrix.inputs)
    return g * jax.lax.rsqrt(row / _mean(row, matrix.inputs)) * jax.lax.rsqrt(column), row, column, whole


def _clipped(update: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    return update / jnp.maximum(1.0, _rms(update, names) / _CLIP)


def _relative(update: Float[Array, "..."], param: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    return update * jnp.maximum(_LEAST_SCALE, _rms(param, names))


def _rms(x: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    """Of each layer's and expert's own values; broadcasts to ``x``."""
    return jnp.sqrt(_mean(jnp.square(x), own_dimensions(names)))


def _mean(x: Float[Array, "..."], dimensions: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.mean(x, axis=dimensions, keepdims=True)
