"""AdamW (arXiv 1711.05101): two moments of each gradient."""

import optax

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params


def adamw(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
    """``m / (sqrt(v) + epsilon)``, both moments corrected for their start at 0. State: two values a parameter."""
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
