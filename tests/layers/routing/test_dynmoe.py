"""Top-any gating against loops, its gradient, and experts that are added and removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, DynMoERouter
from gshardx.layers.routing.dynmoe import penalty
from gshardx.layers.routing.growth import start
from gshardx.models.decoder import check_model
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import dynmoe as oracle

SETTINGS = {
    "any of eight": ((12, 8, 8), Capacity(None)),
    "two of five, tight": ((13, 5, 2), Capacity(0.3)),
    "one token": ((1, 3, 1), Capacity(0.01)),
}
DROPLESS = Capacity(None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    given = np.random.default_rng(seed)
    threshold = given.normal(size=e).astype(np.float32) / 3 * (seed % 2)
    state = start(M, e, e)._replace(
        exists=jnp.asarray(given.random(e) < 0.7).at[seed % e].set(True),
        added=jnp.arange(e) == 0,
        columns=jnp.zeros((M, e)).at[:, 0].set(jnp.asarray(kernel[:, 0])),  # what it has already
        unserved=jnp.ones(M),
        used=jnp.ones(e),
    )
    call = compiled(DynMoERouter, e, k, capacity=capacity)
    rng = jax.random.key(0) if training else None
    routing = call(kernel, tokens, valid, rng, state, threshold=threshold)[0]
    slots = capacity_of(capacity, s, e, k, training)
    limits = np.where(np.asarray(state.added), 0, threshold)
    found = [
        oracle.route(tokens[g], kernel, limits, np.asarray(state.exists), k, slots, valid[g], training=training)
        for g in range(G)
    ]
    groups, loads, lost = zip(*found, strict=True)
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    np.testing.assert_allclose(routing.losses.pop("diversity"), groups[0].losses["diversity"] * valid.any(), atol=2e-3)
    check(routing, [group._replace(losses={n: group.losses[n] for n in ("balance", "z")}) for group in groups])
    if training:
        np.testing.assert_array_equal(routing.state.used, 1 + sum(loads))
        unserved = sum(tokens[g][lost[g]].sum(0) for g in range(G))
        np.testing.assert_allclose(routing.state.unserved, 1 + unserved, atol=1e-5)
        assert not np.asarray(routing.state.added).any()


def test_the_gradient_of_the_sign_goes_straight_through_to_active_experts_alone():
    tokens, kernel, valid = data(1, "random", 12, 6)
    call = compiled(DynMoERouter, 6, 6, capacity=DROPLESS)
    state, target = start(M, 6, 6), np.random.default_rng(0).normal(size=(G, 12, 6)).astype(np.float32)
    active = np.asarray(call(kernel, tokens, valid, None, state)[1]) > 0

    def weighed(kernel, threshold):
        routing = call(kernel, tokens, valid, jax.random.key(0), state, threshold=threshold)[0]
        chosen = routing.experts[..., None] == jnp.arange(6)
        return jnp.sum(target * jnp.einsum("gsk,gske->gse", routing.weights, chosen.astype(jnp.float32)))

    def smooth(kernel, threshold):
        unit = [x / jnp.linalg.norm(x, axis=axis, keepdims=True) for x, axis in ((tokens, -1), (kernel, 0))]
        scores = jax.nn.sigmoid(jnp.einsum("gsm,me->gse", *unit)) - jax.nn.sigmoid(threshold)
        return jnp.sum(target * scores * active / np.maximum(active.sum(-1, keepdims=True), 1))

    found, expected = (jax.grad(f, argnums=(0, 1))(kernel, np.zeros(6, np.float32)) for f in (weighed, smooth))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
        assert np.abs(other).max() > 0.01


def along(*directions):
    """Tokens ``[1, s, m]``, ten of each direction."""
    return np.repeat(np.asarray(directions, np.float32), 10, axis=0)[None]


X, Y, Z = np.eye(M, dtype=np.float32)[:3]


def scripted(steps, every=2, initial=2):
    """A router whose first two columns are X and Y sees each step's tokens; the states after each step."""
    router = DynMoERouter(M, 4, 4, initial=initial, every=every, capacity=DROPLESS, rngs=nnx.Rngs(0))
    graph, params = nnx.split(router)
    params["kernel"].set_value(jnp.asarray(np.stack([X, Y, X, Y], axis=1)))

    @jax.jit
    def step(tokens, state):
        routing = nnx.merge(graph, params)(tokens, jnp.ones(tokens.shape[:2], bool), jax.random.key(0), state)
        return routing, router.after_step(routing.state)

    state, found = router.initial_state(), []
    for tokens in steps:
        routing, state = step(tokens, state)
        found.append((routing, state))
    return found


def test_experts_that_nobody_uses_go_and_tokens_without_one_get_one():
    left = along(X, -X)
    found = scripted([left, left, left, along(X, -X, -Z), *4 * [along(X, X)]])
    exists = [np.asarray(state.exists).astype(int).tolist() for _, state in found]
    assert exists[0] == [1, 1, 0, 0]
    assert exists[1] == [1, 1, 0, 0], "Y, whom nobody used, made room for the tokens along -X"
    np.testing.assert_allclose(found[1][1].columns[:, 1], -X, atol=1e-6)
    np.testing.assert_array_equal(found[1][1].added, [False, True, False, False])
    assert exists[3] == [1, 1, 1, 0], "all are used, and one is added for those along -Z"
    np.testing.assert_allclose(found[3][1].columns[:, 2], -Z, atol=1e-6)
    assert exists[5] == exists[7] == [1, 0, 0, 0], "those that nobody used are gone"
    active = [4 - int((np.asarray(routing.stats.load) == 0).sum()) for routing, _ in found]
    assert active == [1, 1, 2, 2, 1, 1, 1, 1]
    served = [np.asarray(routing.experts)[0, ::10, 0].tolist() for routing, _ in found]
    assert served[1:4] == [[0, 4], [0, 1], [0, 1, 4]]
    assert all(np.asarray(routing.keep).sum() == routing.stats.load.sum() for routing, _ in found)


def test_an_added_expert_starts_where_its_tokens_are_and_goes_on_learning():
    tokens = along(X, -X)
    state = scripted(2 * [tokens])[-1][1]
    call = compiled(DynMoERouter, 4, 4, capacity=DROPLESS)
    for seed in (0, 1):  # whatever the parameters in its place are
        kernel = np.random.default_rng(seed).normal(size=(M, 4)).astype(np.float32)
        threshold = np.full(4, 0.9, np.float32)
        routing = call(kernel, tokens, np.ones((1, 20), bool), jax.random.key(0), state, threshold=threshold)[0]
        assert (np.asarray(routing.experts)[0, 10:, 0] == 1).all()
        np.testing.assert_allclose(kernel[:, 1] + np.asarray(routing.state.columns[:, 1]), -X, atol=1e-6)
        np.testing.assert_allclose(threshold[1] + np.asarray(routing.state.thresholds[1]), 0.0, atol=1e-6)
    moved = kernel + 0.5 * Z[:, None]
    after = call(moved, tokens, np.ones((1, 20), bool), jax.random.key(0), routing.state, threshold=threshold)[0]
    np.testing.assert_allclose(moved[:, 1] + np.asarray(after.state.columns[:, 1]), 0.5 * Z - X, atol=1e-6)


def test_some_expert_always_stays():
    unmoved = scripted(4 * [along(0 * X)])
    assert np.asarray(unmoved[-1][1].exists).tolist() == [True, True, False, False]
    lost = scripted(2 * [along(-X - Y)])[-1][1]
    assert np.asarray(lost.exists).tolist() == [True, True, True, False], "they may serve later"
    full = scripted(2 * [along(-X - Y)], initial=4)[-1][1]
    assert np.asarray(full.exists).all()
    assert not np.asarray(full.added).any()


def test_balance_is_one_however_many_a_token_activates_and_there_are():
    call = compiled(DynMoERouter, 4, 4, capacity=DROPLESS)
    for threshold, k, exist in ((0.5, 1, 4), (-0.5, 4, 4), (0.5, 1, 2)):
        each, state = along(*np.eye(M)[:exist]), start(M, 4, exist)
        valid, thresholds = np.ones(each.shape[:2], bool), np.full(4, threshold)
        found = call(np.eye(M), each, valid, jax.random.key(0), state, threshold=thresholds)[0]
        assert int(found.stats.load.sum()) == 10 * exist * k
        np.testing.assert_allclose(found.losses["balance"], 1.0, rtol=1e-6)


def test_the_penalty_is_smooth_where_columns_are_orthogonal_or_zero():
    columns, exists = np.eye(6, 4, dtype=np.float32), np.array([True, True, True, False])
    np.testing.assert_allclose(penalty(columns, exists), 1.0, atol=2e-3)
    columns[:, 3] = 1  # does not exist
    np.testing.assert_allclose(penalty(columns, exists), 1.0, atol=2e-3)
    columns[:, 1] = 2 * columns[:, 0]
    np.testing.assert_allclose(penalty(columns, exists), np.sqrt(2) + 4 / 3, rtol=1e-5)
    columns[:, 2] = 0
    assert np.isfinite(jax.grad(penalty)(columns, exists)).all()


def test_what_it_can_not_be_is_one_line():
    for options, said in (
        ({"initial": 9}, "initial = 9: must be from 1 to num_experts = 8"),
        ({"initial": 0}, "initial = 0: must be from 1"),
        ({"every": 0}, "every = 0: must be 1 step or more"),
        ({"bias": True}, "dynmoe has a threshold for each expert instead; leave bias out"),
    ):
        with pytest.raises(BadInput, match=said):
            DynMoERouter(M, 8, 2, **options, rngs=nnx.Rngs(0))
    with pytest.raises(BadInput, match=r"losses\.diversity is no loss of this router; use .* dynmoe"):
        check_model(ModelConfig(moe=MoEConfig(losses={"diversity": 0.1})))
    check_model(ModelConfig(moe=MoEConfig(router="dynmoe", losses={"diversity": 0.1})))
