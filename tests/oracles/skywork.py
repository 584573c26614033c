"""Skywork-MoE's gate (arXiv 2406.06563, section 4.1): logits of mean 0 and deviation ``spread``, token by token."""

import numpy as np


def normalised(logits, spread=1.0):
    """Of rows ``[s, e]``, in float64; a row of equal logits becomes zeros."""
    found = np.zeros(logits.shape)
    for token, row in enumerate(np.asarray(logits, np.float64)):
        if np.ptp(row) > 0:
            found[token] = spread * (row - row.mean()) / row.std()
    return found
