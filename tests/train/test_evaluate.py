"""How well held-out text is predicted, by every source, and what xz makes of it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import DataConfig
from gshardx.layers import Packed
from gshardx.models.build import Variables
from gshardx.train.evaluate import evaluate, xz_bits_per_byte
from gshardx.train.job import Job
from gshardx.train.text import read_text


def test_an_evaluation_predicts_every_byte_once(config):
    text = read_text(config.data)
    job = Job.of(config, text.tokenizer.vocab_size)
    params = job.blueprint.init(jax.random.key(0))
    variables = Variables(params, job.blueprint.init_router())
    found = evaluate(job, variables, text)

    model = job.blueprint.bind(jax.device_put(jax.device_get(params), jax.devices()[0]))
    nats, right, targets = 0.0, 0, 0

    @jax.jit
    def scores(tokens, valid):
        positions = jnp.arange(16, dtype=jnp.int32)[None]
        memory = Packed.of(valid[None].astype(int))
        hidden, _, _ = model.hidden(tokens[None], positions, valid[None], memory, None, ())
        return jax.nn.log_softmax(model.logits(hidden)[0])

    for ids in text.held_out.documents:
        for at in range(1, len(ids)):  # each token from its own window, one at a time
            window = ids[8 * max(0, math.ceil((at - 16) / 8)) : at]
            padded = np.pad(window, (0, 16 - len(window)))
            row = np.asarray(scores(padded, np.arange(16) < len(window))[len(window) - 1])
            nats -= float(row[ids[at]])
            right += int(row.argmax() == ids[at])
            targets += 1
            assert len(window) >= min(at, 8)
    size = sum(len(document) for document in text.held_out_documents)
    assert targets == size + len(text.held_out_documents)  # each byte, and the end of each document
    assert found == pytest.approx(
        {
            "evaluation/loss": nats / targets,
            "evaluation/bits_per_byte": nats / math.log(2) / size,
            "evaluation/token_accuracy": right / targets,
        },
        rel=1e-5,
    )


def test_xz_reads_the_training_text_first(config):
    text = read_text(config.data)
    known = xz_bits_per_byte(text)
    unknown = xz_bits_per_byte(dataclasses.replace(text, training_documents=["@"]))
    assert known < unknown
    assert xz_bits_per_byte(dataclasses.replace(text, training_documents=["x" * 9_000_000])) is None


def test_each_source_of_a_mixture_has_scores_of_its_own(config, tmp_path):
    """Those it has alone; and what all have together is their mean by tokens and bytes."""
    names = [str(tmp_path / f"{name}.jsonl") for name in ("short", "long")]
    for name, count in zip(names, (10, 30), strict=True):
        lines = (json.dumps({"text": f"{number} {name[-12:]} to be or not"}) for number in range(count))
        (tmp_path / name).write_text("\n".join(lines))
    data = DataConfig(mixture=dict.fromkeys(names, 1.0), tokenizer="bytes", sequence_length=16, validation_fraction=0.3)
    job = Job.of(config, 257)
    variables = Variables(job.blueprint.init(jax.random.key(0)), job.blueprint.init_router())
    text = read_text(data)
    found = evaluate(job, variables, text)
    assert len(found) == 9
    held, sums = text.held_out, {}
    for name in names:
        mine = [number for number, source in enumerate(held.sources) if source == name]
        assert mine
        alone = type(held)(*([column[number] for number in mine] for column in held))
        for metric, value in evaluate(job, variables, dataclasses.replace(text, held_out=alone)).items():
            assert found[metric.replace("evaluation/", f"evaluation/{name}/")] == pytest.approx(value, rel=1e-6)
        sums[name] = (sum(len(ids) - 1 for ids in alone.documents), sum(alone.sizes))
    for metric, of in (("loss", 0), ("bits_per_byte", 1), ("token_accuracy", 0)):
        weights = [sums[name][of] for name in names]
        each = [found[f"evaluation/{name}/{metric}"] for name in names]
        assert found[f"evaluation/{metric}"] == pytest.approx(np.average(each, weights=weights), rel=1e-6)
