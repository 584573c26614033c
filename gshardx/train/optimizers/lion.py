"""Lion (arXiv 2302.06675): the sign of an interpolated momentum."""

import optax

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params


def lion(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
    """``sign(beta1 m + (1 - beta1) g)``, then ``m = beta2 m + (1 - beta2) g``. State: one value a parameter.

    Every value moves by the whole learning rate, so the paper's is 3 to 10 times smaller than AdamW's and its decay as
    much larger (section 5); its betas are 0.9 and 0.99.
    """
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)
