"""The gshard router against Algorithm 1's loops, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.layers.draws import draw, folded, row_keys
from gshardx.layers.routing import Capacity, GShardRouter
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import gshard as oracle

ONE_SLOT = Capacity(0.01)
SETTINGS = [
    ((12, 8, 2), Capacity(), {}),
    ((12, 8, 2), ONE_SLOT, {"priority": "gate"}),
    ((12, 8, 2), Capacity(1.0, rounding="four", minimum=4), {"second_expert": "random"}),
    ((12, 8, 2), Capacity(0.5), {"second_expert": "random", "slots": "lingvo"}),
    (
        (12, 8, 3),
        Capacity(0.4),
        {"second_expert": "random", "normalise": "after", "priority": "gate", "threshold": 0.2},
    ),
    ((12, 8, 3), Capacity(0.4), {"second_expert": "random", "normalise": "after", "slots": "lingvo", "threshold": 0.2}),
    ((12, 8, 2), Capacity(0.5), {"second_expert": "sampling"}),
    (
        (12, 8, 3),
        Capacity(0.5, rounding="down"),
        {"second_expert": "sampling", "normalise": "after", "priority": "gate"},
    ),
    ((13, 3, 3), Capacity(0.5), {"normalise": "after"}),
    ((13, 3, 1), Capacity(0.7), {"second_expert": "random"}),
    ((1, 3, 2), ONE_SLOT, {"second_expert": "random", "threshold": 0.9}),
    ((13, 3, 2), Capacity(None), {"second_expert": "sampling"}),
]
NAMES = [f"{shape}-{capacity.factor}-{'-'.join(map(str, options.values()))}" for shape, capacity, options in SETTINGS]


def routed(numbers, capacity, options, tokens, kernel, importance, rng):
    """The router's groups and the oracle's, from the same draws."""
    s, e, k = numbers
    call = compiled(GShardRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, importance, rng)
    slots = capacity_of(capacity, s, e, k, rng is not None)
    assert routing.capacity == slots
    draws = [{} for _ in tokens]
    if rng is not None:
        choice_rng, coin_rng = (folded(row_keys(rng, len(tokens)), number) for number in (0, 1))
        coins = draw(jax.random.uniform, coin_rng, (len(tokens), s, k))
        noise = draw(jax.random.gumbel, choice_rng, (len(tokens), s, e))
        draws = [{"coin": np.asarray(c), "gumbel": np.asarray(n)} for c, n in zip(coins, noise, strict=True)]
    groups = [
        oracle.route(np.asarray(logits[g]), k, slots, np.asarray(importance[g]), **options, **draws[g])
        for g in range(len(tokens))
    ]
    assume(min(group.margin for group in groups) > 1e-6)
    return routing, groups


@pytest.mark.parametrize(("numbers", "capacity", "options"), SETTINGS, ids=NAMES)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_algorithm_1_in_every_setting(numbers, capacity, options, seed, kind, padding):
    tokens, kernel, valid = data(seed, kind, *numbers[:2], padding=padding)
    check(*routed(numbers, capacity, options, tokens, kernel, valid, jax.random.key(seed)))


@pytest.mark.parametrize("options", [{}, {"second_expert": "random", "slots": "lingvo"}], ids=["all", "random"])
@settings(max_examples=12, deadline=None)
@given(seed=DRAWN["seed"], kind=DRAWN["kind"], levels=st.sampled_from([[0, 0.5, 1], [0.25, 1], [0, 0.5]]))
def test_importance_below_one_queues_its_best_experts_with_second_choices(options, seed, kind, levels):
    tokens, kernel, _ = data(seed, kind, 12, 8)
    importance = np.random.default_rng(seed).choice(np.float32(levels), (G, 12))
    routing, groups = routed((12, 8, 2), Capacity(0.5), options, tokens, kernel, importance, jax.random.key(seed))
    check(routing, groups)
    assert not np.asarray(routing.keep)[importance < 1, 0].any()
    assert float(routing.stats.tokens) == (importance > 0).sum()


@pytest.mark.parametrize("policy", ["random", "sampling"])
@pytest.mark.parametrize("evaluation", [None, 0.5])
@settings(max_examples=5, deadline=None)
@given(**DRAWN)
def test_inference_tosses_no_coin_draws_no_sample_and_has_its_own_capacity(policy, evaluation, seed, kind, padding):
    tokens, kernel, valid = data(seed, kind, 12, 8, padding=padding)
    capacity = Capacity(0.01, evaluation=evaluation)
    routing, groups = routed((12, 8, 2), capacity, {"second_expert": policy}, tokens, kernel, valid, None)
    check(routing, groups)
    assert routing.capacity == (12 if evaluation is None else 2)
    assert evaluation is not None or np.asarray(routing.keep).all(-1).sum() == valid.sum()


def test_the_coin_keeps_second_choices_with_the_papers_probability():
    tokens, kernel, valid = data(2, "random", 256, 4, g=8)
    call = compiled(GShardRouter, 4, 2, "random", capacity=Capacity(None))
    calm = call(kernel, tokens, valid, None)[0]
    tossed = call(kernel, tokens, valid, jax.random.key(0))[0]
    expected = 2 * float(calm.weights[..., 1].mean())
    assert 0.2 < expected < 0.8
    assert float(tossed.keep[..., 1].mean()) == pytest.approx(expected, abs=0.02)
    assert np.asarray(tossed.keep)[..., 0].all()
    assert np.asarray(calm.keep).all()


def test_samples_follow_the_softmax_without_the_first():
    e, logits = 4, np.float32([2.0, 1.0, 0.0, -1.0])
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (8, 256, M))
    kernel = np.zeros((M, e), np.float32)
    kernel[0] = logits
    call = compiled(GShardRouter, e, 2, "sampling", capacity=Capacity(None))
    experts = np.asarray(call(kernel, tokens, np.ones((8, 256), bool), jax.random.key(1))[0].experts)
    assert (experts[..., 0] == 0).all()
    share = np.bincount(experts[..., 1].ravel(), minlength=e) / experts[..., 1].size
    expected = np.exp(logits) * [0, 1, 1, 1] / np.exp(logits[1:]).sum()
    np.testing.assert_allclose(share, expected, atol=0.03)


def test_a_rejected_choice_holds_its_slot_in_the_paper_and_frees_it_in_lingvo():
    tokens, kernel, valid = data(3, "random", 64, 4, g=4)
    kept = {}
    for slots in ("paper", "lingvo"):
        call = compiled(GShardRouter, 4, 2, "random", slots=slots, capacity=Capacity(0.6))
        routing = call(kernel, tokens, valid, jax.random.key(0))[0]
        kept[slots] = np.asarray(routing.keep)
        busiest = np.asarray(routing.stats.load).sum()
        assert busiest == (2 * valid.sum() if slots == "paper" else float(routing.stats.choices.sum()))
    np.testing.assert_array_equal(kept["paper"][..., 0], kept["lingvo"][..., 0])
    assert (kept["lingvo"] >= kept["paper"]).all()
    assert kept["lingvo"].sum() > kept["paper"].sum()


def test_weights_before_dropping_add_up_to_one_only_if_all_are_kept_and_after_it_always():
    tokens, kernel, valid = data(4, "random", 64, 4, g=4)
    for normalise in ("before", "after"):
        call = compiled(GShardRouter, 4, 2, normalise=normalise, capacity=Capacity(0.6))
        routing = call(kernel, tokens, valid, jax.random.key(0))[0]
        total, kept = np.asarray(routing.weights).sum(-1), np.asarray(routing.keep).sum(-1)
        assert set(np.unique(kept)) == {0, 1, 2}
        np.testing.assert_allclose(total[kept == 2], 1.0, atol=1e-6)
        np.testing.assert_array_equal(total[kept == 0], 0.0)
        alone = total[kept == 1]
        assert alone.min() < 0.9 if normalise == "before" else np.abs(alone - 1).max() < 1e-6


def test_no_first_choice_is_dropped_while_a_second_one_stays():
    tokens, kernel, valid = data(5, "random", 64, 4, g=4)
    for priority in ("position", "gate"):
        call = compiled(GShardRouter, 4, 2, priority=priority, capacity=Capacity(0.6))
        routing = call(kernel, tokens, valid, jax.random.key(0))[0]
        experts, keep = np.asarray(routing.experts), np.asarray(routing.keep)
        full = mixed = 0
        for g in range(4):
            for expert in range(4):
                here = experts[g] == expert
                lost_first = (here & ~keep[g])[:, 0].any()
                assert not (lost_first and (here & keep[g])[:, 1].any())
                full += lost_first
                mixed += (here & keep[g])[:, 1].any() and (here & ~keep[g])[:, 1].any()
        assert full > 0, "some expert must be full of first choices"
        assert mixed > 0, "some expert must run out of room among second choices"


@pytest.mark.slow
def test_gradient_of_the_weights_is_that_of_the_papers_quotient():
    tokens, kernel, valid = data(6, "random", 12, 8)
    call = compiled(GShardRouter, 8, 2, "random", capacity=Capacity(0.8))
    target = np.random.default_rng(6).normal(size=(G, 12, 2)).astype(np.float32)
    routing = call(kernel, tokens, valid, jax.random.key(0))[0]
    assert not np.asarray(routing.keep).all()

    def quotient(kernel):
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", tokens, kernel), -1)
        chosen = jnp.take_along_axis(gates, routing.experts, axis=-1)
        return jnp.sum(target * routing.keep * chosen / chosen.sum(-1, keepdims=True))

    actual = jax.grad(lambda w: jnp.sum(target * call(w, tokens, valid, jax.random.key(0))[0].weights))(kernel)
    np.testing.assert_allclose(actual, jax.grad(quotient)(kernel), atol=1e-6)
    assert np.abs(actual).max() > 0.01


def test_gradient_of_the_balance_loss_flows_through_the_mean_gate_alone():
    tokens, kernel, valid = data(7, "random", 12, 8, padding="some")
    call = compiled(GShardRouter, 8, 2, capacity=Capacity(0.5))
    experts = np.asarray(call(kernel, tokens, valid, jax.random.key(0))[0].experts)
    real = valid.astype(np.float32)[..., None]
    share = (np.eye(8, dtype=np.float32)[experts[..., 0]] * real).sum(1) / real.sum(1)

    def expected(kernel):
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", tokens, kernel), -1)
        mean = (gates * real).sum(1) / real.sum(1)
        return jnp.sum(8 * (share * mean).sum(-1) * real.sum((1, 2))) / real.sum()

    actual = jax.grad(lambda w: call(w, tokens, valid, jax.random.key(0))[0].losses["balance"])(kernel)
    np.testing.assert_allclose(actual, jax.grad(expected)(kernel), atol=1e-6)
    assert np.abs(actual).max() > 0.01


def test_dropping_changes_no_loss():
    tokens, kernel, valid = data(8, "one expert", 12, 8)
    roomy = compiled(GShardRouter, 8, 2, capacity=Capacity(None))(kernel, tokens, valid, jax.random.key(0))[0]
    tight = compiled(GShardRouter, 8, 2, capacity=ONE_SLOT)(kernel, tokens, valid, jax.random.key(0))[0]
    assert np.asarray(roomy.keep).sum() > 2 * np.asarray(tight.keep).sum()
    for name in roomy.losses:
        np.testing.assert_allclose(roomy.losses[name], tight.losses[name], rtol=1e-6)


def test_a_collapsed_router_costs_the_number_of_experts():
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, 12, M))
    kernel = np.zeros((M, 8), np.float32)
    kernel[0, 3] = 50
    routing = compiled(GShardRouter, 8, 2)(kernel, tokens, np.ones((G, 12), bool), jax.random.key(0))[0]
    assert float(routing.losses["balance"]) == pytest.approx(8.0, abs=1e-5)
