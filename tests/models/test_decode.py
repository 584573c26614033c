"""Decoding gives what the full forward pass gives, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import Packed
from gshardx.models.build import Variables, blueprint
from gshardx.models.decode import Sampling, sample
from gshardx.models.generator import Generator, SamplingOptions
from gshardx.sharding import MeshConfig, build_mesh

VOCAB, LENGTH, ROWS, CHUNK = 64, 48, 8, 8
MODEL = ModelConfig(
    layers=4, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, moe=MoEConfig(num_experts=8, hidden=8)
)
MESHES = [MeshConfig(), MeshConfig(expert=8), MeshConfig(data=2, expert=2, tensor=2)]
DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(0, VOCAB, length).astype(np.int32) for length in (1, 7, 8, 9, 20, 3, 16, 11, 5, 2, 30)]


@pytest.fixture(
    scope="module", params=[MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])], ids=str
)
def engine(request):
    mesh = build_mesh(request.param)
    plan = blueprint(MODEL, VOCAB, mesh)
    variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
    return plan, variables, mesh, Generator(plan, variables, mesh, length=LENGTH, rows=ROWS, chunk=CHUNK)


def full_logits(plan, variables, tokens):
    """One dropless forward pass over a whole sequence on one device: ``[t, v]``."""
    params, router = jax.device_put(jax.device_get(variables), jax.devices()[0])
    model = plan.bind(params)
    tokens = jnp.asarray(tokens)[None]
    ones = jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _, metrics = model.hidden(tokens, positions, ones > 0, Packed.of(ones), None, router)
    assert float(metrics.stats.drop_fraction.max()) == 0.0
    return np.asarray(model.logits(hidden)[0])


def stepped_logits(engine, sequences, prompt_lengths):
    """Logits after the prompt and after each further token, fed one by one: a list of ``[n, v]`` a row."""
    _, variables, _, generator = engine
    state = generator._prefilled([s[:n] for s, n in zip(sequences, prompt_lengths, strict=True)])
    rows = [[np.asarray(state.logits)[row]] for row in range(len(sequences))]
    for offset in range(max(len(s) - n for s, n in zip(sequences, prompt_lengths, strict=True))):
        tokens, count = np.zeros((ROWS, CHUNK), np.int32), np.zeros(ROWS, np.int32)
        for row, (sequence, n) in enumerate(zip(sequences, prompt_lengths, strict=True)):
            if n + offset < len(sequence):
                tokens[row, 0], count[row] = sequence[n + offset], 1
        on_device = jax.device_put(tokens, generator._by_row_token)
        state = generator.prefill(variables, state, on_device, generator._put(count))
        jax.block_until_ready(state)
        for row in np.flatnonzero(count):
            rows[row].append(np.asarray(state.logits)[row])
    return [np.stack(row) for row in rows]


def test_prefill_and_steps_equal_one_full_pass_at_every_position(engine):
    plan, params, _, _ = engine
    sequences = [DRAW.integers(0, VOCAB, 24).astype(np.int32) for _ in range(ROWS)]
    lengths = [1, 8, 3, 16, 9, 7, 20, 12]
    in_batch = stepped_logits(engine, sequences, lengths)
    for sequence, n, logits in zip(sequences, lengths, in_batch, strict=True):
        np.testing.assert_allclose(logits, full_logits(plan, params, sequence)[n - 1 :], atol=1e-5)
    alone = stepped_logits(engine, sequences[3:4], lengths[3:4])
    np.testing.assert_array_equal(alone[0], in_batch[3])


def test_greedy_decode_takes_the_full_passs_best_token_each_time(engine):
    plan, params, _, generator = engine
    prompt = PROMPTS[4]
    tokens = [one.token for one in generator.generate([prompt], 12, SamplingOptions(temperature=0.0))]
    logits = full_logits(plan, params, np.concatenate([prompt, tokens]).astype(np.int32))
    assert tokens == list(logits[len(prompt) - 1 : -1].argmax(-1))


@pytest.mark.parametrize(
    "options", [SamplingOptions(0.0), SamplingOptions(0.9, 20, 0.95, seed=5)], ids=["greedy", "drawn"]
)
def test_a_prompts_text_is_the_same_in_any_batch(engine, options):
    generator = engine[3]

    def texts(prompts):
        out = [[] for _ in prompts]
        for one in generator.generate(prompts, 16, options, end=None):
            out[one.prompt].append(one.token)
        return out

    together = texts(PROMPTS)  # 11 prompts in batches of 8
    assert [texts([prompt])[0] for prompt in PROMPTS] == together
    assert texts(PROMPTS[::-1])[::-1] == together
    assert len({tuple(text) for text in together}) > 8, "different prompts must lead to different texts"


@pytest.mark.slow
def test_text_is_the_same_on_every_mesh():
    def text(mesh_config):
        mesh = build_mesh(mesh_config)
        plan = blueprint(MODEL, VOCAB, mesh)
        variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
        generator = Generator(plan, variables, mesh, length=LENGTH, rows=ROWS, chunk=CHUNK)
        return [list(one) for one in generator.generate(PROMPTS, 10, SamplingOptions(1.0, seed=3))]

    expected = text(MESHES[0])
    assert text(MESHES[1]) == expected
    assert text(MESHES[2]) == expected


def test_a_row_stops_after_its_end_token(engine):
    generator = engine[3]
    options = SamplingOptions(temperature=0.0)
    text = [one.token for one in generator.generate(PROMPTS[4:5], 16, options)]
    end = text[5]
    cut = [one.token for one in generator.generate(PROMPTS[4:5], 16, options, end=end)]
    assert cut == text[: text.index(end)]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "prompt 1 is empty"), (list(range(40)), "prompt 1 has 40 tokens; with --max_new_tokens 16")],
)
def test_prompts_that_do_not_fit_are_refused(engine, prompt, said):
    with pytest.raises(BadInput, match=said):
        list(engine[3].generate([np.asarray(prompt, np.int32)], 16, SamplingOptions()))


def test_no_sampling_value_compiles_anything(engine, caplog):
    generator = engine[3]
    list(generator.generate(PROMPTS[:2], 2, SamplingOptions()))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for options in (SamplingOptions(0.0), SamplingOptions(0.7, 3, 0.5, 9), SamplingOptions(2.0, 0, 0.1, 2**32 - 1)):
            list(generator.generate(PROMPTS[2:5], 3, options))
    assert not [record for record in caplog.records if "ompiling" in record.getMessage()]


# Sampling


def draws(logits, how, count=4000):
    """Tokens drawn from the same logits at ``count`` positions."""
    rows = {name: jnp.full(count, value) for name, value in how.items()}
    full = Sampling(
        jnp.asarray(rows.get("temperature", jnp.ones(count)), jnp.float32),
        jnp.asarray(rows.get("top_k", jnp.zeros(count)), jnp.int32),
        jnp.asarray(rows.get("top_p", jnp.ones(count)), jnp.float32),
        jnp.zeros(count, jnp.uint32),
    )
    return np.asarray(jax.jit(sample)(jnp.broadcast_to(logits, (count, len(logits))), full, jnp.arange(count)))


LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.1, 0.15, 0.3]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.15, 0.3]),
        ({"temperature": 0.5}, np.asarray([0.05, 0.4, 0.1, 0.15, 0.3]) ** 2 / 0.285),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": 0.7}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 0.4 / 0.85, 0, 0.15 / 0.85, 0.3 / 0.85]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 1, "temperature": 5.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 0, 3 / 7]),
    ],
    ids=str,
)
def test_draws_follow_the_cut_distribution(how, expected):
    share = np.bincount(draws(LOGITS, how), minlength=5) / 4000
    np.testing.assert_allclose(share, expected, atol=0.03)
    assert not share[np.asarray(expected) == 0].any()
