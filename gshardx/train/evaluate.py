"""Bits per byte of held-out text, for the model and for xz."""

import lzma
import math

from gshardx.data.pipeline import evaluation_rows
from gshardx.models.build import Variables
from gshardx.train.job import Job
from gshardx.train.text import XZ_AT_MOST, Text


def bits_per_byte(job: Job, variables: Variables, text: Text) -> float:
    """Bits that the model spends on every token of the held-out documents, end tokens included, per byte of them.

    Each token is predicted once, from the half to whole sequence before it (see :func:`evaluation_rows`).
    """
    nats = 0.0
    for rows in evaluation_rows(text.held_out, job.config.data.sequence_length, job.config.train.batch_size):
        mine = {name: array[job.rows] for name, array in rows.items()}
        nats += float(job.eval_step(variables, job.to_device(mine)))
    return nats / math.log(2) / text.held_out_bytes


def xz_bits_per_byte(text: Text) -> float | None:
    """What ``xz -9e`` makes of the held-out text after the training text; None if they are long, or not kept."""
    before = "".join(text.training_documents).encode()
    after = "".join(text.held_out_documents).encode()
    if not after or len(before) + len(after) > XZ_AT_MOST:
        return None

    def compressed(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed(before + after) - compressed(before)) / len(after)
