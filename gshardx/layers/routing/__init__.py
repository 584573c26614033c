"""Who goes where: a router turns tokens into a Routing. One file a family."""

from gshardx.layers.routing.adamoe import AdaMoERouter
from gshardx.layers.routing.base import BaseRouter
from gshardx.layers.routing.choice import Capacity, Priority
from gshardx.layers.routing.common import RouterBase
from gshardx.layers.routing.contract import Losses, Router, RouterState, Routing
from gshardx.layers.routing.cosine import CosineRouter
from gshardx.layers.routing.demix import DemixRouter
from gshardx.layers.routing.ds_moe import DsMoeRouter
from gshardx.layers.routing.dselect_k import DselectKRouter
from gshardx.layers.routing.dynmoe import DynMoERouter
from gshardx.layers.routing.expert_choice import ExpertChoiceRouter
from gshardx.layers.routing.gshard import GShardRouter, SecondExpert
from gshardx.layers.routing.hash import HashRouter
from gshardx.layers.routing.lory import LoryRouter
from gshardx.layers.routing.meo import MeoRouter
from gshardx.layers.routing.merging import MergingRouter
from gshardx.layers.routing.moe_pp import MoePlusPlusRouter
from gshardx.layers.routing.noisy_top_k import NoisyTopKRouter
from gshardx.layers.routing.quantile import QuantileRouter
from gshardx.layers.routing.relu import ReluRouter
from gshardx.layers.routing.sentence import SentenceRouter
from gshardx.layers.routing.sigmoid_bias import SigmoidBiasRouter
from gshardx.layers.routing.sinkhorn import SinkhornRouter
from gshardx.layers.routing.skywork import SkyworkRouter
from gshardx.layers.routing.smear import SmearRouter
from gshardx.layers.routing.smoe_dropout import SmoeDropoutRouter
from gshardx.layers.routing.soft_moe import SoftMoERouter
from gshardx.layers.routing.sparse_mixer import SparseMixerRouter
from gshardx.layers.routing.stable import StableRouter
from gshardx.layers.routing.statistics import RouterStats
from gshardx.layers.routing.switch import SwitchRouter
from gshardx.layers.routing.task import TaskRouter
from gshardx.layers.routing.top_k import TopKRouter

ROUTERS: dict[str, type[RouterBase]] = {
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "top_k": TopKRouter,
    "sigmoid_bias": SigmoidBiasRouter,
    "sparse_mixer": SparseMixerRouter,
    "noisy_top_k": NoisyTopKRouter,
    "skywork": SkyworkRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "base": BaseRouter,
    "sinkhorn": SinkhornRouter,
    "quantile": QuantileRouter,
    "cosine": CosineRouter,
    "adamoe": AdaMoERouter,
    "relu": ReluRouter,
    "smoe_dropout": SmoeDropoutRouter,
    "ds_moe": DsMoeRouter,
    "dselect_k": DselectKRouter,
    "dynmoe": DynMoERouter,
    "sentence": SentenceRouter,
    "task": TaskRouter,
    "demix": DemixRouter,
    "soft_moe": SoftMoERouter,
    "stable": StableRouter,
    "moe_pp": MoePlusPlusRouter,
    "smear": SmearRouter,
    "lory": LoryRouter,
    "meo": MeoRouter,
}
"""By the name in ``model.moe.router``."""

__all__ = [
    "BaseRouter",
    "DselectKRouter",
    "DsMoeRouter",
    "SmoeDropoutRouter",
    "Capacity",
    "ExpertChoiceRouter",
    "AdaMoERouter",
    "CosineRouter",
    "DemixRouter",
    "DynMoERouter",
    "GShardRouter",
    "HashRouter",
    "LoryRouter",
    "Losses",
    "MoePlusPlusRouter",
    "MeoRouter",
    "MergingRouter",
    "NoisyTopKRouter",
    "Priority",
    "QuantileRouter",
    "ROUTERS",
    "ReluRouter",
    "Router",
    "RouterBase",
    "RouterState",
    "RouterStats",
    "Routing",
    "SecondExpert",
    "SentenceRouter",
    "SigmoidBiasRouter",
    "SinkhornRouter",
    "SkyworkRouter",
    "SoftMoERouter",
    "SmearRouter",
    "SparseMixerRouter",
    "StableRouter",
    "SwitchRouter",
    "TaskRouter",
    "TopKRouter",
]
