"""A tiny model with a byte tokenizer, and engines on it."""

import jax
import numpy as np
import pytest

from gshardx.config import Config, ModelConfig, MoEConfig
from gshardx.data.tokenizer import build_tokenizer
from gshardx.infer.engine import Engine
from gshardx.infer.load import LoadedRun
from gshardx.infer.settings import EngineConfig
from gshardx.models.build import Variables, blueprint
from gshardx.sharding import MeshConfig, build_mesh

MODEL = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, moe=MoEConfig(num_experts=8, hidden=8)
)
VOCAB = 258  # the tokenizer's 257, and one that makes it even, as meshes with tensor = 2 need
SMALL = EngineConfig(slots=4, max_length=64, page_size=4, budget=16, tile=8, steps=4)


class Model:
    """A model with random weights on a mesh."""

    def __init__(self, mesh=MeshConfig(), config=MODEL):  # noqa: B008 (frozen)
        self.tokenizer = build_tokenizer("bytes", 0, [])
        self.mesh = build_mesh(mesh)
        self.plan = blueprint(config, VOCAB, self.mesh)
        self.variables = Variables(self.plan.init(jax.random.key(0)), self.plan.init_router())

    def run(self):
        """As it would be loaded."""
        return LoadedRun(Config(model=MODEL), self.tokenizer, self.plan, self.variables, self.mesh, 0)

    def engine(self, config=SMALL):
        return Engine(self.plan, self.variables, self.mesh, self.tokenizer, config)


@pytest.fixture(scope="session")
def model():
    return Model()


@pytest.fixture(scope="module")
def engine(model):
    return model.engine()


def texts(seed, count, longest=30):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, draw.integers(1, longest)).astype(np.int32) for _ in range(count)]
