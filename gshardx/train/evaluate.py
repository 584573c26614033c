"""How well held-out text is predicted, and what xz makes of it."""

import lzma
import math

import numpy as np

from gshardx.data.pipeline import evaluation_rows
from gshardx.models.build import Variables
from gshardx.train.job import Job
from gshardx.train.text import XZ_AT_MOST, Text

BITS_PER_BYTE = "evaluation/bits_per_byte"
"""The metric by which a checkpoint is the best: the only one that does not depend on the tokenizer."""


def evaluate(job: Job, variables: Variables, text: Text) -> dict[str, float]:
    """Scores of the held-out documents; of several sources also ``evaluation/SOURCE/...``.

    Each token is predicted once, from the half to whole sequence before it (see
    :func:`gshardx.data.pipeline.evaluation_rows`).

    Returns:
        ``evaluation/loss`` (nats a token, end tokens included), ``evaluation/bits_per_byte`` of text and
        ``evaluation/token_accuracy`` (share of tokens that are the model's first choice).
    """
    held, config = text.held_out, job.config
    sums = np.zeros((len(held.documents), 3))  # nats, right, tokens
    for rows in evaluation_rows(held.documents, config.data.sequence_length, config.train.batch_size):
        document = rows.pop("document")
        scores = job.eval_step(variables, job.to_device({name: array[job.rows] for name, array in rows.items()}))
        here = np.stack([np.asarray(scores.nats), np.asarray(scores.right), rows["weights"].sum(-1)], axis=-1)
        np.add.at(sums, document, here)
    scalars = _scores("evaluation", sums, sum(held.sizes))
    sources = np.asarray(held.sources)
    for name in np.unique(sources) if len(set(held.sources)) > 1 else ():
        size = int(np.asarray(held.sizes)[sources == name].sum())
        scalars |= _scores(f"evaluation/{name}", sums[sources == name], size)
    return scalars


def _scores(name: str, sums: np.ndarray, size: int) -> dict[str, float]:
    nats, right, tokens = sums.sum(0).tolist()
    return {
        f"{name}/loss": nats / max(tokens, 1),
        f"{name}/bits_per_byte": nats / math.log(2) / size,
        f"{name}/token_accuracy": right / max(tokens, 1),
    }


def xz_bits_per_byte(text: Text) -> float | None:
    """What ``xz -9e`` makes of the held-out text after the training text; None if they are long, or not kept."""
    before = "".join(text.training_documents).encode()
    after = "".join(text.held_out_documents).encode()
    if not after or len(before) + len(after) > XZ_AT_MOST:
        return None

    def compressed(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed(before + after) - compressed(before)) / len(after)
