"""DS-MoE (arXiv 2404.05567) as loops over tokens in float64."""

import math

import numpy as np

from tests.oracles import choice


def route(logits, k, width, capacity, valid, *, priority="position"):
    """Route one group by its logits ``[s, e]`` to ``width`` experts a token; losses judge ``k`` of them."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    experts = np.array([choice.best(list(row), width) for row in logits])
    weights = np.array([[gates[token][expert] for expert in experts[token]] for token in range(s)])
    wanted = np.repeat(np.asarray(valid)[:, None], width, axis=1)
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts[:, :k], valid), "z": choice.z(logits, valid)}
    margin = choice.order_margin(gates, priority)
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)


def entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def mutual_information(rows):
    """Of the real tokens' gates: minus the entropy of the mean, plus the mean of the entropies."""
    if len(rows) == 0:
        return 0.0
    return sum(map(entropy, rows)) / len(rows) - entropy(np.mean(rows, axis=0))
