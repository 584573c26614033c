"""The papers' update rules in float64, for one matrix or one vector at a time; a loop over steps and parameters.

Each rule is a generator of directions: it is sent a gradient and the weights before the step.
"""

import math

import numpy as np


def adamw(beta1, beta2, epsilon, shape):
    """arXiv 1412.6980, algorithm 1."""
    m, v, t, direction = np.zeros(shape), np.zeros(shape), 0, None
    while True:
        g, _ = yield direction
        t += 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        direction = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)


def lion(beta1, beta2, shape):
    """arXiv 2302.06675, algorithm 2."""
    m, direction = np.zeros(shape), None
    while True:
        g, _ = yield direction
        direction = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g


def adafactor(beta1, shape):
    """arXiv 1804.04235, algorithms 4 (matrices) and 5 (vectors) with algorithm 6's constants."""
    rows, columns, v = np.zeros(shape[0]), np.zeros(shape[-1]), np.zeros(shape)
    m, t, direction = np.zeros(shape), 0, None
    while True:
        g, weights = yield direction
        t += 1
        beta2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if len(shape) == 2:
            rows = beta2 * rows + (1 - beta2) * square.sum(axis=1)
            columns = beta2 * columns + (1 - beta2) * square.sum(axis=0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            v = beta2 * v + (1 - beta2) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u) / 1.0)
        m = beta1 * m + (1 - beta1) * max(1e-3, rms(weights)) * u
        direction = m


def muon(beta, shape):
    """Jordan's Muon with bias correction and Moonlight's step (arXiv 2502.16982, equation 4)."""
    m, t, direction = np.zeros(shape), 0, None
    while True:
        g, _ = yield direction
        t += 1
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        direction = 0.2 * math.sqrt(max(shape)) * newton_schulz(ahead)


def newton_schulz(matrix):
    x = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def rms(x):
    return np.sqrt((x**2).mean())


def train(rules, decaying, weights, gradients, rates, *, weight_decay, clip_norm):
    """Weights after the steps.

    Args:
        rules: a started generator for each parameter.
        decaying: for each parameter, whether it decays.
        weights: one array a parameter.
        gradients: of each step, one array a parameter.
        rates: learning rate of each step.
        weight_decay: added to the direction, times the weights.
        clip_norm: of all gradients of a step together.
    """
    weights = [np.asarray(w, np.float64) for w in weights]
    for found, rate in zip(gradients, rates, strict=True):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in found))
        scale = min(1.0, clip_norm / norm)
        for at, g in enumerate(found):
            direction = rules[at].send((scale * g.astype(np.float64), weights[at]))
            weights[at] = weights[at] - rate * (direction + decaying[at] * weight_decay * weights[at])
    return weights


def average(decay, history):
    """Of the weights after each step; the last counts 1, the one before ``decay``, and so on."""
    factors = [decay ** (len(history) - 1 - at) for at in range(len(history))]
    return sum(f * w for f, w in zip(factors, history, strict=True)) / sum(factors)


def rate(name, step, steps, peak, warmup, *, final=0.1, start=None, fraction=0.1):
    """The learning rate of ``step``, from 0."""
    if step < warmup:
        return peak * step / warmup
    if name == "cosine":
        done = min((step - warmup) / (max(steps, warmup + 1) - warmup), 1.0)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
    if name == "inverse_sqrt":
        start = start or warmup
        return peak * min(1.0, math.sqrt(start / step)) if step else peak
    flat_until = max(steps - round(steps * fraction), warmup)
    done = min(max(step - flat_until, 0) / max(steps - flat_until, 1), 1.0)
    return peak * (1 - (1 - final) * done)
