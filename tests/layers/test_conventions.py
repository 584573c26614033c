"""Each peer's published formula, in NumPy, weighs as much as ours with the converted coefficient."""

import numpy as np
import pytest

from gshardx.layers.balance import BalanceLoss
from gshardx.layers.conventions import coefficient_from
from tests.layers.test_balance import E, G, S, drawn, value


def gshard_paper(gates, experts):
    """Algorithm 1, line 13: (1 / E) sum_e (c_e / S) m_e of each group; groups averaged."""
    losses = []
    for gate, expert in zip(gates, experts, strict=True):
        c, m = np.bincount(expert[:, 0], minlength=E), gate.mean(0)
        losses.append(sum(c[e] / S * m[e] for e in range(E)) / E)
    return np.mean(losses)


def lingvo(gates, experts):
    """Top2GatingOnLogits: mean over groups and experts of density_1 * density_1_proxy, times E * E."""
    density = np.eye(E)[experts[..., 0]].mean(1)
    return (density * gates.mean(1)).mean() * E * E


def switch(gates, experts):
    """Equations 4-6: N sum_i f_i P_i."""
    f = [np.mean(experts[..., 0] == e) for e in range(E)]
    return E * sum(f[e] * gates[..., e].mean() for e in range(E))


def megatron(gates, experts):
    """switch_load_balancing_loss_func: sum(probs.sum(0) * tokens_per_expert) * E / (topk * T * T)."""
    tokens, k = G * S, experts.shape[-1]
    per_expert = np.bincount(experts.ravel(), minlength=E)
    return (gates.reshape(tokens, E).sum(0) * per_expert).sum() * E / (k * tokens**2)


def huggingface(gates, experts):
    """load_balancing_loss_func: mean mask [k, E] times mean probabilities [1, E], summed, times E."""
    tokens_per_expert = np.eye(E)[experts.reshape(G * S, -1)].mean(0)
    return (tokens_per_expert * gates.reshape(G * S, E).mean(0)[None]).sum() * E


def maxtext(gates, experts):
    """load_balance_loss: mean over groups and experts of density * density_prob, times E**2, ranks summed."""
    density = np.eye(E)[experts].sum(2).mean(1)
    return (density * gates.mean(1)).mean() * E**2


def flaxformer(gates, experts):
    """_load_balancing_loss: a mask of the experts chosen at any rank; mean over groups and experts, times E**2."""
    mask = np.eye(E)[experts].max(2)
    return (mask.mean(1) * gates.mean(1)).mean() * E**2


@pytest.mark.parametrize(
    ("convention", "theirs", "ours", "ks"),
    [
        ("gshard", gshard_paper, BalanceLoss("first", "group"), (2,)),
        ("lingvo", lingvo, BalanceLoss("first", "group"), (2,)),
        ("switch", switch, BalanceLoss("all", "batch"), (1,)),
        ("megatron", megatron, BalanceLoss("all", "batch"), (1, 2, 3)),
        ("huggingface", huggingface, BalanceLoss("all", "batch"), (1, 2, 3)),
        ("maxtext", maxtext, BalanceLoss("all", "group"), (1, 2, 3)),
        ("flaxformer", flaxformer, BalanceLoss("all", "group"), (1, 2, 3)),
    ],
)
def test_converted_coefficients_weigh_as_much_as_in_their_own_project(convention, theirs, ours, ks):
    for k in ks:
        made = drawn(12 + k, k)
        peer = theirs(made.gates.astype(np.float64), made.experts)
        weight = coefficient_from(convention, 0.03, E, k)
        assert weight * value(ours, made) == pytest.approx(0.03 * peer, rel=1e-5)
    assert coefficient_from("gshardx", 0.03, E, 2) == 0.03
