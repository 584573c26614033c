"""The train step and the evaluation step: pure functions, compiled once each."""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gshardx.config import TrainConfig
from gshardx.layers import RouterState, RouterStats
from gshardx.layers.balance import Sums
from gshardx.layers.draws import row_keys
from gshardx.models.build import Blueprint, Params, Variables
from gshardx.sharding import CompiledStep, abstract_array
from gshardx.train.accumulate import Micro, Outcome, accumulated, gradients, rows_together
from gshardx.train.objective import (
    Batch,
    RowScores,
    TokenLosses,
    adapt_coefficient,
    auxiliary_loss,
    row_scores,
    token_losses,
)
from gshardx.train.state import TrainState, averaged


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
    skipped: Int[Array, ""]
    """Steps of the run so far, this one included, that changed nothing: their gradients were not finite."""
    rollbacks: Int[Array, ""]
    """Times that the run has gone back to a checkpoint."""
    experts: Int[Array, "layer b t k"] | None
    """Each token's choices, for a routing trace; None unless the config asks for them."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One update, as a function of state and batch.

    Args:
        plan: the model.
        optimizer: the update rule.
        config: micro-batches, losses of the targets, traces.
        places: shardings that the gradient is brought into, one a parameter. None: micro-batches add up where the
            parameters are; the gradient of an undivided batch is left to the partitioner.
        ema_decay: of the average of the weights; None keeps none.
    """

    plan: Blueprint
    optimizer: optax.GradientTransformation
    config: TrainConfig
    places: Params | None = None
    ema_decay: float | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Mean cross-entropy of the targets plus the auxiliary losses; then the routers' own updates.

        Where the gradient is not finite, only the counters of steps move.
        """
        gradient, outcome = self.gradient(state, batch)
        norm = optax.global_norm(gradient)
        fine = jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        count = batch.weights.sum()
        balance_weight = state.balance_weight
        if self.plan.config.moe.adaptive_balance:
            balance_weight = adapt_coefficient(balance_weight, outcome.stats.drop_fraction)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if self.ema_decay is not None:
            ema = averaged(ema, params, self.ema_decay, state.step - state.skipped + 1)
        new = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            router=self.plan.bind(state.params).stack.after_step(outcome.router),
            balance_weight=balance_weight,
            ema=ema,
        )
        state = dataclasses.replace(_chosen(fine, new, state), step=state.step + 1, skipped=state.skipped + ~fine)
        metrics = StepMetrics(
            outcome.tokens.nats / jnp.maximum(count, 1.0),
            norm,
            count.astype(jnp.int32),
            self.plan.bind(state.params).stack.loss_values(outcome.losses),
            outcome.stats,
            state.balance_weight,
            state.skipped,
            state.rollbacks,
            outcome.experts,
        )
        return state, metrics

    def gradient(self, state: TrainState, batch: Batch) -> tuple[Params, Outcome]:
        """Of the objective, whatever the number of micro-batches."""
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        keys = row_keys(rng, batch.tokens.shape[0])
        stack, weights = self.plan.bind(state.params).stack, self.plan.config.moe.losses
        count = jnp.maximum(batch.weights.sum(), 1.0)

        def weighted(tokens: TokenLosses, losses: dict[str, Sums]) -> Array:
            auxiliary = auxiliary_loss(stack.loss_values(losses), weights, state.balance_weight)
            return tokens.minimised / count + auxiliary

        inputs = (self._forward, weighted, state.params, batch, keys, state.router)
        if self.config.accumulation_steps > 1:
            return accumulated(*inputs, self._micro(batch))
        gradient, outcome = gradients(*inputs)
        return (gradient if self.places is None else jax.lax.with_sharding_constraint(gradient, self.places)), outcome

    def _forward(self, params: Params, batch: Batch, keys: Array, router: RouterState) -> Outcome:
        tokens, moe = token_losses(self.plan, Variables(params, router), batch, keys, self.config)
        return Outcome(tokens, moe.loss_sums, moe.stats, moe.state, moe.experts if self.config.trace_every else None)

    def _micro(self, batch: Batch) -> Micro:
        moe, stack = self.plan.config.moe, self.plan.bind(self.plan.params).stack
        losses = tuple(name for name, _ in stack.router.losses if name in {"balance", *moe.losses})
        together = rows_together(batch.tokens.shape[1], moe.group_size)
        places = self.places or jax.tree.map(lambda p: p.sharding, self.plan.params)
        return Micro(self.config.accumulation_steps, together, places, losses, stack.router.token_drop == 0)


def _chosen(which: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    return cast(TrainState, jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old))


def abstract_batch(batch_size: int, sequence_length: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of a batch."""
    whole, real = (
        abstract_array((batch_size, sequence_length), dtype, ("batch", "time"), mesh, tensor="batch")
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(tokens=whole, targets=whole, segments=whole, positions=whole, weights=real)


def compile_train_step(
    step: TrainStep, state: TrainState, batch: Batch, mesh: Mesh, donate: bool = True
) -> CompiledStep[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compile for abstract ``state`` and ``batch``; ``donate``: reuse the state's buffers for the next state."""

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return step(state, batch)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    return CompiledStep(train, (state, batch), mesh, donate=(0,) if donate else (), out_shardings=(shardings, None))


def compile_eval_step(blueprint: Blueprint, batch: Batch, mesh: Mesh) -> CompiledStep[[Variables, Batch], RowScores]:
    """Compile the evaluation for abstract ``batch``; every process gets the scores of all rows."""

    def forward(variables: Variables, batch: Batch) -> RowScores:
        return row_scores(blueprint, variables, batch)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return CompiledStep(forward, (blueprint.variables, batch), mesh, out_shardings=everywhere)
