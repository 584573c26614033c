"""Balance losses by hand, against NumPy, and against the formulas of other projects."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.balance import BalanceLoss, Gating, ZLoss
from gshardx.layers.losses import CommunicationLoss, DeviceLoss, ImportanceLoss, LoadLoss, cv_squared
from gshardx.layers.routing.ds_moe import MutualInformationLoss

G, S, E = 3, 16, 8
BALANCE = [BalanceLoss(choices, over) for choices in ("first", "all") for over in ("group", "batch")]
LOSSES = [
    *BALANCE,
    DeviceLoss(4),
    CommunicationLoss(4, 2),
    ZLoss(),
    ImportanceLoss(),
    MutualInformationLoss(),
    LoadLoss(0.5),
]


@functools.cache
def jitted(loss):
    return jax.jit(lambda gating: loss(gating))


def value(loss, gating):
    return float(jitted(loss)(gating))


def gating(logits, k, valid=None, experts=None):
    logits = np.asarray(logits, np.float32)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :k] if experts is None else experts
    mask = np.ones(logits.shape[:2], bool) if valid is None else valid
    return Gating(logits, powers / powers.sum(-1, keepdims=True), best.astype(np.int32), mask)


def drawn(seed, k=2, g=G, e=E, padding=False):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(g, S, e)) + draw.normal(size=(g, 1, e))
    return gating(logits, k, draw.random((g, S)) < 0.6 if padding else None)


def even(k, g=G, step=2):
    """Each token's first choice is its index modulo E, its next ones ``step`` further; gates fall with the rank."""
    logits = np.zeros((g, S, E))
    experts = (np.arange(S)[:, None] + step * np.arange(k)) % E
    for rank in range(k):
        logits[:, np.arange(S), experts[:, rank]] = 2.0 - 0.2 * rank
    return gating(logits, k)


def collapsed(k):
    """Every token takes experts 0 to k - 1 with all its gate, most to the first."""
    return gating(np.tile(np.where(np.arange(E) < k, 60.0 - np.arange(E), -60.0), (G, S, 1)), k)


@pytest.mark.parametrize("loss", BALANCE, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_balance_is_one_whatever_k(loss, k):
    even_choices = even(k, step=1)
    assert value(loss, even_choices) == pytest.approx(1.0, abs=1e-6)
    if k < 8:
        assert value(loss, collapsed(k)) > 1.5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_between_devices_is_one_whatever_k(k):
    assert value(DeviceLoss(4), even(k)) == pytest.approx(1.0, abs=1e-6)
    assert value(CommunicationLoss(4, k), even(k)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_collapsed_router_costs_what_its_shares_say(k):
    first = np.exp(-np.arange(k)) / np.exp(-np.arange(k)).sum()
    for over in ("group", "batch"):
        assert value(BalanceLoss("all", over), collapsed(k)) == pytest.approx(E / k, rel=1e-5)
        assert value(BalanceLoss("first", over), collapsed(k)) == pytest.approx(E * first[0], rel=1e-5)
    parts = -(-k // 2)
    assert value(DeviceLoss(4), collapsed(k)) == pytest.approx(4 / parts, rel=1e-5)
    assert value(CommunicationLoss(4, parts), collapsed(k)) == pytest.approx(4 / parts, rel=1e-5)


def test_the_coefficients_of_variation_are_zero_at_balance_and_not_elsewhere():
    assert value(ImportanceLoss(), even(2)) == pytest.approx(0.0, abs=1e-9)
    assert value(LoadLoss(0.5), even(2)) == pytest.approx(0.0, abs=1e-9)
    assert value(ImportanceLoss(), collapsed(1)) == pytest.approx(E - 1, rel=1e-5)
    assert value(LoadLoss(0.5), collapsed(1)) == pytest.approx(E - 1, rel=1e-5)


def test_groups_that_specialise_are_balanced_over_the_batch_alone():
    logits = np.zeros((2, S, E))
    for group in range(2):
        mine = np.arange(S) % 4 + 4 * group
        logits[group, np.arange(S), mine] = 60.0
    specialised = gating(logits, 1)
    assert value(BalanceLoss("all", "batch"), specialised) == pytest.approx(1.0, rel=1e-5)
    assert value(BalanceLoss("all", "group"), specialised) == pytest.approx(2.0, rel=1e-5)


def loops(loss, made):
    """f and P of each group or of the batch, as loops over real tokens."""
    ranks = 1 if loss.choices == "first" else made.experts.shape[-1]
    batches = [[(g, s) for s in range(S) if made.valid[g, s]] for g in range(len(made.valid))]
    sizes = [len(batch) for batch in batches]
    if loss.over == "batch":
        batches, sizes = [[token for batch in batches for token in batch]], [sum(sizes)]
    total = 0.0
    for tokens in batches:
        share, gate = np.zeros(E), np.zeros(E)
        for g, s in tokens:
            gate += made.gates[g, s]
            for rank in range(ranks):
                share[made.experts[g, s, rank]] += 1
        total += E * np.sum(share * gate) / (ranks * max(len(tokens), 1) ** 2) * len(tokens)
    return total / max(sum(sizes), 1)


@pytest.mark.parametrize("loss", BALANCE, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_balance_losses_equal_loops_over_tokens(loss, padding):
    for seed in range(3):
        made = drawn(seed, padding=padding)
        assert value(loss, made) == pytest.approx(loops(loss, made), abs=1e-5)
        assert value(loss, made) != pytest.approx(1.0, abs=0.02)


def test_the_device_loss_equals_deepseeks_equations():
    made, devices, k = drawn(3, padding=True), 4, 2
    tokens = [(g, s) for g in range(G) for s in range(S) if made.valid[g, s]]
    share = [E / (k * len(tokens)) * sum(e in made.experts[token] for token in tokens) for e in range(E)]
    gate = [np.mean([made.gates[token][e] for token in tokens]) for e in range(E)]
    parts = [range(2 * i, 2 * i + 2) for i in range(devices)]
    expected = sum(np.mean([share[e] for e in part]) * sum(gate[e] for e in part) for part in parts)
    assert value(DeviceLoss(devices), made) == pytest.approx(expected, abs=1e-5)


def test_the_communication_loss_equals_deepseeks_equations():
    made, devices, limit = drawn(4, padding=True), 4, 2
    tokens = [(g, s) for g in range(G) for s in range(S) if made.valid[g, s]]
    expected = 0.0
    for device in range(devices):
        sent = sum(any(expert // 2 == device for expert in made.experts[token]) for token in tokens)
        gate = np.mean([made.gates[token][2 * device : 2 * device + 2].sum() for token in tokens])
        expected += devices / (limit * len(tokens)) * sent * gate
    assert value(CommunicationLoss(devices, limit), made) == pytest.approx(expected, abs=1e-5)


def test_a_token_is_sent_to_a_device_once():
    together = gating(np.zeros((1, S, E)), 2, experts=np.tile([0, 1], (1, S, 1)))
    apart = gating(np.zeros((1, S, E)), 2, experts=np.tile([0, 2], (1, S, 1)))
    assert value(CommunicationLoss(4, 2), together) == pytest.approx(0.5, rel=1e-5)
    assert value(CommunicationLoss(4, 2), apart) == pytest.approx(1.0, rel=1e-5)


def test_the_z_loss_and_its_gradient_are_those_of_the_formula():
    made = drawn(5, padding=True)
    logits = made.logits.astype(np.float64)
    z = np.log(np.exp(logits).sum(-1))
    tokens = made.valid.sum()
    assert value(ZLoss(), made) == pytest.approx((z**2 * made.valid).sum() / tokens, rel=1e-6)
    actual = jax.jit(jax.grad(lambda x: ZLoss()(made._replace(logits=x))))(made.logits)
    expected = (2 * z * made.valid / tokens)[..., None] * np.exp(logits - z[..., None])
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    level = gating(np.full((G, S, E), 3.0), 2)
    assert value(ZLoss(), level) == pytest.approx((3 + math.log(E)) ** 2, rel=1e-6)


def test_the_importance_loss_equals_numpy():
    made = drawn(6, padding=True)
    importance = made.gates[made.valid].sum(0)
    expected = (importance.std() / importance.mean()) ** 2
    assert expected > 0.01
    assert value(ImportanceLoss(), made) == pytest.approx(expected, rel=1e-4)


def smooth_load(logits, k, deviation, valid):
    """Each expert's expected load if its noise were drawn again, from V-MoE's appendix A."""
    load = np.zeros(E)
    for row in logits[valid]:
        kth = sorted(row)[-k]
        for expert in range(E):
            load[expert] += 0.5 * (1 + math.erf((row[expert] - kth) / deviation / math.sqrt(2)))
    return (load.std() / load.mean()) ** 2


@pytest.mark.parametrize("deviation", [0.25, 2.0])
def test_the_load_loss_equals_v_moes_formula_and_its_gradient_differences(deviation):
    made = drawn(7, padding=True)
    logits = made.logits.astype(np.float64)
    expected = smooth_load(logits, 2, deviation, made.valid)
    assert expected > 1e-3
    assert value(LoadLoss(deviation), made) == pytest.approx(expected, rel=1e-4)
    actual = np.asarray(jax.jit(jax.grad(lambda x: LoadLoss(deviation)(made._replace(logits=x))))(made.logits))
    assert np.abs(actual).max() > 1e-4
    g, s = np.argwhere(made.valid)[0]
    for expert in range(E):
        moved = np.zeros_like(logits)
        moved[g, s, expert] = 1e-5
        ahead, behind = (smooth_load(logits + sign * moved, 2, deviation, made.valid) for sign in (1, -1))
        assert actual[g, s, expert] == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_padding_counts_nowhere(loss):
    made = drawn(8)
    junk = gating(7 * drawn(9).logits, 2, valid=np.zeros((G, S), bool))
    padded = jax.tree.map(lambda *pair: np.concatenate(pair, axis=1), made, junk)
    assert value(loss, padded) == pytest.approx(value(loss, made), rel=1e-5)
    assert value(loss, padded._replace(valid=~padded.valid)) != pytest.approx(value(loss, made), rel=1e-2)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_padding_alone_costs_nothing(loss):
    assert value(loss, drawn(10)._replace(valid=np.zeros((G, S), bool))) == 0.0


@pytest.mark.parametrize("loss", [*BALANCE, DeviceLoss(4), CommunicationLoss(4, 2)], ids=str)
def test_gradients_flow_through_the_mean_gates_alone(loss):
    made = drawn(11, padding=True)
    tokens = made.valid.sum(1, keepdims=True) * np.ones((G, 1))
    real = made.valid[..., None].astype(np.float64)
    if isinstance(loss, BalanceLoss):
        ranks = 1 if loss.choices == "first" else 2
        chosen = (np.eye(E)[made.experts[..., :ranks]].sum(-2) * real).sum(1) / ranks
        slope = E * chosen / tokens if loss.over == "group" else E * chosen.sum(0, keepdims=True) / tokens.sum()
    else:
        parts = made.experts // 2
        sent = np.stack([(parts == part).sum(-1) for part in range(4)], -1)
        sent = (sent > 0) / loss.limit if isinstance(loss, CommunicationLoss) else sent / 2
        slope = np.repeat(4 * (sent * real).sum((0, 1)) / tokens.sum(), 2)[None]
    expected = np.broadcast_to(slope[:, None] * real / tokens.sum(), made.gates.shape)

    def of_gates(gates, logits):
        return loss(made._replace(gates=gates, logits=logits))

    actual, of_logits = jax.jit(jax.grad(of_gates, argnums=(0, 1)))(made.gates, made.logits)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_array_equal(of_logits, 0.0)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_sums_of_parts_are_the_sums_of_the_whole(loss):
    """With as many real tokens in each part as it may be, none included."""
    whole = drawn(3, g=4, padding=True)
    whole.valid[1] = False
    parts = [jax.tree.map(operator.itemgetter(rows), whole) for rows in (slice(0, 1), slice(1, 2), slice(2, 4))]
    together = jax.tree.map(lambda *sums: sum(sums), *(jax.jit(loss.sums)(part) for part in parts))
    assert float(loss.value(together)) == pytest.approx(value(loss, whole), rel=1e-6)
    if len(together) == 2:
        assert float(loss.value((together[0], whole.valid.sum()))) == pytest.approx(value(loss, whole), rel=1e-6)


def test_squared_variation_is_variance_over_squared_mean():
    assert float(cv_squared(jnp.asarray([1.0, 3.0, 2.0, 6.0]))) == pytest.approx(3.5 / 9, rel=1e-6)
    assert float(cv_squared(jnp.zeros(4))) == 0.0
