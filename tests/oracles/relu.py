"""ReMoE (arXiv 2412.14711) as loops over tokens and experts in float64."""

import math
from fractions import Fraction

import numpy as np

from tests.oracles import choice


def route(logits, most, capacity, valid, *, priority="position"):
    """Route one group by its logits ``[s, e]``; without the loss over the batch, which :func:`sparsity` has."""
    s, e = logits.shape
    experts, weights = np.zeros((s, most), int), np.zeros((s, most))
    gates = np.zeros((s, e))
    for token in range(s):
        gates[token] = [max(float(x), 0.0) for x in logits[token]]
        experts[token] = choice.best(list(logits[token]), most)
        weights[token] = gates[token][experts[token]]
    active = weights > 0
    wanted = active & np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    even = [choice.softmax(row) for row in logits]
    losses = {"balance": choice.balance(even, experts, valid, active), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), math.inf)


def sparsity(logits, valid, k, coefficient):
    """lambda / T sum_t sum_e f_e gate_te, f_e = E / (k T) * tokens with a gate above 0 at e; over ``[g, s, e]``."""
    rows = logits[valid]
    e, total = logits.shape[-1], 0.0
    for expert in range(e):
        active = sum(row[expert] > 0 for row in rows)
        for row in rows:
            total += e * active / (k * len(rows)) * max(float(row[expert]), 0.0)
    return coefficient * total / max(len(rows), 1)


def next_coefficient(coefficient, per_layer, tokens, k, e, growth=1.2):
    """lambda after a step in which gates above 0 were counted ``per_layer``, each of ``tokens`` tokens."""
    sparsity = Fraction(1) - Fraction(int(sum(per_layer)), len(per_layer) * tokens * e)
    target = Fraction(1) - Fraction(k, e)
    return coefficient * growth ** ((target > sparsity) - (target < sparsity))
