"""``python -m gshardx.convert --verify``: our model and transformers' of the same weights, on the same tokens."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table

from gshardx.config import PACKAGED_TEXT
from gshardx.convert.outgoing import convert_out
from gshardx.convert.traces import Trace, import_transformers, load_ours, load_theirs, trace_ours, trace_theirs
from gshardx.data.documents import read_documents
from gshardx.data.tokenizer import load_tokenizer
from gshardx.errors import BadInput

TOLERANCE = 1e-4
"""Of the largest difference between two logits, or two numbers of a layer's output, relative to the largest there."""
TOKENS, LENGTH = 512, 128
"""By default, and of a row."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """``difference``: the largest in what the layers so far add up to, relative to the largest number there;
    ``routing``: the share of tokens that choose the same experts on both sides; None of dense layers."""

    number: int
    difference: float
    routing: float | None

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE and self.routing in (None, 1.0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Two models on the same tokens.

    Attributes:
        tokens: how many, and ``of`` what.
        difference, relative: the largest between two logits, as it is and over the largest of theirs.
        kl_mean, kl_max: KL(theirs || ours) of the next token's distribution, nats.
        top_1: share of tokens after which both find the same one likeliest.
        embedding: as a layer's ``difference``.
    """

    tokens: int
    of: str
    difference: float
    relative: float
    kl_mean: float
    kl_max: float
    top_1: float
    embedding: float
    layers: list[Layer]

    @property
    def good(self) -> bool:
        return self.relative <= TOLERANCE and all(layer.routing in (None, 1.0) for layer in self.layers)

    @property
    def first_that_differs(self) -> str:
        """Of what comes one after the other in the model; for a verdict that isn't good."""
        if not self.embedding <= TOLERANCE:
            return "the embedding"
        return next((f"layer {layer.number}" for layer in self.layers if not layer.agrees), "what follows the layers")

    def as_json(self) -> dict[str, Any]:
        """Names are stable; numbers that are not finite are null."""
        first = None if self.good else self.first_that_differs
        facts = dataclasses.asdict(self) | {"good": self.good, "tolerance": TOLERANCE, "first_that_differs": first}
        facts["layers"] = [_finite(layer) for layer in facts["layers"]]
        return _finite(facts)


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in facts.items()}


def compare(theirs: Trace, ours: Trace, of: str) -> Verdict:
    """The numbers; ``of``: what the tokens are.

    Raises:
        BadInput: the models don't have the same shape.
    """
    shapes = [(one.logits.shape, len(one.hidden), sorted(one.experts)) for one in (theirs, ours)]
    if shapes[0] != shapes[1]:
        said = [f"logits {list(one)}, {layers - 1} layers, experts in {experts}" for one, layers, experts in shapes]
        raise BadInput(f"--verify: two different models: transformers has {said[0]}; here are {said[1]}")
    nats = np.concatenate([divergence(*rows) for rows in zip(theirs.logits, ours.logits, strict=True)])
    same = [relative(*pair) for pair in zip(theirs.hidden, ours.hidden, strict=True)]
    routing = {n: float((own == ours.experts[n]).all(-1).mean()) for n, own in theirs.experts.items()}
    return Verdict(
        tokens=nats.size,
        of=of,
        difference=float(np.abs(theirs.logits - ours.logits).max()),
        relative=relative(theirs.logits, ours.logits),
        kl_mean=float(nats.mean()),
        kl_max=float(nats.max()),
        top_1=float((theirs.logits.argmax(-1) == ours.logits.argmax(-1)).mean()),
        embedding=same[0],
        layers=[Layer(number, own, routing.get(number)) for number, own in enumerate(same[1:])],
    )


def relative(theirs: Float[np.ndarray, "..."], ours: Float[np.ndarray, "..."]) -> float:
    """The largest difference over the largest of theirs; NaN where there is one."""
    return float(np.abs(theirs - ours).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


def divergence(theirs: Float[np.ndarray, "t v"], ours: Float[np.ndarray, "t v"]) -> Float[np.ndarray, "t"]:
    """KL(theirs || ours) = sum_v p (log p - log q), in double precision."""
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def _log_softmax(logits: Float[np.ndarray, "t v"]) -> Float[np.ndarray, "t v"]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def tokens_for(folder: Path, vocab: int, count: int) -> tuple[Int[np.ndarray, "b t"], str]:
    """Rows of :data:`LENGTH` tokens, ``count`` in all but for what fills no row, and what they are: text, where the
    folder has a tokenizer that this library reads, else drawn with seed 0."""
    rows, length = max(1, count // LENGTH), min(count, LENGTH)
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        text = tokenizer.encode("\n".join(read_documents(PACKAGED_TEXT, "text"))[: 16 * count])
    except BadInput:
        text = np.zeros(0, np.int32)
    if text.size < rows * length or text.max() >= vocab:
        return np.random.default_rng(0).integers(0, vocab, (rows, length), np.int32), "random, as there is no tokenizer"
    return text[: rows * length].reshape(rows, length), "of text"


def verify(ours: Path, theirs: Path, count: int, step: int | None = None) -> Verdict:
    """Run both; one at a time is in memory, whole, in fp32.

    Args:
        ours: a run, or a directory in the hub's layout.
        theirs: a directory in the hub's layout.
        count: of tokens.
        step: of a run; None: the newest.

    Raises:
        BadInput: see :mod:`gshardx.convert.traces` and :func:`compare`.
    """
    import_transformers()  # before anything takes time
    model = load_theirs(theirs)
    tokens, of = tokens_for(theirs, model.get_input_embeddings().num_embeddings, count)
    expected = trace_theirs(model, tokens)
    del model
    loaded = load_ours(ours, step)
    if loaded.plan.vocab != expected.logits.shape[-1]:
        raise BadInput(f"--verify: {ours} has {loaded.plan.vocab} tokens and {theirs} {expected.logits.shape[-1]}")
    return compare(expected, trace_ours(loaded, tokens), of)


def verify_run(run: Path, count: int, step: int | None) -> Verdict:
    """A run against transformers' reading of what it is written as, in a temporary directory."""
    import_transformers()
    with tempfile.TemporaryDirectory() as place:
        convert_out(run, Path(place) / "theirs", step, "float32", say=lambda line: None)
        return verify(run, Path(place) / "theirs", count, step)


def report(verdict: Verdict, file: Path | None) -> int:
    """Print the numbers and write them; the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{verdict.tokens} tokens, {verdict.of}; fp32, ours and transformers {import_transformers().__version__}"
    )
    table = Table("of the logits", "")
    table.add_row("largest difference", f"{verdict.difference:.3g}")
    table.add_row("over the largest logit", f"{verdict.relative:.3g}")
    table.add_row("KL(theirs || ours), mean", f"{verdict.kl_mean:.3g} nats")
    table.add_row("KL(theirs || ours), largest", f"{verdict.kl_max:.3g} nats")
    table.add_row("same likeliest token", _share(verdict.top_1))
    console.print(table)
    layers = Table("layer", "largest difference, relative", "same experts")
    layers.add_row("embedding", f"{verdict.embedding:.3g}", "")
    for one in verdict.layers:
        layers.add_row(f"{one.number}", f"{one.difference:.3g}", "" if one.routing is None else _share(one.routing))
    console.print(layers)
    if file is not None:
        file.write_text(json.dumps(verdict.as_json(), indent=1) + "\n", encoding="utf-8")
    if verdict.good:
        print(f"the same model: within {TOLERANCE:g}")
        return 0
    print(f"NOT the same model: the first to differ is {verdict.first_that_differs}")
    return 1


def _share(share: float) -> str:
    """100 % means all."""
    return f"{math.floor(share * 10_000) / 100:.2f} %"
