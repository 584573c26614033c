"""The train step and the evaluation step: pure functions, compiled once each."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gshardx.layers import Losses, MoEMetrics, Packed, RouterStats
from gshardx.layers.balance import adapt_coefficient
from gshardx.models.build import Blueprint, Params, Variables
from gshardx.sharding import CompiledStep, abstract_array
from gshardx.train.state import TrainState, averaged


class Batch(NamedTuple):
    """Packed documents; see :data:`gshardx.data.pipeline.Rows`."""

    tokens: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    weights: Float[Array, "b t"]


class StepMetrics(NamedTuple):
    """Of one step: scalars, and what the MoE layers tell, with an axis over them."""

    loss: Float[Array, ""]
    """Mean cross-entropy of the targets that count, nats."""
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    """Targets that count."""
    aux_losses: dict[str, Float[Array, "layer"]]
    stats: RouterStats
    balance_weight: Float[Array, "layer"]
    """Of the next step's balance losses."""
    experts: Int[Array, "layer b t k"] | None
    """Each token's choices, for a routing trace; None unless the step was compiled with one."""


def total_loss(
    blueprint: Blueprint, variables: Variables, batch: Batch, rng: Array | None
) -> tuple[Float[Array, ""], MoEMetrics]:
    """Sum of the weighted cross-entropies of all targets, nats, and MoE metrics."""
    model = blueprint.bind(variables.params)
    valid = batch.segments > 0
    hidden, _, moe = model.hidden(
        batch.tokens, batch.positions, valid, Packed.of(batch.segments), rng, variables.router
    )
    logits = model.logits(hidden)
    # The target's logit by one-hot product: a gather's backward pass is a scatter into all logits.
    of_target = jnp.sum(logits * jax.nn.one_hot(batch.targets, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - of_target) * batch.weights), moe


def auxiliary_loss(
    losses: Losses, weights: Mapping[str, float], balance_weight: Float[Array, "layer"]
) -> Float[Array, ""]:
    """Weighted auxiliary losses, averaged over the layers; "balance" has a weight of its own in each layer."""
    others = sum(weight * losses[name].mean() for name, weight in weights.items() if name != "balance")
    return jnp.mean(balance_weight * losses["balance"]) + others


def train_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    trace: bool = False,
    gradients: Params | None = None,
    ema_decay: float | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update: mean cross-entropy of the targets plus the auxiliary losses; then the routers' own updates.

    ``gradients``: shardings that the gradient is reduced into, one a parameter; None leaves it to the partitioner.
    ``ema_decay``: of the average of the weights; None keeps none.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    count, config = batch.weights.sum(), blueprint.config.moe

    def objective(params: Params) -> tuple[Array, tuple[Array, MoEMetrics]]:
        total, moe = total_loss(blueprint, Variables(params, state.router), batch, rng)
        loss = total / jnp.maximum(count, 1.0)
        return loss + auxiliary_loss(moe.losses, config.losses, state.balance_weight), (loss, moe)

    gradient, (loss, moe) = jax.grad(objective, has_aux=True)(state.params)
    if gradients is not None:
        gradient = jax.lax.with_sharding_constraint(gradient, gradients)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema if ema_decay is None else averaged(state.ema, params, ema_decay, state.step + 1)
    router = blueprint.bind(state.params).stack.after_step(moe.state)
    balance_weight = state.balance_weight
    if config.adaptive_balance:
        balance_weight = adapt_coefficient(balance_weight, moe.stats.drop_fraction)
    metrics = StepMetrics(
        loss,
        optax.global_norm(gradient),
        count.astype(jnp.int32),
        moe.losses,
        moe.stats,
        balance_weight,
        moe.experts if trace else None,
    )
    return TrainState(state.step + 1, params, opt_state, state.rng, router, balance_weight, ema), metrics


def eval_step(blueprint: Blueprint, variables: Variables, batch: Batch) -> Float[Array, ""]:
    """Sum of the weighted cross-entropies in nats, no token dropped."""
    return total_loss(blueprint, variables, batch, None)[0]


def abstract_batch(batch_size: int, sequence_length: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of a batch."""
    whole, real = (
        abstract_array((batch_size, sequence_length), dtype, ("batch", "time"), mesh, tensor="batch")
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(tokens=whole, targets=whole, segments=whole, positions=whole, weights=real)


def compile_train_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    mesh: Mesh,
    trace: bool = False,
    gradients: Params | None = None,
    ema_decay: float | None = None,
) -> CompiledStep[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compile for abstract ``state`` and ``batch``; the state's buffers are reused (donated) for the next state.

    With ``trace`` the metrics hold every token's choices. ``gradients``, ``ema_decay``: as in :func:`train_step`.
    """

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(blueprint, optimizer, state, batch, trace, gradients, ema_decay)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    return CompiledStep(train, (state, batch), mesh, donate=(0,), out_shardings=(shardings, None))


def compile_eval_step(blueprint: Blueprint, batch: Batch, mesh: Mesh) -> CompiledStep[[Variables, Batch], Array]:
    """Compile the evaluation for abstract ``batch``."""

    def forward(variables: Variables, batch: Batch) -> Array:
        return eval_step(blueprint, variables, batch)

    return CompiledStep(forward, (blueprint.variables, batch), mesh)
