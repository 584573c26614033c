"""Other than plain attention: on a mesh as on one device, from caches as from a full pass, and within its budget."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.infer.program import Sizes
from gshardx.infer.program import abstract_state as paged_state
from gshardx.infer.request import Request, SamplingParams
from gshardx.models.build import blueprint
from gshardx.models.decode import abstract_state
from gshardx.models.generator import Generator
from gshardx.sharding import MeshConfig, build_mesh
from tests.infer.answers import answered, check_against_full_pass
from tests.infer.conftest import Model, texts
from tests.models.test_collectives import breaches
from tests.models.test_decode import CHUNK, PROMPTS, ROWS, full_logits, stepped_logits
from tests.models.test_decode import LENGTH as CACHE
from tests.models.test_decoder import VOCAB, model, train

LATENT = {"kind": "latent", "q_rank": 8, "kv_rank": 12, "rope_dim": 4, "nope_dim": 6, "value_dim": 5}


def with_attention(options, **others):
    return dataclasses.replace(model(2, every=1), attention=options, **others)


KINDS = {
    "latent": with_attention(LATENT, rope={"interleaved": True}),
    "windows and sinks": with_attention({"window": 5, "full_every": 2, "sinks": True, "biases": "qkvo"}),
    "chunks": with_attention(
        {"chunk": 6, "full_every": 2, "nope": True, "qk_norm": "l2", "temperature_floor": 4, "temperature_scale": 0.3}
    ),
}
MESHES = [MeshConfig(data=2, expert=2, tensor=2), MeshConfig(fsdp=2, expert=2, tensor=2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh_config"),
    [
        ("latent", MESHES[0]),
        ("windows and sinks", MESHES[1]),
        pytest.param("chunks", MESHES[0], marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_training_on_a_mesh_is_training_on_one_device(kind, mesh_config):
    (losses, params), (wanted, theirs) = train(KINDS[kind], mesh_config), train(KINDS[kind], MeshConfig())
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), params, theirs)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "config",
    [*KINDS.values(), with_attention(LATENT | {"q_rank": None, "biases": True})],
    ids=[*KINDS, "latent, no q_rank, biases"],
)
@pytest.mark.parametrize("step", ["train", "prefill", "decode"])
def test_every_step_keeps_to_its_budget(step, config):
    assert breaches(step, config, MESHES[1]) == []


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "mesh_config"),
    [("latent", MeshConfig()), ("latent", MESHES[0]), ("windows and sinks", MESHES[0]), ("chunks", MESHES[0])],
    ids=str,
)
def test_a_cache_and_pages_give_what_a_full_pass_gives(kind, mesh_config):
    model = Model(mesh_config, dataclasses.replace(KINDS[kind], scales={"attention": 0.5}))
    generator = Generator(model.plan, model.variables, model.mesh, length=CACHE, rows=ROWS, chunk=CHUNK)
    sequences = PROMPTS[:ROWS]
    lengths = [max(1, len(one) // 2) for one in sequences]
    found = stepped_logits((model.plan, model.variables, model.mesh, generator), sequences, lengths)
    for one, first, logits in zip(sequences, lengths, found, strict=True):
        wanted = full_logits(model.plan, model.variables, one)
        np.testing.assert_allclose(np.stack(logits), wanted[first - 1 :], rtol=1e-5, atol=1e-5)
    requests = [
        Request(str(i), p, SamplingParams(max_new_tokens=9, logprobs=0, ignore_end=True, prompt_logprobs=0))
        for i, p in enumerate(texts(1, 6))
    ]
    engine = model.engine()
    answers = answered(engine, requests)
    check_against_full_pass(model.plan, model.variables, requests, answers)
    assert answered(engine, requests[3:4])["3", 0] == answers["3", 0], "to the bit, whoever else is there"


def test_of_a_token_a_layer_keeps_the_latent_vector_and_one_key():
    mesh = build_mesh(MESHES[0])
    plan = blueprint(KINDS["latent"], VOCAB, mesh)
    state = abstract_state(plan, rows=8, length=16, mesh=mesh)
    assert state.v is None
    assert state.k.shape == (KINDS["latent"].layers, 8, 16, 1, 12 + 4)
    sizes = Sizes(shards=4, slots=2, pages=5, page_size=8, max_length=16, tile=4, steps=1)
    pools = paged_state(plan, sizes, mesh).pools
    assert [leaf.size for leaf in jax.tree.leaves(pools)] == [4 * 5 * 8 * (12 + 4)] * KINDS["latent"].layers
    for refused in ({"kv_dtype": "int8"}, {"attention": "pallas"}):
        with pytest.raises(BadInput, match=f"{next(iter(refused))} = {next(iter(refused.values()))}"):
            paged_state(plan, sizes._replace(**refused), mesh)
