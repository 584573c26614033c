"""StableMoE (arXiv 2204.08396, section 3) as loops over tokens in float64."""

import math

import numpy as np

from tests.oracles import choice


def sigmoid(x):
    return 1 / (1 + math.exp(-float(x)))


def distilled(word, words, directions):
    """The small router's scores of an id."""
    d, e = directions.shape
    return [sum(float(words[word, i]) * float(directions[i, expert]) for i in range(d)) for expert in range(e)]


def route(logits, ids, words, directions, second, capacity, valid, *, priority="position"):
    """Route one group by its logits ``[s, e]`` and ids, in the first stage or the ``second``."""
    s, e = logits.shape
    small = [distilled(word, words, directions) for word in ids]
    scores = [small[token] if second else list(logits[token]) for token in range(s)]
    experts = np.array([choice.best(row, 1) for row in scores])
    margin = min(choice.gap(sorted(row)[-2:]) for row in small) if second else math.inf
    gates = [[sigmoid(x) / sum(sigmoid(y) for y in row) for x in row] for row in logits]
    first = [gates[token][experts[token, 0]] for token in range(s)]
    order = list(range(s)) if priority == "position" else sorted(range(s), key=lambda token: (-first[token], token))
    margin = min(margin, math.inf if priority == "position" else choice.gap(first))
    wanted = np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, order)
    keep = wanted & (slots < capacity)
    weights = np.array([[sigmoid(logits[token, experts[token, 0]])] for token in range(s)])
    losses = {"balance": 0.0, "distillation": 0.0, "z": choice.z(logits, valid)}
    real = [token for token in range(s) if valid[token]]
    if real and not second:
        losses["balance"] = 1.0
        for expert in range(e):
            own = [token for token in real if experts[token, 0] == expert]
            mean = len(real) / e
            losses["balance"] += (len(own) - mean) / mean * sum(weights[token, 0] for token in own) / len(real)
        losses["distillation"] = sum(
            -math.log(choice.softmax(small[token])[experts[token, 0]]) for token in real
        ) / len(real)
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, len(real), margin)
