"""The gshard router against the paper's loops, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.layers.routing import GShardRouter
from tests.oracles import gshard as oracle


def router(width, num_experts, k, policy, kernel):
    made = GShardRouter(width, num_experts, k, policy, rngs=nnx.Rngs(0))
    made.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    return made


def check_group(routing, g, gates, k, capacity, valid, coin):
    experts, slots, keep, weights, loss = oracle.route(gates, k, capacity, valid, coin)
    real = np.asarray(valid)
    np.testing.assert_array_equal(np.asarray(routing.experts[g])[real], experts[real])
    np.testing.assert_array_equal(np.asarray(routing.slots[g])[real], slots[real])
    np.testing.assert_array_equal(routing.keep[g], keep)
    np.testing.assert_allclose(routing.weights[g], weights, atol=1e-6)
    return loss


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    s=st.sampled_from([1, 13]),
    e=st.sampled_from([3, 8]),
    k=st.integers(1, 3),
    capacity=st.sampled_from([1, 2, 7, 100]),
    kind=st.sampled_from(["random", "ties", "one expert"]),
    policy=st.sampled_from(["all", "random"]),
)
def test_equals_the_papers_loops(seed, s, e, k, capacity, kind, policy):
    k, g, m = min(k, e), 2, 4
    draw = np.random.default_rng(seed)
    tokens = draw.normal(size=(g, s, m)).astype(np.float32)
    kernel = {"random": draw.normal(size=(m, e)), "ties": np.zeros((m, e)), "one expert": np.eye(m, e) * 30}[kind]
    if kind == "one expert":
        tokens = np.abs(tokens) * np.asarray([1, 0, 0, 0], np.float32)
    valid = draw.random((g, s)) < 0.8
    rng = jax.random.key(seed)
    routing = router(m, e, k, policy, kernel)(jnp.asarray(tokens), jnp.asarray(valid), rng, capacity)
    gates = np.asarray(jax.nn.softmax(jnp.einsum("gsm,me->gse", tokens, jnp.asarray(kernel, jnp.float32)), -1))
    coins = np.asarray(jax.random.uniform(rng, (g, s, k))) if policy == "random" else [None] * g
    losses = [check_group(routing, i, gates[i], k, capacity, valid[i], coins[i]) for i in range(g)]
    count = valid.sum(1)
    expected = float(np.sum(np.asarray(losses) * count) / max(count.sum(), 1))
    assert float(routing.aux_loss) == pytest.approx(expected, abs=1e-5)


def test_no_expert_gets_more_than_its_capacity_and_first_choices_come_first():
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.normal(size=(4, 64, 8)), jnp.float32)
    routing = router(8, 4, 2, "all", draw.normal(size=(8, 4)))(tokens, jnp.ones((4, 64), bool), None, 10)
    for g in range(4):
        for expert in range(4):
            here = np.asarray(routing.experts[g]) == expert
            kept = here & np.asarray(routing.keep[g])
            assert kept.sum() == min(10, here.sum())
            slots = np.asarray(routing.slots[g])[kept]
            assert sorted(slots) == list(range(kept.sum()))
            if kept[:, 1].any():  # a second choice got in: then every first choice did
                assert kept[:, 0].sum() == here[:, 0].sum()


def test_balanced_gates_cost_one_and_a_collapsed_router_costs_e():
    tokens = jnp.eye(4)[None]
    balanced = router(4, 4, 2, "all", np.eye(4) * 50)(tokens, jnp.ones((1, 4), bool), None, 4)
    assert float(balanced.aux_loss) == pytest.approx(1.0, abs=1e-4)
    assert float(balanced.stats.load_max_over_mean) >= 1.0
    collapsed = router(4, 4, 2, "all", np.outer(np.ones(4), [50, 0, 0, 0]))(tokens, jnp.ones((1, 4), bool), None, 4)
    assert float(collapsed.aux_loss) == pytest.approx(4.0, abs=1e-4)


def test_padding_takes_no_slot_and_changes_no_loss():
    draw = np.random.default_rng(1)
    kernel, real = draw.normal(size=(8, 4)), draw.normal(size=(1, 12, 8)).astype(np.float32)
    made = router(8, 4, 2, "all", kernel)
    alone = made(jnp.asarray(real), jnp.ones((1, 12), bool), None, 5)
    padded = np.concatenate([draw.normal(size=(1, 6, 8)), real], axis=1).astype(np.float32)
    valid = jnp.arange(18)[None] >= 6
    both = made(jnp.asarray(padded), valid, None, 5)
    np.testing.assert_array_equal(both.slots[:, 6:], alone.slots)
    np.testing.assert_array_equal(both.keep[:, 6:], alone.keep)
    assert not both.keep[:, :6].any()
    assert float(both.aux_loss) == pytest.approx(float(alone.aux_loss), abs=1e-6)
    assert float(both.stats.drop_fraction) == pytest.approx(float(alone.stats.drop_fraction), abs=1e-6)
    assert float(both.stats.load_max_over_mean) == pytest.approx(float(alone.stats.load_max_over_mean), abs=1e-6)


def test_the_coin_is_tossed_in_training_only_and_never_for_first_choices():
    tokens = jnp.asarray(np.random.default_rng(2).normal(size=(8, 64, 8)), jnp.float32)
    made = router(8, 4, 2, "random", np.random.default_rng(3).normal(size=(8, 4)))
    valid = jnp.ones((8, 64), bool)
    training = made(tokens, valid, jax.random.key(0), 64)
    assert training.keep[..., 0].all()
    kept = float(training.keep[..., 1].mean())
    expected = float(made(tokens, valid, None, 64).weights[..., 1].mean()) * 2  # P(kept) = E[2 w]
    assert 0.1 < expected < 0.9
    assert kept == pytest.approx(expected, abs=0.05)
    assert made(tokens, valid, None, 64).keep.all()


def test_gradient_of_the_balance_loss_flows_through_the_mean_gate_alone():
    draw = np.random.default_rng(4)
    tokens = jnp.asarray(draw.normal(size=(1, 16, 4)), jnp.float32)
    kernel = jnp.asarray(draw.normal(size=(4, 3)), jnp.float32)
    valid = jnp.ones((1, 16), bool)
    gates = jax.nn.softmax(tokens @ kernel, -1)
    share = jax.nn.one_hot(gates.argmax(-1), 3).mean(1)

    def expected(kernel):
        return 3 * jnp.sum(share * jax.nn.softmax(tokens @ kernel, -1).mean(1))

    def actual(kernel):
        made = router(4, 3, 2, "all", np.zeros((4, 3)))
        made.kernel.set_value(kernel)
        return made(tokens, valid, None, 16).aux_loss

    np.testing.assert_allclose(jax.grad(actual)(kernel), jax.grad(expected)(kernel), atol=1e-6)
