"""BASE layers' assignment (arXiv 2103.16716) as an auction between tokens, one bid after the other; and the best one.

The step is a quarter of that of the paper's code, with ten times the rounds; the rounding is this project's.
"""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from tests.oracles import choice


def best_sum(affinity):
    """Of ``[tokens, e]``, with at most ceil(tokens / e) tokens an expert: by a solver."""
    places = math.ceil(len(affinity) / affinity.shape[1])
    token, place = linear_sum_assignment(np.repeat(affinity, places, axis=1), maximize=True)
    return affinity[token, place // places].sum()


def rounded(affinity):
    """Integers, 10 to a step, and how far the nearest value is from being rounded otherwise."""
    lowest = min(map(min, affinity))
    unit = max((max(map(max, affinity)) - lowest) / 200, 1e-4) / 10
    exact = [[(x - lowest) / unit for x in row] for row in affinity]
    margin = min(abs(x - math.floor(x) - 0.5) for row in exact for x in row)
    return [[round(x) for x in row] for row in exact], margin


def auction(affinity, limit=1000):
    """The expert of each token, for integers; after ``limit`` rounds in haste."""
    tokens, e = len(affinity), len(affinity[0])
    places = math.ceil(tokens / e)
    held = [[] for _ in range(e)]  # of each expert: (-bid, token), so that the best is the smallest
    rounds, waiting = 0, list(range(tokens))
    while waiting:
        late = rounds >= limit
        price = [0 if len(held[i]) < places else math.inf if late else -max(held[i])[0] for i in range(e)]
        for token in waiting:
            worth = [a - p for a, p in zip(affinity[token], price, strict=True)]
            first, *others = choice.best(worth, min(e, 2))
            beats = worth[others[0]] if others else -math.inf
            bid = affinity[token][first] - 2**11 if late else affinity[token][first] - beats + 10
            held[first].append((-bid, token))
        held = [sorted(bids)[:places] for bids in held]
        placed = {token for bids in held for _, token in bids}
        waiting, rounds = [token for token in range(tokens) if token not in placed], rounds + 1
    found = {token: i for i, bids in enumerate(held) for _, token in bids}
    return [found[token] for token in range(tokens)]


def route(logits, capacity, valid, *, training, priority="position"):
    """Route one group by its logits ``[s, e]``."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    experts, margin = np.array([choice.best(list(row), 1) for row in logits]), math.inf
    real = np.flatnonzero(valid)
    if training and len(real):
        units, margin = rounded([[float(x) for x in logits[token]] for token in real])
        experts[real, 0] = auction(units)
    gate = [[gates[token][experts[token, 0]]] for token in range(s)]
    margin = min(margin, choice.order_margin(gate, priority))
    wanted = np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gate, priority))
    keep = wanted & (slots < capacity)
    weights = [[1 / (1 + math.exp(-float(logits[token, experts[token, 0]])))] for token in range(s)]
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
