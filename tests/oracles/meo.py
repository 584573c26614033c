"""Merging experts into one (arXiv 2310.09832, section 4; the authors' ``MEO.forward``) as loops in float64."""

import numpy as np

from tests.oracles import choice
from tests.oracles.blending import mean
from tests.oracles.noisy_top_k import chance, softplus


def decision(tokens, valid, kernel, k, noise=None, scale=None):
    """Of one row ``[s, m]``: logits, experts, their weights, every expert's chance, and the margin of the choice.

    ``noise``: standard normal ``[e]``; ``scale``: W_n.
    """
    v = mean(tokens, valid)
    clean = [float(x) for x in v @ np.asarray(kernel, np.float64)]
    noisy, chances = clean, [1.0] * len(clean)
    if noise is not None:
        deviation = [softplus(float(x)) for x in v @ np.asarray(scale, np.float64)]
        noisy = [x + float(n) * d for x, n, d in zip(clean, noise, deviation, strict=True)]
        chances = [chance(clean, noisy, deviation, i, k) for i in range(len(clean))]
    experts = choice.best(noisy, k)
    return np.array(noisy), experts, choice.softmax([noisy[i] for i in experts]), chances, choice.gap(noisy)
