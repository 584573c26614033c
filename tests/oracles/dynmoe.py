"""DynMoE's top-any gating and auxiliary loss (arXiv 2405.14297, its code for what the paper leaves open) as loops."""

import math

import numpy as np

from tests.oracles import choice
from tests.oracles.cosine import direction


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def route(tokens, columns, thresholds, exists, k, capacity, valid, *, training):
    """Route one group of ``[s, m]`` by ``[m, e]`` and ``[e]``; with the tokens that activated nobody, ``[s]``."""
    (s, e), tokens = (len(tokens), len(thresholds)), np.asarray(tokens, np.float64)
    experts, weights, wanted = np.full((s, k), e), np.zeros((s, k)), np.zeros((s, k), bool)
    unit = [direction(column) for column in np.asarray(columns, np.float64).T.tolist()]
    cosines, gates, lost, margin = np.zeros((s, e)), np.zeros((s, e)), np.zeros(s, bool), math.inf
    here = [expert for expert in range(e) if exists[expert]]
    for token in range(s):
        own = direction(tokens[token].tolist())
        cosines[token] = [sum(a * b for a, b in zip(own, column, strict=True)) for column in unit]
        active = [i for i in here if sigmoid(cosines[token, i]) > sigmoid(thresholds[i])]
        margin = min(margin, choice.gap(cosines[token]))
        margin = min(margin, *(abs(c - t) or math.inf for c, t in zip(cosines[token], thresholds, strict=True)))
        lost[token] = not active
        if not active and not training:
            active = [max(here, key=lambda i, row=cosines[token]: (row[i], -i))]
        active = sorted(active, key=lambda i, row=cosines[token]: (-row[i], i))[:k]
        if valid[token]:
            experts[token, : len(active)] = active
            wanted[token, : len(active)] = True
            weights[token, : len(active)] = 1 / len(active) if active else 0
            gates[token, active] = 1 / len(active) if active else 0
    slots, load = choice.number(experts, wanted, e, range(s))
    keep = wanted & (slots < capacity)
    share = gates.sum(0) / max(gates.sum(), 1)
    losses = {
        "balance": len(here) * float(share @ share),
        "z": choice.z(cosines, valid),
        "diversity": auxiliary(columns, exists),
    }
    group = choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
    return group, np.array(load), lost & valid


def auxiliary(columns, exists):
    """The Frobenius norm of what the existing experts' directions lack to being orthonormal, and their mean length."""
    here = [np.asarray(columns, np.float64)[:, i].tolist() for i in range(len(exists)) if exists[i]]
    unit = [direction(column) for column in here]
    squares = [
        sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) ** 2
        for i in range(len(here))
        for j in range(len(here))
        if i != j
    ]
    lengths = [math.sqrt(sum(x * x for x in column)) for column in here]
    return math.sqrt(sum(squares)) + sum(lengths) / len(here)
