"""From a gradient to an update: clip, direction, weight decay, learning rate."""

import optax

from gshardx.config import OptimizerConfig
from gshardx.models.build import Params
from gshardx.train.optimizers import OPTIMIZERS
from gshardx.train.optimizers.groups import by_names, decays
from gshardx.train.schedules import schedule


def build_optimizer(config: OptimizerConfig, steps: int, axes: Params) -> optax.GradientTransformation:
    """The update rule of a run of ``steps``, the same in outline for every optimizer:

    1. gradients are scaled down together until their global norm is ``clip_norm`` at most;
    2. ``OPTIMIZERS[name]`` gives the direction;
    3. ``weight_decay`` of the parameter is added (decoupled, arXiv 1711.05101), except of norms, biases and routers
       (:func:`gshardx.train.optimizers.groups.decays`);
    4. all is multiplied by minus the learning rate of the step (:mod:`gshardx.train.schedules`).

    Args:
        config: which optimizer, and its numbers.
        steps: of the whole run, for the schedule.
        axes: logical names of the parameters' dimensions (``Blueprint.axes``).
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            OPTIMIZERS[config.name](config, axes),
            optax.add_decayed_weights(config.weight_decay, mask=by_names(decays, axes)),
            optax.scale_by_learning_rate(schedule(config, steps)),
        ),
    )
