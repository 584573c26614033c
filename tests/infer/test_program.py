"""The engine's programs, compiled for chips that are not there."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gshardx.infer.exchange import choose_exchange
from gshardx.infer.program import Sizes, abstract_state, decode, decode_layout, everywhere, step, step_layout
from gshardx.infer.weights import Serving
from gshardx.models.build import blueprint
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import CompiledStep, MeshConfig, build_mesh
from tests.infer.conftest import MODEL

pytestmark = pytest.mark.slow
SIZES = Sizes(shards=4, slots=4, pages=9, page_size=64, max_length=512, tile=4, steps=4)
MOE_LAYERS = 1
SENT = {
    ("all-reduce", ("tensor",)): 1 + 2 * MODEL.layers,  # of the embedding, and of each branch of a block
    ("all-gather", ("expert",)): 3 * MOE_LAYERS,  # tokens, choices, weights
    ("all-reduce", ("expert",)): 1 * MOE_LAYERS,  # sums
    ("all-reduce", ("data", "expert")): 2,  # does anybody ask for this
}


@pytest.mark.parametrize("program", ["decode", "step"])
@pytest.mark.parametrize(("attention", "kernels"), [("xla", 0), ("pallas", MODEL.layers)])
def test_on_tpus_the_kernels_are_there_and_no_more_is_sent_than_must_be(program, attention, kernels):
    pytest.importorskip("libtpu")
    prepare("v5e:2x4")
    mesh = build_mesh(MeshConfig(data=2, expert=2, tensor=2), open_topology("v5e:2x4").devices)
    config = dataclasses.replace(MODEL, width=128, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16")
    plan = blueprint(config, 256, mesh, stack=functools.partial(Serving, exchange=choose_exchange(config, mesh, 16)))
    sizes = SIZES._replace(attention=attention)
    function, given = {"decode": (decode, decode_layout(sizes, 4)), "step": (step, step_layout(sizes, 8, 4))}[program]

    def run(variables, state, buffer):
        return function(plan, sizes, variables, state, given.unpack(buffer))

    buffer = jax.ShapeDtypeStruct((given.words,), jnp.int32, sharding=everywhere(mesh))
    compiled = CompiledStep(run, (plan.variables, abstract_state(plan, sizes, mesh), buffer), mesh, donate=(1,))
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == kernels
    sent = collections.Counter()
    for one in compiled.collectives:
        sent[one.op, one.axes] += one.count
    logits = 1 if program == "decode" else 2  # XLA peels a turn off the loop over places to draw at
    assert sent == {**SENT, ("all-gather", ("tensor",)): logits}
