"""What a model makes of some text: its loss, and what its MoE layers see and choose."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gshardx.convert.rewrite import Given
from gshardx.data.documents import read_documents
from gshardx.data.tokenizer import load_tokenizer
from gshardx.errors import BadInput
from gshardx.infer.load import LoadedRun, load_run
from gshardx.layers import MoEMetrics, Packed
from gshardx.models.build import Variables
from gshardx.sharding import MeshConfig

LENGTH, ROWS = 256, 8
"""Of one batch of text."""


class Batch(NamedTuple):
    """Documents' windows; valid is False behind a document's end."""

    tokens: Int[np.ndarray, "b t"]
    valid: Bool[np.ndarray, "b t"]


def read_batches(given: Given, data: Path, limit: int) -> list[Batch]:
    """The first ``limit`` tokens of some text, in windows of :data:`LENGTH` that each hold one document's.

    Raises:
        BadInput: no text there, or the run has no tokenizer.
    """
    tokenizer = load_tokenizer(given.saved.run / "tokenizer.json")
    documents = tokenizer.encode_documents(read_documents(str(data), given.config.data.column, where="--data"))
    found = list(batches(documents, limit))
    if not found:
        raise BadInput(f"--data {data}: no document has two tokens; give more text, or raise --tokens {limit}")
    return found


def batches(documents: Sequence[np.ndarray], limit: int) -> Iterator[Batch]:
    """Windows of documents, ``limit`` tokens in all."""
    windows: list[np.ndarray] = []
    for document in documents:
        for first in range(0, len(document), LENGTH):
            window = document[first : first + min(LENGTH, limit)]
            windows += [window] if len(window) > 1 else []
            limit -= len(window)
            if limit <= 0:
                break
        if limit <= 0:
            break
    for first in range(0, len(windows), ROWS):
        batch = Batch(np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool))
        for row, window in enumerate(windows[first : first + ROWS]):
            batch.tokens[row, : len(window)], batch.valid[row, : len(window)] = window, True
        yield batch


def forward_of(run: LoadedRun) -> Callable[[Batch], tuple[Float[Array, "b t v"], MoEMetrics]]:
    """A compiled pass: logits, fp32, and each layer's routing."""

    def forward(variables: Variables, tokens: Array, valid: Array) -> tuple[Array, MoEMetrics]:
        model = run.blueprint.bind(variables.params)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        packed = Packed.of(valid.astype(jnp.int32))
        hidden, _, metrics = model.hidden(tokens, places, valid, packed, None, variables.router)
        return model.logits(hidden), metrics

    compiled = jax.jit(forward)

    def of(batch: Batch) -> tuple[Array, MoEMetrics]:
        with jax.set_mesh(run.mesh):
            return compiled(run.variables, jnp.asarray(batch.tokens), jnp.asarray(batch.valid))

    return of


class Compared(NamedTuple):
    """Two models on the same text.

    Attributes:
        before, after: nats a token, each token but the first of a window predicted from those before it.
        difference: the largest between two logits.
        tokens: predicted.
    """

    before: float
    after: float
    difference: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"loss {self.before:.4f} before, {self.after:.4f} after ({self.tokens:,} tokens); logits differ by at most "
            f"{self.difference:.3g}"
        )


def compare(before: Path, after: Path, text: Sequence[Batch]) -> Compared:
    """Run both; each is in memory, whole.

    Raises:
        BadInput: one can't be loaded.
    """
    first, second = (forward_of(load_run(path, MeshConfig())) for path in (before, after))
    nats, difference, tokens = np.zeros(2), 0.0, 0
    for batch in text:
        logits = [np.asarray(model(batch)[0], np.float64) for model in (first, second)]
        nats += [losses(one, batch) for one in logits]
        difference = max(difference, float(np.abs(logits[0] - logits[1])[batch.valid].max()))
        tokens += int(batch.valid[:, 1:].sum())
    old, new = (nats / max(tokens, 1)).tolist()
    return Compared(old, new, difference, tokens)


def losses(logits: Float[np.ndarray, "b t v"], batch: Batch) -> float:
    """Nats of all tokens but the first of each window."""
    shifted = logits - logits.max(-1, keepdims=True)
    scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(scores[:, :-1], batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return -float(chosen[batch.valid[:, 1:]].sum())


def counts_on(run: Path, text: Sequence[Batch], experts: int) -> Float[np.ndarray, "moe_layer e"]:
    """How often each layer's experts are chosen.

    Raises:
        BadInput: the run can't be loaded.
    """
    forward = forward_of(load_run(run, MeshConfig()))
    total = np.zeros((1, experts))
    for batch in text:
        chosen = np.asarray(forward(batch)[1].experts)[:, batch.valid]
        total = total + np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in chosen])
    return total
