"""Noisy top-k gating (arXiv 1701.06538, equations 3 to 11) as loops over tokens and experts in float64."""

import math

import numpy as np

from tests.oracles import choice


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def chance(clean, noisy, deviation, expert, k):
    """Equation 8 and 9: that ``expert`` is chosen, its own noise drawn again."""
    others = sorted((x for i, x in enumerate(noisy) if i != expert), reverse=True)
    if len(others) < k:
        return 1.0
    return 0.5 * math.erfc(-(clean[expert] - others[k - 1]) / deviation[expert] / math.sqrt(2))


def route(clean, k, capacity, valid, *, noise=None, scale=None, priority="position"):
    """Route one group by its clean logits ``[s, e]``.

    ``noise``: standard normal ``[s, e]``; ``scale``: what softplus is taken of. Returned with the group's gates and
    chances ``[s, e]``, which the losses over the batch are of.
    """
    s, e = clean.shape
    experts, weights = np.zeros((s, k), int), np.zeros((s, k))
    gates, chances, logits = np.zeros((s, e)), np.ones((s, e)), np.array(clean, np.float64)
    margin = math.inf
    for token in range(s):
        if noise is not None:
            deviation = [softplus(float(x)) for x in scale[token]]
            logits[token] += [float(n) * d for n, d in zip(noise[token], deviation, strict=True)]
            chances[token] = [chance(clean[token], logits[token], deviation, i, k) for i in range(e)]
        experts[token] = choice.best(list(logits[token]), k)
        margin = min(margin, choice.gap(list(logits[token])))
        weights[token] = choice.softmax(logits[token][experts[token]])
        gates[token, experts[token]] = weights[token]
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    margin = min(margin, choice.order_margin(gates, priority))
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    group = choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
    return group, gates, chances


def cv_squared(per_token, valid):
    """Of the experts' sums over real tokens ``[g, s, e]``."""
    sums = (np.asarray(per_token) * np.asarray(valid)[..., None]).sum((0, 1))
    return sums.var() / max(sums.mean() ** 2, 1e-20)
