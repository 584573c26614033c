"""A model small enough to compile in every test of the planner, and the eight simulated devices as a topology."""

import dataclasses
import functools
from types import MappingProxyType

import jax

from gshardx.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from gshardx.plan.program import Serving
from gshardx.plan.report import make_plan
from gshardx.plan.topology import Topology
from gshardx.sharding import MeshConfig
from gshardx.sharding.chips import Chip

CHIP = Chip(
    name="cpu",
    peak_flops=1e10,
    hbm_bytes=2**30,
    hbm_bandwidth=1e9,
    ici_bandwidth=1e8,
    dcn_bandwidth=1e7,
    sources=MappingProxyType({}),
    hop_seconds=1e-5,
)
MESH = MeshConfig(data=2, fsdp=2, expert=2)
SERVING = Serving(rows=8, length=32, chunk=8)


def topology(**changed):
    """cpu:8 with a chip of round figures, some of them ``changed``."""
    return Topology("cpu:8", tuple(jax.devices()), dataclasses.replace(CHIP, **changed), (), 1)


def config(mesh=MESH, *, layers=2, width=16, moe=None, data=None, train=None, **model):
    """2 layers of width 16, one of them 8 experts: 21 thousand parameters."""
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 32} | model
    return Config(
        model=ModelConfig(
            layers=layers,
            width=width,
            **sizes,
            moe=MoEConfig(**({"num_experts": 8, "top_k": 2, "hidden": 32, "dispatcher": "gather"} | (moe or {}))),
        ),
        mesh=mesh,
        data=DataConfig(**({"tokenizer": "bytes", "sequence_length": 32} | (data or {}))),
        train=TrainConfig(**({"batch_size": 8} | (train or {}))),
    )


@functools.cache
def planned(step="train", mesh=MESH, remat="none", zero_stage=3, layers=2):
    """The plan and what was compiled; each is compiled once for all tests."""
    chosen = config(mesh, layers=layers, remat=remat, train={"zero_stage": zero_stage})
    return make_plan(chosen, topology(), step, SERVING)


REFUSAL = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (32.00G) exceeds available HBM (15.75G)."


def refused(monkeypatch):
    """The plan of a step that XLA does not compile for its memory."""

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(REFUSAL)

    monkeypatch.setattr("gshardx.plan.program._compile", refuse)
    return make_plan(config(), topology(), "train", SERVING)[0]
