"""Learning rates by step: linear warm-up, then one of three ways down."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from gshardx.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0, of a run of ``steps``."""
    return SCHEDULES[config.schedule](config, steps)


def cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """After the warm-up a half cosine, to ``final_fraction`` of the peak at ``steps`` (arXiv 1608.03983)."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def inverse_sqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The peak until ``decay_start`` (default: the end of the warm-up), from there ``peak sqrt(decay_start / step)``:
    no end in sight, so runs of any length share it (GShard, arXiv 2006.16668; T5, arXiv 1910.10683)."""
    start = float(config.decay_start or config.warmup_steps)

    def falling(after_warmup: ArrayLike) -> Array:
        return config.learning_rate * jnp.sqrt(start / jnp.maximum(after_warmup + config.warmup_steps, start))

    return _warmed_up(config, falling)


def wsd(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up, the peak, and in the last ``decay_fraction`` of ``steps`` linear to ``final_fraction`` of the peak
    (warmup-stable-decay, MiniCPM, arXiv 2404.06395; linear: arXiv 2405.18392)."""
    start = max(steps - round(steps * config.decay_fraction), config.warmup_steps)
    falling = optax.linear_schedule(
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        transition_steps=max(steps - start, 1),
        transition_begin=start - config.warmup_steps,
    )
    return _warmed_up(config, falling)


def _warmed_up(config: OptimizerConfig, rest: optax.Schedule) -> optax.Schedule:
    """``rest`` counts from the end of the warm-up."""
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, rest], [config.warmup_steps])


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}
"""By the name in ``optimizer.schedule``."""
