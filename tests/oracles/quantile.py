"""Quantile balancing as in Megatron-Core (pull request 5349), token by token and expert by expert in float64."""

import math

import numpy as np

from tests.oracles import choice


def between(ordered, place):
    """What stands at a place, counted from 0; linear between neighbours."""
    low = min(math.floor(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def route(
    logits,
    k,
    capacity,
    valid,
    beta,
    *,
    score="sigmoid",
    choose_by="logits",
    renormalise=True,
    scale=1.0,
    priority="position",
):
    """Route one group by its logits ``[s, e]``; and what it adds to the state's total and tokens."""
    s, e = logits.shape
    of = {"sigmoid": lambda row: [1 / (1 + math.exp(-float(x))) for x in row], "softmax": choice.softmax}[score]
    scores = [of(row) for row in logits]
    by = [[float(x) if choose_by == "logits" else 1 / (1 + math.exp(-float(x))) for x in row] for row in logits]
    experts, weights, margin = np.zeros((s, k), int), np.zeros((s, k)), math.inf
    exceeds = []
    for token in range(s):
        left = [x - float(b) for x, b in zip(by[token], beta, strict=True)]
        margin = min(margin, choice.gap(left))
        *experts[token], following = choice.best(left, k + 1)
        weights[token] = [scores[token][i] for i in experts[token]]
        if renormalise:
            weights[token] /= weights[token].sum()
        if valid[token]:
            exceeds.append([x - left[following] for x in by[token]])
    tokens = len(exceeds)
    total = [0.0] * e
    if tokens:
        total = [tokens * between(sorted((x[i] for x in exceeds), reverse=True), tokens * k / e) for i in range(e)]
    gates = [[x / sum(row) for x in row] for row in scores]
    first = [[gates[token][experts[token, 0]]] for token in range(s)]
    margin = min(margin, choice.order_margin(first, priority))
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, _ = choice.number(experts, wanted, e, choice.token_order(first, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    group = choice.Routed(experts, wanted, slots, keep, scale * weights * keep, losses, tokens, margin)
    return group, np.array(total), tokens


def next_beta(beta, total, tokens, momentum):
    """After a step."""
    moved = [momentum * b + (1 - momentum) * x / tokens for b, x in zip(beta, total, strict=True)]
    return [b - sum(moved) / len(moved) for b in moved]
