"""Router statistics against NumPy, from the routing that they describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.routing import Capacity, GShardRouter, SigmoidBiasRouter, TopKRouter
from gshardx.layers.routing.sigmoid_bias import BiasState
from gshardx.layers.routing.statistics import describe
from tests.layers.routing.cases import compiled, data

G, S, E, K = 4, 16, 8, 2
BIAS = BiasState(jnp.zeros(E), jnp.zeros(E))
ROUTERS = {
    "top_k": (TopKRouter, {}, ()),
    "gshard": (GShardRouter, {"second_expert": "random"}, ()),
    "sigmoid_bias": (SigmoidBiasRouter, {}, (BIAS,)),
}


def routed(name, seed, s=S, g=G):
    make, options, state = ROUTERS[name]
    tokens, kernel, valid = data(seed, "one expert", s, E, g=G, padding="some")
    kernel[:, 2] = -4 * kernel[:, -1]  # nobody's choice
    call = compiled(make, E, K, capacity=Capacity(0.5), **options)
    routing, logits = call(kernel, tokens[:g], valid[:g], jax.random.key(0), *state)
    return routing, np.asarray(logits, np.float64), valid[:g], jax.tree.map(np.asarray, routing.stats)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_figures_equal_those_counted_from_the_routing():
    routing, logits, valid, stats = routed("top_k", 0)
    figures = describe(stats)
    experts, keep = np.asarray(routing.experts), np.asarray(routing.keep)
    lost = valid[..., None] & ~keep
    load = np.bincount(experts[valid].ravel(), minlength=E)
    relative = load / load.mean()
    gates = softmax(logits)[valid]
    expected = {
        "drop_fraction": lost.sum() / (K * valid.sum()),
        "load_max_over_mean": relative.max(),
        "max_violation": relative.max() - 1,
        "load_p10": np.percentile(relative, 10),
        "load_p50": np.percentile(relative, 50),
        "load_p90": np.percentile(relative, 90),
        "load_cv_squared": (relative.std() / relative.mean()) ** 2,
        "dead_experts": E - len(np.unique(experts[valid])),
        "entropy": -(gates * np.log(gates)).sum(-1).mean(),
        "capacity_used": keep.sum() / (G * E * routing.capacity),
        "z": (np.log(np.exp(logits[valid]).sum(-1)) ** 2).mean(),
        "largest_logit": np.abs(logits[valid]).max(),
    }
    for rank in range(K):
        expected[f"drop_fraction_choice_{rank + 1}"] = lost[..., rank].sum() / valid.sum()
    for part in range(8):
        here = slice(2 * part, 2 * part + 2)
        expected[f"drop_fraction_eighth_{part + 1}"] = lost[:, here].sum() / max(K * valid[:, here].sum(), 1)
    assert set(figures) == set(expected)
    for name, figure in expected.items():
        np.testing.assert_allclose(figures[name], figure, rtol=1e-5, atol=1e-7, err_msg=name)
    assert expected["dead_experts"] >= 1
    assert 0 < expected["drop_fraction_choice_1"] != expected["drop_fraction_choice_2"]
    assert expected["drop_fraction_eighth_8"] > expected["drop_fraction_eighth_1"]
    assert float(routing.stats.drop_fraction) == pytest.approx(expected["drop_fraction"], rel=1e-6)
    assert float(routing.stats.load_max_over_mean) == pytest.approx(relative.max(), rel=1e-6)


def test_sums_are_those_counted_from_the_routing():
    routing, _, valid, stats = routed("top_k", 1)
    experts, keep = np.asarray(routing.experts), np.asarray(routing.keep)
    assert stats.tokens == valid.sum()
    assert stats.room == G * E * 2
    np.testing.assert_array_equal(stats.choices, [valid.sum()] * K)
    np.testing.assert_array_equal(stats.dropped, (valid[..., None] & ~keep).sum((0, 1)))
    np.testing.assert_array_equal(stats.load, np.bincount(experts[valid].ravel(), minlength=E))
    np.testing.assert_array_equal(stats.choices_by_position, K * valid.sum(0).reshape(8, 2).sum(1))
    by_position = (valid[..., None] & ~keep).sum((0, 2)).reshape(8, 2).sum(1)
    np.testing.assert_array_equal(stats.dropped_by_position, by_position)


def test_eighths_cover_groups_that_eight_does_not_divide():
    _, _, valid, stats = routed("top_k", 2, s=13)
    expected = np.zeros(8)
    for position in range(13):
        expected[int(position / 13 * 8)] += K * valid[:, position].sum()
    np.testing.assert_array_equal(stats.choices_by_position, expected)
    assert stats.choices_by_position.sum() == stats.choices.sum() > 0


def test_a_choice_that_the_coin_rejected_is_no_drop():
    routing, _, valid, stats = routed("gshard", 3)
    assert stats.choices[0] == valid.sum()
    assert stats.choices[1] < valid.sum()
    assert stats.load.sum() == K * valid.sum()
    assert stats.choices.sum() - stats.dropped.sum() == np.asarray(routing.keep).sum()
    assert stats.choices_by_position.sum() == stats.choices.sum()


def test_the_entropy_of_sigmoid_scores_is_that_of_their_shares():
    _, logits, valid, stats = routed("sigmoid_bias", 4)
    scores = 1 / (1 + np.exp(-logits[valid]))
    share = scores / scores.sum(-1, keepdims=True)
    assert describe(stats)["entropy"] == pytest.approx(-(share * np.log(share)).sum(-1).mean(), rel=1e-5)


def test_even_gates_have_the_entropy_of_the_number_of_experts():
    tokens, kernel, valid = data(5, "ties", S, E, g=G)
    figures = describe(
        compiled(TopKRouter, E, K, capacity=Capacity(0.5))(kernel, tokens, valid, jax.random.key(0))[0].stats
    )
    assert figures["entropy"] == pytest.approx(np.log(E), rel=1e-6)
    assert figures["z"] == pytest.approx(np.log(E) ** 2, rel=1e-6)
    assert figures["largest_logit"] == 0.0
    assert figures["dead_experts"] == E - K, "of equal experts, each token takes the first two"
    assert figures["load_max_over_mean"] == E / K
    assert figures["capacity_used"] == K / E


@pytest.mark.parametrize("name", ["top_k", "sigmoid_bias"])
def test_statistics_of_two_halves_add_up_to_those_of_the_whole(name):
    make, options, state = ROUTERS[name]
    tokens, kernel, valid = data(6, "random", S, E, g=G, padding="some")
    call = compiled(make, E, K, capacity=Capacity(0.5), **options)
    whole, *halves = (
        jax.tree.map(np.asarray, call(kernel, tokens[part], valid[part], jax.random.key(0), *state)[0].stats)
        for part in (slice(None), slice(0, 2), slice(2, 4))
    )
    for field, first, second in zip(whole._fields, *halves, strict=True):
        total = np.maximum(first, second) if field == "largest_logit" else first + second
        np.testing.assert_allclose(getattr(whole, field), total, rtol=1e-6, err_msg=field)
        assert np.any(total > 0), field
    assert whole.dropped.sum() > 0


def test_figures_of_stacked_layers_are_those_of_each_layer():
    layers = [routed("top_k", seed)[3] for seed in (0, 1)]
    stacked = describe(jax.tree.map(lambda *x: np.stack(x), *layers))
    for layer, stats in enumerate(layers):
        for name, figure in describe(stats).items():
            np.testing.assert_allclose(stacked[name][layer], figure, err_msg=name)
    assert stacked["z"][0] != stacked["z"][1]


def test_an_expert_with_a_single_choice_is_not_dead():
    stats = routed("top_k", 0)[3]._replace(load=np.float32([0, 1, 3, 0]))
    assert describe(stats)["dead_experts"] == 2


def test_padding_alone_has_finite_figures():
    tokens, kernel, _ = data(7, "random", S, E, g=G)
    call = compiled(TopKRouter, E, K, capacity=Capacity(0.5))
    figures = describe(call(kernel, tokens, np.zeros((G, S), bool), jax.random.key(0))[0].stats)
    assert all(np.isfinite(figure).all() for figure in figures.values())
    assert figures["drop_fraction"] == figures["capacity_used"] == figures["largest_logit"] == 0.0
    assert figures["dead_experts"] == E


def test_no_gradient_flows_from_statistics():
    tokens, kernel, valid = data(8, "random", S, E, g=G)
    call = compiled(TopKRouter, E, K, capacity=Capacity(0.5))

    def total(kernel):
        stats = call(kernel, tokens, valid, jax.random.key(0))[0].stats
        return stats.entropy + stats.z + stats.largest_logit

    np.testing.assert_array_equal(jax.grad(total)(kernel), 0.0)
    assert float(total(kernel)) > 0
