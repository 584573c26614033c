"""The train step and the evaluation step: pure functions, compiled once each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gshardx.layers import MoEMetrics, Packed
from gshardx.models.build import Blueprint, Params
from gshardx.sharding import CompiledStep, abstract_array
from gshardx.train.state import TrainState


class Batch(NamedTuple):
    """Packed documents; see :data:`gshardx.data.pipeline.Rows`."""

    tokens: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    weights: Float[Array, "b t"]


class StepMetrics(NamedTuple):
    """Of one step: scalars, and MoE metrics with an axis over MoE layers."""

    loss: Float[Array, ""]
    """Mean cross-entropy of the targets that count, nats."""
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    """Targets that count."""
    moe: MoEMetrics


def total_loss(
    blueprint: Blueprint, params: Params, batch: Batch, rng: Array | None
) -> tuple[Float[Array, ""], MoEMetrics]:
    """Sum of the weighted cross-entropies of all targets, nats, and MoE metrics."""
    model = blueprint.bind(params)
    valid = batch.segments > 0
    hidden, _, moe = model.hidden(batch.tokens, batch.positions, valid, Packed.of(batch.segments), rng)
    logits = model.logits(hidden)
    # The target's logit by one-hot product: a gather's backward pass is a scatter into all logits.
    of_target = jnp.sum(logits * jax.nn.one_hot(batch.targets, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - of_target) * batch.weights), moe


def train_step(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update: mean cross-entropy of the targets plus the weighted mean of the layers' auxiliary losses."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    count = batch.weights.sum()

    def objective(params: Params) -> tuple[Array, tuple[Array, MoEMetrics]]:
        total, moe = total_loss(blueprint, params, batch, rng)
        loss = total / jnp.maximum(count, 1.0)
        return loss + blueprint.config.moe.aux_loss_weight * moe.aux_loss.mean(), (loss, moe)

    gradient, (loss, moe) = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.global_norm(gradient), count.astype(jnp.int32), moe)
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def eval_step(blueprint: Blueprint, params: Params, batch: Batch) -> Float[Array, ""]:
    """Sum of the weighted cross-entropies in nats, no token dropped."""
    return total_loss(blueprint, params, batch, None)[0]


def abstract_batch(batch_size: int, sequence_length: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of a batch."""
    whole, real = (
        abstract_array((batch_size, sequence_length), dtype, ("batch", "time"), mesh, tensor="batch")
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(tokens=whole, targets=whole, segments=whole, positions=whole, weights=real)


def compile_train_step(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch, mesh: Mesh
) -> CompiledStep[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compile for abstract ``state`` and ``batch``; the state's buffers are reused (donated) for the next state."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(blueprint, optimizer, state, batch)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    return CompiledStep(step, (state, batch), mesh, donate=(0,), out_shardings=(shardings, None))


def compile_eval_step(blueprint: Blueprint, batch: Batch, mesh: Mesh) -> CompiledStep[[Params, Batch], Array]:
    """Compile the evaluation for abstract ``batch``."""

    def step(params: Params, batch: Batch) -> Array:
        return eval_step(blueprint, params, batch)

    return CompiledStep(step, (blueprint.params, batch), mesh)
