"""SMEAR (arXiv 2306.03745, section 3) as loops in float64."""

import numpy as np

from tests.oracles import choice
from tests.oracles.blending import mean


def layer_norm(v, scale, shift, epsilon=1e-6):
    centred = [x - sum(v) / len(v) for x in v]
    deviation = (sum(x * x for x in centred) / len(v) + epsilon) ** 0.5
    return np.array([x / deviation * a + b for x, a, b in zip(centred, scale, shift, strict=True)])


def mixture(tokens, valid, kernel, scale, shift, left_out=None):
    """Logits and mixture of one row ``[s, m]``; ``left_out``: experts without a share (the authors' adapter_utils)."""
    logits = layer_norm(mean(tokens, valid), scale, shift) @ np.asarray(kernel, np.float64)
    shares = choice.softmax(logits)
    if left_out is not None:
        shares = [(0.0 if out else share) + 1e-10 for share, out in zip(shares, left_out, strict=True)]
        shares = [share / sum(shares) for share in shares]
    return logits, np.array(shares)
