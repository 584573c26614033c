"""Update rules by name. A new one is a file here and a line in ``OPTIMIZERS`` (and in the config's list)."""

from collections.abc import Callable

import optax

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params
from gshardx.train.optimizers.adafactor import adafactor
from gshardx.train.optimizers.adamw import adamw
from gshardx.train.optimizers.lion import lion
from gshardx.train.optimizers.muon import muon

Direction = Callable[[OptimizerConfig, Params], optax.GradientTransformation]
"""Makes, of a config and the parameters' logical axes, what turns the clipped gradient into the direction of the step:
before weight decay, learning rate and sign (:func:`gshardx.train.optimizer.build_optimizer`)."""

OPTIMIZERS: dict[str, Direction] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}
"""By the name in ``optimizer.name``."""

__all__ = ["OPTIMIZERS", "Direction"]
