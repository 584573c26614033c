"""What routers promise that merge experts: each against its loops, rows apart, padding nowhere, nothing dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers import Auto, Experts, MoE
from gshardx.layers.draws import draw
from gshardx.layers.losses import ImportanceLoss
from gshardx.layers.routing import LoryRouter, MeoRouter, SmearRouter
from tests.layers.routing.cases import DRAWN, G, M, compiled, data
from tests.layers.routing.test_noisy_top_k import Frozen
from tests.oracles import choice
from tests.oracles import lory as lory_oracle
from tests.oracles import meo as meo_oracle
from tests.oracles import smear as smear_oracle
from tests.oracles.noisy_top_k import cv_squared

E, S = 4, 12
ROUTERS = {
    "smear": (SmearRouter, (E,), {}),
    "smear, dropped": (SmearRouter, (E,), {"expert_dropout": 0.4}),
    "lory": (LoryRouter, (E,), {"segment": 4}),
    "meo": (MeoRouter, (E, 2), {}),
}
LOSSES = Frozen({**MeoRouter.LOSSES, "importance": ImportanceLoss()})


def routed(name, tokens, kernel, valid, training=True, **parameters):
    make, numbers, options = ROUTERS[name]
    rng = jax.random.key(3) if training else None
    return compiled(make, *numbers, **options)(kernel, tokens, valid, rng, **parameters)[0]


def check_mixtures(routing, mixtures, logits, valid, stretch):
    """Mixtures and logits ``[g, n, e]`` of the loops against what every token has, and what is made of them."""
    mixtures, logits = (np.repeat(x, stretch, axis=1) for x in (mixtures, logits))
    found = np.zeros(mixtures.shape)
    np.put_along_axis(found, np.asarray(routing.experts), np.asarray(routing.weights), -1)
    # Logits of some 20, of means that a LayerNorm may have made ten times as large, in fp32.
    np.testing.assert_allclose(found, mixtures * valid[..., None], atol=1e-5)
    np.testing.assert_array_equal(routing.keep, np.broadcast_to(valid[..., None], routing.keep.shape))
    some = valid.reshape(G, -1, stretch).any(-1)
    z = choice.z(logits[:, ::stretch].reshape(-1, logits.shape[-1]), some.reshape(-1))
    np.testing.assert_allclose(routing.losses["z"], z, rtol=1e-4, atol=1e-5)
    stats = routing.stats
    np.testing.assert_allclose(stats.load, (mixtures * valid[..., None]).sum((0, 1)), atol=1e-4)
    assert float(stats.tokens) == float(stats.choices.sum()) == valid.sum()
    assert float(stats.dropped.sum()) == 0
    assert routing.stretch == stretch


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["smear", "smear, dropped"])
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_smear_equals_the_loops(name, training, seed, kind, padding):
    tokens, kernel, valid = data(seed, kind, S, E, padding=padding)
    scale, shift = np.random.default_rng(seed).normal(size=(2, M)).astype(np.float32)
    routing = routed(name, tokens, kernel, valid, training, norm_scale=scale, norm_bias=shift)
    rate = ROUTERS[name][2].get("expert_dropout", 0.0)
    left_out = [None] * G
    if training and rate:
        left_out = np.asarray(draw(lambda key, shape: jax.random.bernoulli(key, rate, shape), jax.random.key(3),
                                   (G, 1, E)))[:, 0]  # fmt: skip
    rows = [smear_oracle.mixture(tokens[g], valid[g], kernel, scale, shift, left_out[g]) for g in range(G)]
    logits, mixtures = (np.array(x)[:, None] for x in zip(*rows, strict=True))
    check_mixtures(routing, mixtures, logits, valid, S)
    np.testing.assert_allclose(routing.losses["balance"], float(valid.any()), atol=1e-6)


@pytest.mark.parametrize(("segment", "bias"), [(4, False), (1, True), (256, True)])
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_lory_equals_the_loops(segment, bias, seed, kind, padding):
    tokens, kernel, valid = data(seed, kind, S, E, padding=padding)
    b = np.random.default_rng(seed).normal(size=E).astype(np.float32) if bias else np.zeros(E, np.float32)
    call = compiled(LoryRouter, E, segment=segment, bias=bias)
    routing = call(kernel, tokens, valid, None, **({"bias": b} if bias else {}))[0]
    rows = [lory_oracle.mixtures(tokens[g], valid[g], kernel, b, segment) for g in range(G)]
    logits, mixtures = (np.array(x) for x in zip(*rows, strict=True))
    check_mixtures(routing, mixtures, logits, valid, min(segment, S))


@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_meo_equals_the_loops(training, seed, kind, padding):
    tokens, kernel, valid = data(seed, kind, S, E, padding=padding)
    scale = np.random.default_rng(seed).normal(size=(M, E)).astype(np.float32)
    rng = jax.random.key(seed) if training else None
    routing = compiled(MeoRouter, E, 2, losses=LOSSES)(kernel, tokens, valid, rng, noise=scale)[0]
    noise = np.asarray(draw(jax.random.normal, rng, (G, 1, E)))[:, 0] if training else [None] * G
    rows = [meo_oracle.decision(tokens[g], valid[g], kernel, 2, noise[g], scale) for g in range(G)]
    logits, experts, weights, chances, margins = (list(x) for x in zip(*rows, strict=True))
    assume(min(margins) > 1e-5)
    for g in range(G):
        np.testing.assert_array_equal(np.asarray(routing.experts[g]), np.tile(experts[g], (S, 1)))
    mixtures = np.zeros((G, 1, E))
    for g in range(G):
        mixtures[g, 0, experts[g]] = weights[g]
    check_mixtures(routing, mixtures, np.array(logits)[:, None], valid, S)
    some = valid.any(1)
    expected = {
        "importance": cv_squared(mixtures, some[:, None]),
        "load": cv_squared(np.array(chances)[:, None], some[:, None]),
        "balance": choice.balance(mixtures[:, 0], np.array(experts), some) if some.any() else 0.0,
    }
    for loss, value in expected.items():
        np.testing.assert_allclose(routing.losses[loss], value, rtol=1e-4, atol=1e-4)


def test_meo_takes_the_first_of_equal_experts():
    tokens, kernel, valid = data(0, "ties", S, E)
    routing = routed("meo", tokens, kernel, valid, training=False)
    np.testing.assert_array_equal(routing.experts, np.broadcast_to([0, 1], routing.experts.shape))
    np.testing.assert_allclose(routing.weights, 0.5)


def test_a_row_whose_experts_all_drop_out_has_their_plain_mean():
    tokens, kernel, valid = data(0, "random", S, E, g=64)
    call = compiled(SmearRouter, E, expert_dropout=0.9)
    weights = np.asarray(call(kernel, tokens, valid, jax.random.key(0))[0].weights[:, 0])
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    none_left = np.abs(weights - 0.25).max(-1) < 1e-6
    assert 0.4 < none_left.mean() < 0.9  # 0.9**4 = 0.66
    assert (weights[~none_left].min(-1) < 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_rows_are_apart_and_padding_is_nowhere(name, training):
    tokens, kernel, valid = data(1, "random", S, E, g=4, padding="some")
    valid[3] = False
    before = routed(name, tokens, kernel, valid, training)
    after = routed(name, np.where(valid[..., None], tokens, np.float32(50.0)), kernel, valid, training)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not np.asarray(before.keep)[~valid].any()
    other = tokens.copy()
    other[:2] = tokens[1::-1] + 1.0
    changed = routed(name, other, kernel, valid, training)
    np.testing.assert_array_equal(before.weights[2:], changed.weights[2:])
    assert np.abs(np.asarray(before.weights[:2] - changed.weights[:2])).max() > 1e-3


def test_all_of_lory_but_its_first_segment_hangs_on_the_segment_before_alone():
    tokens, kernel, valid = data(2, "random", S, E)
    before = routed("lory", tokens, kernel, valid)
    other = tokens.copy()  # not in place: the first call may not have read them yet
    other[:, 5] += 1.0
    after = routed("lory", other, kernel, valid)
    same = np.isclose(before.weights, after.weights, atol=0).all((0, 2))
    np.testing.assert_array_equal(same, np.arange(S) < 8)
    np.testing.assert_array_equal(before.weights[:, :4], np.full((G, 4, E), 0.25))


@pytest.mark.parametrize("segment", [1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_lory_is_causal_to_the_bit_and_the_same_in_training_as_without_an_rng(training, segment):
    router = LoryRouter(M, E, segment=segment, rngs=nnx.Rngs(0))
    router.kernel.set_value(jax.random.normal(jax.random.key(1), (M, E)))
    moe = MoE(router, Auto(6), Experts(E, M, 6, "swiglu", rngs=nnx.Rngs(0)))
    run = jax.jit(lambda x, rng: moe(x, jnp.ones(x.shape[:2], bool), rng)[0])
    x = jax.random.normal(jax.random.key(2), (G, S, M))
    rng = jax.random.key(0) if training else None
    assert router.leak is None
    out = run(x, rng)
    np.testing.assert_array_equal(out, run(x, None))
    for place in (1, 4, 6, 11):
        changed = run(x.at[:, place:].set(0.0), rng)
        np.testing.assert_array_equal(out[:, :place], changed[:, :place])
        assert np.abs(np.asarray(out - changed)[:, place:]).max() > 1e-3


@pytest.mark.parametrize("name", ["smear", "meo"])
def test_the_others_are_not_causal_and_say_so(name):
    tokens, kernel, valid = data(3, "random", S, E)
    before = routed(name, tokens, kernel, valid, training=False)
    other = tokens.copy()
    other[:, -1, 0] += 4.0
    after = routed(name, other, kernel, valid, training=False)
    assert np.abs(np.asarray(before.weights[:, 0] - after.weights[:, 0])).max() > 1e-3
    make, numbers, options = ROUTERS[name]
    router = make(M, *numbers, **options, rngs=nnx.Rngs(0))
    assert "later ones too" in router.leak


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (SmearRouter, {"expert_dropout": 1.0}, "expert_dropout = 1.0: .* use 0.1"),
        (SmearRouter, {"output_masking": 0.2}, "output_masking = 0.2: merged experts have no outputs .* use 0"),
        (LoryRouter, {"segment": 0}, "segment = 0: .* the paper has 256"),
        (MeoRouter, {"top_k": 5}, "top_k = 5 is more than num_experts = 4"),
    ],
)
def test_bad_options_are_answered_in_a_line(make, options, said):
    with pytest.raises(BadInput, match=said):
        make(M, E, **options, rngs=nnx.Rngs(0))


def test_a_segment_that_does_not_divide_a_row_is_answered_with_one_that_does():
    router = LoryRouter(M, E, segment=8, rngs=nnx.Rngs(0))
    with pytest.raises(BadInput, match="segment = 8 does not divide a group of 12 tokens; use a divisor such as 4"):
        jax.eval_shape(router, jnp.zeros((1, 12, M)), jnp.ones((1, 12), bool), None)
