"""GShard's Algorithm 1 (arXiv 2006.16668) as loops over tokens, and what lingvo's Top2GatingOnLogits does otherwise."""

import math

import numpy as np

from tests.oracles import choice


def route(
    logits,
    k,
    capacity,
    importance,
    *,
    second_expert="all",
    threshold=0.5,
    slots="paper",
    normalise="before",
    priority="position",
    coin=None,
    gumbel=None,
):
    """Route one group.

    Args:
        logits: ``[s, e]`` float32.
        k: choices.
        capacity: slots of an expert.
        importance: ``[s]`` 1: makes all its choices and counts in the losses; between: one choice less, from
            its best expert on, queueing with the others' second choices; 0: padding.
        second_expert, threshold, slots, normalise, priority: as in the router.
        coin: uniform draws ``[s, k]`` of policy "random"; None tosses none.
        gumbel: draws ``[s, e]`` of policy "sampling"; None samples nothing.
    """
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    margin = choice.order_margin(gates, priority)

    experts = np.zeros((s, k), int)
    for token in range(s):
        scores = list(logits[token])
        experts[token] = choice.best(scores, k)
        if second_expert == "sampling" and gumbel is not None:
            scores = list(logits[token] + gumbel[token])
            if importance[token] == 1:
                scores[experts[token, 0]] = -math.inf
            experts[token, 1:] = choice.best(scores, k - 1)
            margin = min(margin, choice.gap(float(x) for x in scores))
        elif importance[token] < 1:  # lingvo masks no first choice for it, so its second is its best
            experts[token, 1:] = choice.best(scores, k - 1)

    gate = np.zeros((s, k))
    for token in range(s):
        gate[token] = [gates[token][expert] for expert in experts[token]]
        if importance[token] < 1:
            gate[token, 0] = 0.0
        if normalise == "before":
            gate[token] /= gate[token].sum() or 1.0

    wanted, accepted = np.zeros((s, k), bool), np.ones((s, k), bool)
    for token in range(s):
        for rank in range(k):
            wanted[token, rank] = importance[token] == 1 if rank == 0 else importance[token] > 0
            if second_expert == "random" and coin is not None and rank > 0:
                chance = gate[token, rank] / threshold
                accepted[token, rank] = coin[token, rank] < chance
                margin = min(margin, abs(coin[token, rank] - chance))
    if slots == "lingvo":
        wanted &= accepted

    places, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & accepted & (places < capacity)
    weights = gate * keep
    if normalise == "after":
        for token in range(s):
            weights[token] /= weights[token].sum() or 1.0

    real = np.asarray(importance) == 1
    losses = {"balance": choice.balance(gates, experts[:, :1], real), "z": choice.z(logits, real)}
    return choice.Routed(experts, wanted, places, keep, weights, losses, int(real.sum()), margin)


def moe(tokens, experts, keep, weights, feed_forward):
    """Each token's weighted sum of its kept experts' outputs, one token and one expert at a time: ``[s, m]``."""
    out = np.zeros_like(tokens)
    for token in range(len(tokens)):
        for rank in range(experts.shape[1]):
            if keep[token, rank]:
                out[token] += weights[token, rank] * feed_forward(experts[token, rank], tokens[token])
    return out
