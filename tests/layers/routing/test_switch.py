"""The switch router against the paper's loops, token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.layers.draws import draw
from gshardx.layers.routing import Capacity, SwitchRouter
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import switch as oracle

PAPER = Capacity(1.25, evaluation=2.0)
SETTINGS = [
    ((12, 8), PAPER, {}),
    ((12, 8), Capacity(0.01), {"priority": "gate", "jitter": 0.3}),
    ((13, 3), Capacity(0.6, evaluation=0.6, rounding="down"), {"jitter": 0.0}),
    ((1, 3), PAPER, {"jitter": 0.5}),
]


def jittered(tokens, rng, jitter):
    """The tokens that the router sees in training."""
    if rng is None or jitter == 0:
        return jnp.asarray(tokens)
    return tokens * draw(partial(jax.random.uniform, minval=1 - jitter, maxval=1 + jitter), rng, tokens.shape)


@pytest.mark.parametrize(("numbers", "capacity", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_papers_loops_in_every_setting(numbers, capacity, options, training, seed, kind, padding):
    s, e = numbers
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    rng = jax.random.key(seed) if training else None
    call = compiled(SwitchRouter, e, capacity=capacity, **options)
    routing = call(kernel, tokens, valid, rng)[0]
    seen = jittered(tokens, rng, options.get("jitter", 0.01))
    logits = np.einsum("gsm,me->gse", np.asarray(seen, np.float64), kernel.astype(np.float64))
    slots = capacity_of(capacity, s, e, 1, training)
    priority = options.get("priority", "position")
    groups = [oracle.route(logits[g], slots, valid[g], priority=priority) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, groups)


def test_the_papers_capacity_is_larger_in_evaluation():
    tokens, kernel, valid = data(0, "random", 12, 8)
    call = compiled(SwitchRouter, 8, capacity=PAPER)
    assert call(kernel, tokens, valid, jax.random.key(0))[0].capacity == 2
    assert call(kernel, tokens, valid, None)[0].capacity == 3


def test_jitter_is_drawn_in_training_only_and_stays_within_its_bounds():
    tokens, kernel, valid = np.ones((G, 12, M), np.float32), np.eye(M, dtype=np.float32), np.ones((G, 12), bool)
    call = compiled(SwitchRouter, M, jitter=0.3, capacity=Capacity(None))
    calm = np.asarray(call(kernel, tokens, valid, None)[0].weights)
    np.testing.assert_array_equal(calm, 1 / M)
    noisy = np.asarray(call(kernel, tokens, valid, jax.random.key(0))[0].weights)
    largest = np.exp(1.3) / (np.exp(1.3) + (M - 1) * np.exp(0.7))
    assert noisy.max() > 1 / M + 0.05
    assert noisy.max() <= largest + 1e-6


def test_the_router_learns_through_the_weight_as_the_softmax_says():
    tokens, kernel, valid = data(1, "random", 12, 8)
    call = compiled(SwitchRouter, 8, capacity=Capacity(None))
    target = np.random.default_rng(1).normal(size=(G, 12)).astype(np.float32)
    routing, logits = call(kernel, tokens, valid, None)
    gates, first = np.asarray(jax.nn.softmax(logits, -1), np.float64), np.eye(8)[np.asarray(routing.experts)[..., 0]]
    slope = (gates * first).sum(-1, keepdims=True) * (first - gates)  # dp_i / dlogit_e = p_i (1[i = e] - p_e)
    expected = np.einsum("gs,gse,gsm->me", target, slope, tokens)
    actual = jax.grad(lambda w: jnp.sum(target * call(w, tokens, valid, None)[0].weights[..., 0]))(kernel)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_priority_at_random_keeps_as_many_anywhere_in_the_group():
    tokens, kernel, valid = data(2, "one expert", 64, 4, g=64, padding="some")
    keep = {}
    for priority, seed in (("position", 0), ("random", 0), ("random", 1)):
        call = compiled(SwitchRouter, 4, jitter=0.0, priority=priority, capacity=Capacity(1.0))
        keep[priority, seed] = np.asarray(call(kernel, tokens, valid, jax.random.key(seed))[0].keep)[..., 0]
        routing = call(kernel, tokens, valid, None)[0]
        np.testing.assert_array_equal(routing.keep[..., 0], valid)
    by_position, one, other = keep.values()
    np.testing.assert_array_equal(one.sum(1), by_position.sum(1))
    assert not one[~valid].any()
    assert (one != other).mean() > 0.2
    by_half = [part.sum() for part in np.split(one, 2, axis=1)]
    assert 0.8 < by_half[0] / by_half[1] < 1.25, "1024 tokens that stay"
    by_half = [part.sum() for part in np.split(by_position, 2, axis=1)]
    assert by_half[0] > 2 * by_half[1]


def test_priority_by_gate_keeps_the_highest_gates_and_drops_no_more_gate_mass():
    tokens, kernel, valid = data(2, "random", 64, 4, g=4, padding="some")
    kept, mass = {}, {}
    for priority in ("position", "gate"):
        call = compiled(SwitchRouter, 4, jitter=0.0, priority=priority, capacity=Capacity(0.5))
        routing, logits = call(kernel, tokens, valid, jax.random.key(0))
        experts, keep = np.asarray(routing.experts)[..., 0], np.asarray(routing.keep)[..., 0]
        gates = np.asarray(jax.nn.softmax(logits, -1)).max(-1)
        kept[priority], mass[priority] = keep, (gates * keep).sum()
    contested = 0
    for g in range(4):
        for expert in range(4):
            here = (experts[g] == expert) & valid[g]
            assert kept["gate"][g, here].sum() == kept["position"][g, here].sum()
            if (here & ~kept["gate"][g]).any():
                assert gates[g, here & kept["gate"][g]].min() >= gates[g, here & ~kept["gate"][g]].max()
                contested += 1
    assert contested > 4
    assert mass["gate"] > mass["position"]


def test_a_collapsed_router_costs_the_number_of_experts():
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, 12, M))
    kernel = np.zeros((M, 8), np.float32)
    kernel[0, 3] = 50
    routing = compiled(SwitchRouter, 8, capacity=PAPER)(kernel, tokens, np.ones((G, 12), bool), jax.random.key(0))[0]
    assert float(routing.losses["balance"]) == pytest.approx(8.0, abs=1e-5)
    assert int(routing.keep.sum()) == 2 * G
