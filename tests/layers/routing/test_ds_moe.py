"""DS-MoE against loops: all experts in training, k of them at inference, and what the loss makes of the gates."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.layers.routing import Capacity, DsMoeRouter
from gshardx.layers.routing.ds_moe import MutualInformationLoss
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import choice
from tests.oracles import ds_moe as oracle

SETTINGS = {
    "dense": ((12, 8, 2), Capacity(1.0), {}),
    "tight": ((13, 5, 2), Capacity(0.6), {}),
    "by gate": ((12, 4, 1), Capacity(0.5, evaluation=1.0), {"priority": "gate"}),
}


class Losses(dict):
    """A mapping that a cache can key by."""

    def __hash__(self):
        return hash(tuple(self))


LOSSES = Losses(DsMoeRouter.LOSSES, mutual_information=MutualInformationLoss())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    call = compiled(DsMoeRouter, e, k, capacity=capacity, losses=LOSSES, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0) if training else None)
    logits, width = np.asarray(logits, np.float64), e if training else k
    slots, priority = capacity_of(capacity, s, e, width, training), options.get("priority", "position")
    groups = [oracle.route(logits[g], k, width, slots, valid[g], priority=priority) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    expected = oracle.mutual_information([choice.softmax(row) for row in logits[valid]])
    np.testing.assert_allclose(routing.losses.pop("mutual_information"), expected, atol=1e-5)
    check(routing, groups)


def test_training_weighs_all_experts_and_inference_the_best_of_the_same_gates():
    tokens, kernel, _ = data(1, "random", 12, 8)
    valid = np.ones((G, 12), bool)
    call = compiled(DsMoeRouter, 8, 2, capacity=Capacity(1.25))
    dense, sparse = (call(kernel, tokens, valid, rng)[0] for rng in (jax.random.key(0), None))
    assert dense.keep.all()
    assert dense.weights.shape[-1] == 8
    np.testing.assert_allclose(np.asarray(dense.weights).sum(-1), 1.0, atol=1e-6)
    assert sparse.weights.shape[-1] == 2
    np.testing.assert_array_equal(sparse.experts, dense.experts[..., :2])
    np.testing.assert_array_equal(sparse.weights, dense.weights[..., :2])


def test_the_loss_makes_tokens_choose_and_experts_even():
    """SGD on it alone, from gates that are near uniform: mutual information grows towards ln 4."""
    tokens, kernel, valid = data(3, "random", 32, 4)
    call = compiled(DsMoeRouter, 4, 1, capacity=Capacity(None), losses=LOSSES)
    slope = jax.jit(jax.value_and_grad(lambda w: call(w, tokens, valid, None)[0].losses["mutual_information"]))
    kernel = 0.1 * kernel
    first = float(slope(kernel)[0])
    for _ in range(100):
        kernel = kernel - slope(kernel)[1]
    gates = jax.nn.softmax(tokens @ np.asarray(kernel), axis=-1).reshape(-1, 4)
    assert -0.1 < first < 0
    assert float(slope(kernel)[0]) < -0.9
    assert np.asarray(gates.max(-1)).mean() > 0.8
    np.testing.assert_allclose(np.asarray(gates.mean(0)), 0.25, atol=0.15)


def test_the_gradient_of_the_loss_is_finite_where_gates_are_zero():
    tokens, kernel, valid = data(4, "random", 12, 4)
    call = compiled(DsMoeRouter, 4, 1, capacity=Capacity(None), losses=LOSSES)
    gradient = jax.grad(lambda w: call(w, tokens, valid, None)[0].losses["mutual_information"])(1e4 * kernel)
    assert np.isfinite(gradient).all()
    assert gradient.shape == (M, 4)
