"""Lory's causal segment routing (arXiv 2405.03133, section 3) as loops in float64."""

import numpy as np

from tests.oracles import choice
from tests.oracles.blending import mean


def mixtures(tokens, valid, kernel, bias, segment):
    """Logits and mixtures ``[n, e]`` of one row ``[s, m]``: of each segment by the mean token of the one before."""
    logits, shares = [], []
    for start in range(0, len(tokens), segment):
        before = slice(start - segment, start)
        v = mean(tokens[before], valid[before]) if start else np.zeros(np.shape(tokens)[1])
        logits.append(v @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64))
        shares.append(choice.softmax(logits[-1]))
    return np.array(logits), np.array(shares)
