"""SparseMixer-v2 (GRIN, arXiv 2409.12136 section 2.1) as loops over tokens and choices."""

import math

import numpy as np

from tests.oracles import choice


def route(logits, k, capacity, valid, *, jitter=0.01, gumbel=None, coin=None, priority="position"):
    """Route one group by its logits ``[s, e]``; with the draws ``gumbel`` ``[k, s, e]`` and ``coin`` ``[k, s]`` as in
    training. Its ``weights`` are what outputs are multiplied by."""
    s, e = logits.shape
    margin = math.inf
    experts, weights = np.zeros((s, k), int), np.zeros((s, k))
    for token in range(s):
        row, taken = [float(x) for x in logits[token]], []
        margin = min(margin, choice.gap(row))
        for rank in range(k):
            left = [i for i in range(e) if i not in taken]
            top = max(row[i] for i in left)
            below = {i: top - row[i] for i in left}
            limit = {i: 2 * jitter * max(abs(row[i]), top) for i in left}
            margin = min([margin, *(abs(below[i] - limit[i]) for i in left if below[i] > 0)])
            near = [i for i in left if below[i] <= limit[i]]
            share = dict(zip(near, choice.softmax([row[i] for i in near]), strict=True))
            likeliest = chosen = choice.best([share.get(i, -1.0) for i in range(e)], 1)[0]
            factor = 1.0
            if gumbel is not None:
                scores = [row[i] + float(gumbel[rank, token, i]) if i in share else -math.inf for i in range(e)]
                margin = min(margin, choice.gap([scores[i] for i in near]), abs(float(coin[rank, token]) - 0.25))
                chosen = choice.best(scores, 1)[0]
                factor = 1.0 if chosen == likeliest or coin[rank, token] < 0.25 else 1 / 3
            experts[token, rank], weights[token, rank] = chosen, share[chosen] * factor
            taken.append(chosen)
    gates = [choice.softmax(row) for row in logits]
    first = [[gates[token][experts[token, 0]]] for token in range(s)]
    margin = min(margin, choice.order_margin(first, priority))
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, _ = choice.number(experts, wanted, e, choice.token_order(first, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
