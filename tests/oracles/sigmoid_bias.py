"""DeepSeek-V3's gate (arXiv 2412.19437, section 2.1.2, equations 12-20) as loops over tokens."""

import math

import numpy as np

from tests.oracles import choice


def route(
    logits, k, capacity, valid, bias, *, renormalise=True, scale=1.0, groups=1, groups_kept=1, priority="position"
):
    """Route one group by its logits ``[s, e]``. ``weights`` multiply outputs or inputs, as the router says."""
    s, e = logits.shape
    affinity = [[1 / (1 + math.exp(-float(x))) for x in row] for row in logits]
    gates = [[x / sum(row) for x in row] for row in affinity]
    margin = math.inf
    experts, unbiased, weights = np.zeros((s, k), int), np.zeros((s, k), int), np.zeros((s, k))
    for token in range(s):
        biased = [x + float(b) for x, b in zip(affinity[token], bias, strict=True)]
        experts[token] = choice.best_in_groups(biased, k, groups, groups_kept, best_of=2)
        margin = min(margin, choice.gap(biased), choice.gap(choice.group_scores(biased, groups, 2)))
        unbiased[token] = choice.best(affinity[token], k)
        margin = min(margin, choice.gap(affinity[token]))
        weights[token] = [affinity[token][expert] for expert in experts[token]]
        if renormalise:
            weights[token] /= weights[token].sum()
    first = [[gates[token][experts[token, 0]]] for token in range(s)]
    margin = min(margin, choice.order_margin(first, priority))
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, load = choice.number(experts, wanted, e, choice.token_order(first, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, unbiased, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, scale * weights * keep, losses, int(np.sum(valid)), margin), load


def next_bias(bias, load, rate):
    """After each step: down by ``rate`` where overloaded, up where underloaded."""
    mean = sum(load) / len(load)
    return [b - rate if n > mean else b + rate if n < mean else b for b, n in zip(bias, load, strict=True)]
