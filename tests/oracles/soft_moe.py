"""Soft MoE (arXiv 2308.00951, section 2.1) as loops over tokens and slots in float64."""

import math

import numpy as np


def unit(vector):
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / length if length else 0.0 for x in vector]


def softmax(scores):
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def mix(tokens, phi, scale, valid):
    """D and C ``[s, n]`` of one group, and its logits; 0 in the rows of padding."""
    s, n = len(tokens), phi.shape[1]
    columns = [unit(phi[:, slot]) for slot in range(n)]
    logits = np.zeros((s, n))
    for token in range(s):
        direction = unit(tokens[token])
        for slot in range(n):
            logits[token, slot] = scale * sum(a * b for a, b in zip(direction, columns[slot], strict=True))
    real = [token for token in range(s) if valid[token]]
    dispatch, combine = np.zeros((s, n)), np.zeros((s, n))
    for slot in range(n if real else 0):
        dispatch[real, slot] = softmax([logits[token, slot] for token in real])
    for token in real:
        combine[token] = softmax(list(logits[token]))
    return dispatch, combine, logits


def layer(tokens, dispatch, combine, slots, expert):
    """``[s, m]``: ``expert(number, vector)`` of each slot's mixture, mixed again."""
    s, n = combine.shape
    made = [
        expert(slot // slots, sum(dispatch[token, slot] * tokens[token] for token in range(s))) for slot in range(n)
    ]
    return np.stack([sum(combine[token, slot] * made[slot] for slot in range(n)) for token in range(s)])
