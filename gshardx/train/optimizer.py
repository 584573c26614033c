"""AdamW with warm-up, cosine decay and clipping by global norm."""

from typing import Any

import jax
import optax

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear to the peak, then a cosine to ``final_fraction`` of it at ``steps``."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def build_optimizer(config: OptimizerConfig, steps: int, axes: Params) -> optax.GradientTransformation:
    """The update rule; ``axes`` says which parameters are matrices: vectors (norms, biases) do not decay."""

    def is_matrix(_: Any) -> Any:
        def own(names: tuple[Any, ...]) -> int:
            return sum(name not in ("layer", "expert") for name in names)

        return jax.tree.map(lambda names: own(names) > 1, axes, is_leaf=lambda x: isinstance(x, tuple))

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )
