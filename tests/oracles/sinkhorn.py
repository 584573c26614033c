"""Sinkhorn routing (arXiv 2202.01169; the iteration as in Megatron-Core) as products and sums in float64."""

import math

import numpy as np

from tests.oracles import choice


def plan(logits, iterations=50, temperature=1.0):
    """``[tokens, e]`` of real tokens: sums to 1 / tokens over experts and 1 / e over tokens, in the end."""
    tokens, e = logits.shape
    kernel = [[math.exp(float(x) / temperature) for x in row] for row in logits]
    d1 = [1.0] * e
    for _ in range(iterations):
        d0 = [1 / (tokens * sum(x * d for x, d in zip(row, d1, strict=True))) for row in kernel]
        d1 = [1 / (e * sum(kernel[token][i] * d0[token] for token in range(tokens))) for i in range(e)]
    return np.array([[d0[token] * kernel[token][i] * d1[i] for i in range(e)] for token in range(tokens)])


def chosen(shares, logits, k):
    """Of one token: k times the largest share that is left, or the largest logit of those within e**0.001 of it. And
    the margin of both decisions."""
    left, found, margin = list(range(len(shares))), [], math.inf
    for _ in range(k):
        behind = {i: math.log(max(shares[j] for j in left) / shares[i]) for i in left}
        tied = [i for i in left if behind[i] <= 1e-3]
        margin = min([margin, choice.gap([logits[i] for i in tied]), *(abs(x - 1e-3) for x in behind.values())])
        found.append(max(tied, key=lambda i: (logits[i], -i)))
        left.remove(found[-1])
    return found, margin


def route(logits, k, capacity, valid, *, training, priority="position", **options):
    """Route one group by its logits ``[s, e]``."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    experts, margin = np.array([choice.best(list(row), k) for row in logits]), math.inf
    real = np.flatnonzero(valid)
    if training and len(real):
        for token, shares in zip(real, plan(logits[real], **options), strict=True):
            experts[token], found = chosen(list(shares), [float(x) for x in logits[token]], k)
            margin = min(margin, found)
    gate = [[gates[token][experts[token, 0]]] for token in range(s)]
    margin = min(margin, choice.order_margin(gate, priority))
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gate, priority))
    keep = wanted & (slots < capacity)
    weigh = (lambda x, gate: 1 / (1 + math.exp(-x))) if k == 1 else (lambda x, gate: gate)
    weights = np.array([[weigh(float(logits[t, i]), gates[t][i]) for i in experts[t]] for t in range(s)])
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
