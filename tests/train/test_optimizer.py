"""Every optimizer, whole, against a NumPy twin: on one device and on meshes that split the matrices."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.config import Config, ModelConfig, MoEConfig, OptimizerConfig
from gshardx.sharding import MeshConfig
from gshardx.train.job import Job
from gshardx.train.optimizer import build_optimizer
from gshardx.train.optimizers import OPTIMIZERS
from tests.oracles import optimizers as oracle
from tests.train.optimizers.stacks import PARAMETERS, compiled, drawn, units

STEPS = 20
CONFIGS = {
    "adamw": OptimizerConfig(),
    "adafactor": OptimizerConfig(name="adafactor", beta1=0.0, learning_rate=0.01),
    "adafactor, momentum": OptimizerConfig(name="adafactor", learning_rate=0.01),
    "lion": OptimizerConfig(name="lion", beta2=0.99, learning_rate=3e-4),
    "muon": OptimizerConfig(name="muon"),
}
CONFIGS = {name: dataclasses.replace(config, warmup_steps=4) for name, config in CONFIGS.items()}
QUICK = (MeshConfig(), MeshConfig(fsdp=2, expert=4))
# On fsdp=8 neither the 2 layers nor the 4 experts divide; on the last one the mesh splits both sides of a matrix.
MESHES = (*QUICK, MeshConfig(fsdp=8), MeshConfig(fsdp=2, expert=2, tensor=2))
CASES = [
    pytest.param(name, mesh, marks=[] if mesh in QUICK and name != "adafactor, momentum" else pytest.mark.sweep)
    for name in CONFIGS
    for mesh in MESHES
]


def rules(config, parameter):
    adam = oracle.adamw(config.beta1, config.beta2, config.epsilon, parameter.unit)
    rule = {
        "adamw": adam,
        "adafactor": oracle.adafactor(config.beta1, parameter.unit),
        "lion": oracle.lion(config.beta1, config.beta2, parameter.unit),
        "muon": oracle.muon(config.momentum, parameter.unit) if parameter.hidden else adam,
    }[config.name]
    next(rule)
    return rule


def expected(config, weights, gradients):
    """The twin's weights, each stack cut into its matrices and vectors."""
    pieces = [(name, piece) for name in PARAMETERS for piece in units(name, weights[name])]
    return oracle.train(
        [rules(config, PARAMETERS[name]) for name, _ in pieces],
        [PARAMETERS[name].decays for name, _ in pieces],
        [piece for _, piece in pieces],
        [[piece for name in PARAMETERS for piece in units(name, g[name])] for g in gradients],
        [oracle.rate("cosine", t, STEPS, config.learning_rate, config.warmup_steps) for t in range(STEPS)],
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_twenty_steps_are_the_twin_s(name, mesh):
    config, weights = CONFIGS[name], drawn(0, 0.1)
    # Some steps are clipped and some are not; no two steps, layers or experts look alike.
    gradients = [drawn(seed, 0.01 * 1.2**seed) for seed in range(1, STEPS + 1)]
    program = compiled(config, STEPS, mesh)
    params, state = program.begin(weights)
    for gradient in gradients:
        params, state = jax.block_until_ready(program.step(params, state, program.placed(gradient)))
    found = [piece for name in PARAMETERS for piece in units(name, params[name])]
    for mine, theirs in zip(found, expected(config, weights, gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_lies_where_its_parameters_do(name):
    """Each device holds its share of everything with an expert or a model axis; factored means too."""
    program = compiled(CONFIGS[name], STEPS, MeshConfig(fsdp=2, expert=4))
    _, state = program.begin(drawn(0))
    for (path, held), planned in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(program.state), strict=True):
        parameter = next((p for n, p in PARAMETERS.items() if f"'{n}'" in jax.tree_util.keystr(path)), None)
        names = parameter.names.split() if parameter else []
        share = tuple(
            size // ({"expert": 4, "embed": 2}.get(axis, 1) if size > 1 else 1)
            for axis, size in zip(names, held.shape, strict=True)
        )
        assert held.sharding.shard_shape(held.shape) == (share if parameter else held.shape), path
        assert planned.sharding.is_equivalent_to(held.sharding, held.ndim)


def model_axes():
    moe = MoEConfig(num_experts=4, hidden=8, biases=True, shared_hidden=8, shared="residual")
    model = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, moe=moe)
    return Job.of(Config(model=model), 257).blueprint


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_norms_biases_and_routers_do_not(name):
    blueprint = model_axes()
    config = OptimizerConfig(name=name, weight_decay=0.5, warmup_steps=1)
    optimizer = build_optimizer(config, 10, blueprint.axes)
    params = jax.tree.map(lambda a: np.ones(a.shape, np.float32), blueprint.params)
    zero = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def second_update():
        _, state = optimizer.update(zero, optimizer.init(params), params)  # the first step's rate is 0
        return optimizer.update(zero, state, params)[0]

    # "beside" is PR-MoE's network with the gate that weighs it.
    exempt = ("scale", "bias", "b_", "router", "beside.kernel")
    for path, update in jax.tree_util.tree_leaves_with_path(second_update()):
        written = jax.tree_util.keystr(path, simple=True, separator=".")
        assert bool(np.any(update)) != any(part in written for part in exempt), written


def test_without_a_clip_norm_a_large_gradient_stays_large():
    axes, params = {"w": ("embed", "hidden")}, {"w": np.zeros((2, 3), np.float32)}
    gradient = {"w": np.full((2, 3), 100.0, np.float32)}

    def moment(clip_norm):
        optimizer = build_optimizer(OptimizerConfig(clip_norm=clip_norm), 10, axes)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return state[1][0].mu["w"]

    np.testing.assert_allclose(moment(None), 0.1 * gradient["w"], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(moment(1.0)), 0.1, rtol=1e-6)
