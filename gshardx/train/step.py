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
    """Packed documents, one token longer than a sequence, int32 ``[b, t + 1]``.

    segments: a number a document within the row, 0 for padding; positions: place in the document.
    """

    tokens: Int[Array, "b t1"]
    segments: Int[Array, "b t1"]
    positions: Int[Array, "b t1"]


class StepMetrics(NamedTuple):
    """Of one step: scalars, and MoE metrics with an axis over MoE layers."""

    loss: Float[Array, ""]
    """Mean cross-entropy of real targets, nats."""
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    """Real targets."""
    moe: MoEMetrics


def token_losses(
    blueprint: Blueprint, params: Params, batch: Batch, rng: Array | None
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], MoEMetrics]:
    """Cross-entropy of each next token in nats, 1.0 where it is a real target (same document) else 0.0, MoE metrics."""
    model = blueprint.bind(params)
    tokens, segments = batch.tokens[:, :-1], batch.segments[:, :-1]
    valid = segments > 0
    hidden, _, moe = model.hidden(tokens, batch.positions[:, :-1], valid, Packed.of(segments), rng)
    logits = model.logits(hidden)
    targets = batch.tokens[:, 1:]
    real = ((batch.segments[:, 1:] == segments) & valid).astype(jnp.float32)
    # The target's logit by one-hot product: a gather's backward pass is a scatter into all logits.
    of_target = jnp.sum(logits * jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - of_target, real, moe


def train_step(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update: mean cross-entropy over real targets plus the weighted mean of the layers' auxiliary losses."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def objective(params: Params) -> tuple[Array, tuple[Array, Array, MoEMetrics]]:
        losses, real, moe = token_losses(blueprint, params, batch, rng)
        count = real.sum()
        loss = jnp.sum(losses * real) / jnp.maximum(count, 1.0)
        aux = blueprint.config.moe.aux_loss_weight * moe.aux_loss.mean()
        return loss + aux, (loss, count, moe)

    gradient, (loss, count, moe) = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.global_norm(gradient), count.astype(jnp.int32), moe)
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def eval_step(blueprint: Blueprint, params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of cross-entropies in nats and number of real targets, no token dropped."""
    losses, real, _ = token_losses(blueprint, params, batch, None)
    return jnp.sum(losses * real), real.sum()


def abstract_batch(batch_size: int, sequence_length: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of a batch."""
    shape = (batch_size, sequence_length + 1)
    one = abstract_array(shape, jnp.int32, ("batch", "time"), mesh, tensor="batch")
    return Batch(one, one, one)


def compile_train_step(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch, mesh: Mesh
) -> CompiledStep[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compile for abstract ``state`` and ``batch``; the state's buffers are reused (donated) for the next state."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(blueprint, optimizer, state, batch)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    return CompiledStep(step, (state, batch), mesh, donate=(0,), out_shardings=(shardings, None))


def compile_eval_step(
    blueprint: Blueprint, batch: Batch, mesh: Mesh
) -> CompiledStep[[Params, Batch], tuple[Array, Array]]:
    """Compile the evaluation for abstract ``batch``."""

    def step(params: Params, batch: Batch) -> tuple[Array, Array]:
        return eval_step(blueprint, params, batch)

    return CompiledStep(step, (blueprint.params, batch), mesh)
