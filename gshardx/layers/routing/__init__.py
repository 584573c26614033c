"""Who goes where: a router turns tokens into a Routing. One file a family."""

from gshardx.layers.routing.choice import Capacity, Priority
from gshardx.layers.routing.contract import Losses, Router, RouterState, Routing
from gshardx.layers.routing.ds_moe import DsMoeRouter
from gshardx.layers.routing.dselect_k import DselectKRouter
from gshardx.layers.routing.gshard import GShardRouter, SecondExpert
from gshardx.layers.routing.linear import LinearRouter
from gshardx.layers.routing.noisy_top_k import NoisyTopKRouter
from gshardx.layers.routing.relu import ReluRouter
from gshardx.layers.routing.sigmoid_bias import SigmoidBiasRouter
from gshardx.layers.routing.skywork import SkyworkRouter
from gshardx.layers.routing.smoe_dropout import SmoeDropoutRouter
from gshardx.layers.routing.sparse_mixer import SparseMixerRouter
from gshardx.layers.routing.statistics import RouterStats
from gshardx.layers.routing.switch import SwitchRouter
from gshardx.layers.routing.top_k import TopKRouter

ROUTERS: dict[str, type[LinearRouter]] = {
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "top_k": TopKRouter,
    "sigmoid_bias": SigmoidBiasRouter,
    "sparse_mixer": SparseMixerRouter,
    "noisy_top_k": NoisyTopKRouter,
    "skywork": SkyworkRouter,
    "relu": ReluRouter,
    "smoe_dropout": SmoeDropoutRouter,
    "ds_moe": DsMoeRouter,
    "dselect_k": DselectKRouter,
}
"""By the name in ``model.moe.router``."""

__all__ = [
    "DselectKRouter",
    "DsMoeRouter",
    "SmoeDropoutRouter",
    "Capacity",
    "GShardRouter",
    "LinearRouter",
    "Losses",
    "NoisyTopKRouter",
    "Priority",
    "ROUTERS",
    "ReluRouter",
    "Router",
    "RouterState",
    "RouterStats",
    "Routing",
    "SecondExpert",
    "SigmoidBiasRouter",
    "SkyworkRouter",
    "SparseMixerRouter",
    "SwitchRouter",
    "TopKRouter",
]
