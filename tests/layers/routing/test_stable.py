"""StableMoE against loops, what its small router learns, and that nothing moves once it has."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.config import ModelConfig, MoEConfig, OptimizerConfig
from gshardx.errors import BadInput
from gshardx.layers import Gather
from gshardx.layers.routing import Capacity, StableRouter
from gshardx.layers.routing.stable import StageState
from gshardx.models.decoder import check_model
from gshardx.models.moe import router_matrices, router_words
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.train.optimizer import build_optimizer
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, data
from tests.layers.routing.test_smoe_dropout import restored
from tests.layers.test_moe import IDS, assert_equal, inputs, layer
from tests.oracles import choice
from tests.oracles import stable as oracle

V, STEPS = 40, 3
SETTINGS = {
    "room for all": ((12, 4), Capacity(None), {"dimension": 3}),
    "tight": ((13, 8), Capacity(0.6), {"bias": True, "dimension": 5}),
    "by gate": ((12, 5), Capacity(0.5), {"priority": "gate", "dimension": 2}),
}


@functools.cache
def made(e, **options):
    """``call(params, tokens, valid, rng, ids, state) -> (routing, logits)``, the params, and the router."""
    router = StableRouter(M, e, steps=STEPS, vocab=V, **options, rngs=nnx.Rngs(0))
    graph, params = nnx.split(router)

    @jax.jit
    def call(params, tokens, valid, rng, ids, state):
        own = nnx.merge(graph, params)
        return own.reading(ids)(tokens, valid, rng, state), own.logits(tokens)

    return call, jax.tree.map(np.asarray, nnx.to_pure_dict(params)), router


def at(step, table=None):
    return StageState(jnp.int32(step), jnp.zeros(V, jnp.int32) if table is None else jnp.asarray(table, jnp.int32))


def best_of_words(params):
    return [choice.best(oracle.distilled(word, params["words"], params["directions"]), 1)[0] for word in range(V)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_both_stages(name, training, seed, kind, padding):
    (s, e), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    draw = np.random.default_rng(seed)
    ids, step = draw.integers(0, V, (G, s)).astype(np.int32), seed % (STEPS + 2)
    call, params, _ = made(e, capacity=capacity, **options)
    params = {**params, "kernel": kernel, "words": draw.normal(size=params["words"].shape).astype(np.float32)}
    if kind == "twins":
        params["directions"] = np.repeat(draw.normal(size=(params["words"].shape[1], 1)), e, 1).astype(np.float32)
    table = best_of_words(params) if step > STEPS else None
    routing, logits = call(params, tokens, valid, jax.random.key(0) if training else None, ids, at(step, table))
    slots = capacity_of(capacity, s, e, 1, training)
    groups = [
        oracle.route(
            np.asarray(logits[g], np.float64),
            ids[g],
            params["words"],
            params["directions"],
            step >= STEPS,
            slots,
            valid[g],
            priority=options.get("priority", "position"),
        )
        for g in range(G)
    ]
    assume(kind == "twins" or min(group.margin for group in groups) > 1e-5)
    check(routing, groups)


def test_every_id_has_its_expert_when_stage_two_begins():
    call, params, router = made(4)
    tokens, _, valid = data(0, "random", 12, 4)
    ids = np.random.default_rng(0).integers(0, V, (G, 12)).astype(np.int32)
    state, experts = router.initial_state(), []
    for _ in range(STEPS + 3):
        routing, _ = call(params, tokens, valid, jax.random.key(0), ids, state)
        experts.append(np.asarray(routing.experts[..., 0]))
        state = router.after_step(routing.state)
    assert state.step == STEPS + 1, "no more is counted than is needed"
    np.testing.assert_array_equal(state.table, best_of_words(params))
    assert (experts[0] == experts[STEPS - 1]).all()
    assert (experts[0] != experts[STEPS]).any()
    for found in experts[STEPS:]:
        np.testing.assert_array_equal(found, np.asarray(state.table)[ids])
    for rng in (jax.random.key(0), None):  # inference is in the stage of the state, also where it is just reached
        for step, expected in ((STEPS - 1, experts[0]), (STEPS, experts[STEPS]), (STEPS + 1, experts[STEPS])):
            routing, _ = call(params, tokens, valid, rng, ids, at(step, state.table if step > STEPS else None))
            np.testing.assert_array_equal(routing.experts[..., 0], expected)


def test_balance_is_one_at_balance_and_grows_with_what_is_uneven():
    call, params, _ = made(4)
    eye = 10 * np.eye(4, dtype=np.float32)
    even, uneven = np.tile(eye, (G, 3, 1)), np.tile(eye[:1], (G, 12, 1))
    found = [
        float(call({**params, "kernel": eye}, tokens, np.ones((G, 12), bool), None, np.zeros((G, 12), int), at(0))[0]
              .losses["balance"])
        for tokens in (even, uneven)
    ]  # fmt: skip
    np.testing.assert_allclose(found, [1.0, 4.0], rtol=1e-6)  # 1 + (4 - 1) sigmoid(100)


@functools.cache
def trained(steps=100, after=40):
    """A toy: tokens are vectors of their ids and noise, each cluster of ids has a target of its own; AdamW with decay.

    Each step's experts of all ids without noise by the router in charge, and whether both routers agree.
    """
    e, words, g, s = 4, 16, 4, 32
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(words, M)).astype(np.float32)
    router = StableRouter(M, e, steps=steps, vocab=words, rngs=nnx.Rngs(0), capacity=Capacity(None))
    graph, params = nnx.split(router)
    axes = {name: getattr(router, name).get_metadata()["axes"] for name in ("kernel", "words", "directions")}
    params = nnx.to_pure_dict(params) | {"experts": jnp.asarray(draw.normal(size=(e, M)), jnp.float32)}
    axes["experts"] = ("expert", "embed")
    optimizer = build_optimizer(
        OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.1, warmup_steps=5), 200, axes
    )

    def loss(params, tokens, ids, state):
        own = nnx.merge(graph, {name: params[name] for name in axes if name != "experts"})
        routing = own.reading(ids)(tokens, jnp.ones(ids.shape, bool), jax.random.key(0), state)
        out = routing.weights * params["experts"][routing.experts[..., 0]]
        target = jnp.asarray(vectors)[ids % e]
        aux = 0.3 * routing.losses["balance"] + 0.3 * routing.losses["distillation"]
        return jnp.mean((out - target) ** 2) + aux, routing

    @jax.jit
    def step(params, moments, state, tokens, ids):
        gradient, routing = jax.grad(loss, has_aux=True)(params, tokens, ids, state)
        updates, moments = optimizer.update(gradient, moments, params)
        everything = jnp.arange(words)[None]
        _, now = loss(params, jnp.asarray(vectors)[None], everything, state)
        small = jnp.argmax(params["words"] @ params["directions"], axis=-1)
        big = jnp.argmax(jnp.asarray(vectors) @ params["kernel"], axis=-1)
        seen = now.experts[0, :, 0], (small == big).mean(), gradient
        return optax.apply_updates(params, updates), moments, router.after_step(routing.state), seen

    moments, state, rows = optimizer.init(params), router.initial_state(), []
    for _ in range(steps + after):
        ids = draw.integers(0, words, (g, s))
        tokens = (vectors[ids] + 0.1 * draw.normal(size=(g, s, M))).astype(np.float32)
        before = params
        params, moments, state, seen = step(params, moments, state, tokens, ids)
        rows.append(jax.device_get((*seen, before)))
    return rows, steps


def test_the_small_router_learns_what_the_large_one_does():
    rows, steps = trained()
    agreement = np.array([row[1] for row in rows[:steps]])
    assert agreement[:5].mean() < 0.5
    assert agreement[-20:].mean() > 0.8


def test_nothing_moves_in_stage_two_while_the_gate_is_trained():
    rows, steps = trained()
    experts = [row[0] for row in rows]
    assert sum((a != b).any() for a, b in itertools.pairwise(experts[:steps])) > 5
    for row in rows[steps:]:
        np.testing.assert_array_equal(row[0], experts[steps])
    first, last = rows[steps], rows[-1]
    for name in ("words", "directions"):
        np.testing.assert_array_equal(last[2][name], 0.0)
    assert np.abs(last[3]["kernel"] - first[3]["kernel"]).max() > 1e-3
    assert np.abs(last[3]["words"] - first[3]["words"]).max() > 1e-4, "momentum moves them: the table is what holds"


def test_neither_gradient_nor_weight_decay_reaches_the_small_router_in_stage_two():
    call, params, router = made(4)
    tokens, _, valid = data(1, "random", 12, 4)
    ids = np.random.default_rng(0).integers(0, V, (G, 12)).astype(np.int32)
    axes = {name: getattr(router, name).get_metadata()["axes"] for name in params}

    def loss(params, step):
        routing, _ = call(params, tokens, valid, jax.random.key(0), ids, at(step))
        return jnp.sum(routing.weights**2) + routing.losses["balance"] + routing.losses["distillation"]

    first, second = (jax.grad(loss)(params, step) for step in (0, STEPS))
    optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.5, warmup_steps=0), 10, axes)
    updates, _ = optimizer.update(second, optimizer.init(params), params)
    for name in ("words", "directions"):
        assert np.abs(first[name]).max() > 1e-4
        np.testing.assert_array_equal(optax.apply_updates(params, updates)[name], params[name])
    assert np.abs(second["kernel"]).max() > 1e-4


def test_a_restored_state_is_in_the_stage_that_it_left(tmp_path):
    call, params, router = made(4)
    tokens, _, valid = data(0, "random", 12, 4)
    ids = np.random.default_rng(0).integers(0, V, (G, 12)).astype(np.int32)
    whole, cut = router.initial_state(), router.initial_state()
    for step in range(STEPS + 3):
        one, other = (call(params, tokens, valid, jax.random.key(0), ids, state)[0] for state in (whole, cut))
        np.testing.assert_array_equal(one.experts, other.experts)
        params = {**params, "words": -params["words"]} if step >= STEPS else params
        whole, cut = router.after_step(one.state), restored(tmp_path / str(step), router.after_step(other.state))
        jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, expert=2, tensor=2), MeshConfig(fsdp=4, expert=2)], ids=str)
def test_stage_two_begins_alike_on_eight_devices(mesh):
    moe = layer(Gather(), "stable", steps=STEPS)
    x, valid = inputs()
    state = moe.router.initial_state()._replace(step=jnp.int32(STEPS))
    run = jax.jit(lambda x, state: moe(x, valid, jax.random.key(0), state, IDS))
    one = run(x, state)
    assert len(np.unique(one[1].state.table)) > 4
    with jax.set_mesh(build_mesh(mesh)):
        assert_equal(jax.block_until_ready(jax.jit(run)(x, state)), one, 1e-5)


@pytest.mark.parametrize("options", [{"steps": 0}, {"dimension": 0}], ids=str)
def test_options_that_cannot_be_met_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(BadInput, match=f"{name} = {value}: must be 1 or more"):
        StableRouter(M, 4, vocab=V, **options, rngs=nnx.Rngs(0))


def test_what_it_lacks_is_said():
    with pytest.raises(BadInput, match="give the vocabulary's size as vocab"):
        StableRouter(M, 4, vocab=None, rngs=nnx.Rngs(0))
    router = StableRouter(M, 4, vocab=V, rngs=nnx.Rngs(0))
    with pytest.raises(BadInput, match="give the layer its argument ids"):
        router(np.zeros((1, 2, M), np.float32), np.ones((1, 2), bool), None, router.initial_state())
    with pytest.raises(BadInput, match=r"nothing but its loss teaches .*; set model.moe.losses.distillation to 0.3"):
        check_model(ModelConfig(moe=MoEConfig(router="stable", top_k=1)))


def test_lookups_are_no_products():
    moe = MoEConfig(num_experts=8, router="stable", top_k=1, losses={"distillation": 0.3})
    model = ModelConfig(width=16, moe=moe)
    assert router_matrices(model) == [(50, 8), (16, 8)]
    assert router_words(model) == 50
    assert router_words(ModelConfig()) == 0
