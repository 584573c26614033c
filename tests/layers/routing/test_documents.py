"""Routers that go by documents, `sentence`, `task` and `demix`, against loops, and what they promise."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, DemixRouter, SentenceRouter, TaskRouter
from gshardx.layers.routing.sentence import running_mean
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, data
from tests.oracles import choice, documents

S, E, TAGS = 10, 4, (7, 3, 11, 2)
SENTENCES = {
    "plain": (2, Capacity(None), {}),
    "tight": (2, Capacity(0.6), {"renormalise": False, "scale": 2.0}),
}


@functools.cache
def compiled(make, *numbers, **options):
    """``call(tokens, ids, valid, training, kernel)``."""
    graph, params = nnx.split(make(M, *numbers, **options, rngs=nnx.Rngs(0)))

    @functools.partial(jax.jit, static_argnums=3)
    def call(tokens, ids, valid, training, kernel):
        router = nnx.merge(graph, jax.tree.map(lambda _: kernel, params))
        return router.reading(ids, None)(tokens, valid, jax.random.key(0) if training else None)

    return call


@pytest.mark.parametrize("name", SENTENCES)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_sentence_equals_the_loops(name, seed, kind, padding):
    k, capacity, options = SENTENCES[name]
    tokens, kernel, valid = data(seed, kind, S, E, padding=padding)
    notes = np.asarray(jnp.einsum("gsm,me->gse", tokens, kernel, precision="highest"))
    slots = capacity_of(capacity, S, E, k, training=True)
    wanted = [documents.sentence(notes[g], k, slots, valid[g], **options) for g in range(G)]
    means = [documents.means(notes[g], valid[g]) for g in range(G)]
    assume(all(choice.gap(row) > 1e-5 for g in range(G) for row in means[g][valid[g]]))
    router = compiled(SentenceRouter, E, k, capacity=capacity, **options)
    check(router(tokens, None, valid, True, kernel), wanted)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_task_and_demix_equal_the_loops(seed, share):
    draw = np.random.default_rng(seed)
    ids, valid = draw.integers(0, 20, (G, S)).astype(np.int32), draw.random((G, S)) < share
    table = draw.normal(size=(len(TAGS) + 1, E)).astype(np.float32)
    tokens, capacity = np.zeros((G, S, M), np.float32), Capacity(0.8)
    slots = capacity_of(capacity, S, E, 2, training=True)
    task = compiled(TaskRouter, E, 2, tags=TAGS, capacity=capacity)
    check(
        task(tokens, ids, valid, True, table),
        [documents.task(ids[g], TAGS, table, 2, slots, valid[g]) for g in range(G)],
    )
    slots = capacity_of(capacity, S, E, 1, training=True)
    demix = compiled(DemixRouter, E, tags=TAGS, capacity=capacity)
    check(demix(tokens, ids, valid, True, None), [documents.demix(ids[g], TAGS, slots, valid[g]) for g in range(G)])


def test_a_documents_tokens_all_have_their_tasks_experts():
    ids = np.asarray([[3, 0, 1, 0], [11, 0, 1, 0], [0, 1, 3, 0]], np.int32)
    table = np.eye(5, 4, dtype=np.float32)
    routing = compiled(TaskRouter, E, 1, tags=TAGS, capacity=Capacity(None))(
        np.random.default_rng(0).normal(size=(3, 4, M)), ids, np.ones((3, 4), bool), False, table
    )
    np.testing.assert_array_equal(routing.experts[..., 0], [[1] * 4, [2] * 4, [0, 0, 1, 1]])


def test_recalled_notes_decide_alone():
    router = SentenceRouter(M, E, 1, rngs=nnx.Rngs(0))
    tokens, _, valid = data(0, "random", S, E)
    recalled = np.eye(E, dtype=np.float32)[np.random.default_rng(1).integers(0, E, (G, S))]
    routing = router.reading(None, recalled)(tokens, valid, None)
    np.testing.assert_array_equal(routing.experts[..., 0], recalled.argmax(-1))


def test_the_gradient_of_a_mean_is_its_share():
    share = jax.grad(lambda notes: running_mean(notes, np.asarray([[True, False, True]]))[0, 2, 0])(jnp.ones((1, 3, 1)))
    np.testing.assert_allclose(share[0, :, 0], [0.5, 0.0, 0.5])


@pytest.mark.parametrize(
    ("make", "numbers", "options", "message"),
    [
        (TaskRouter, (E, 2), {}, "tags = none: list the ids of the tokens that name the tasks or domains"),
        (TaskRouter, (E, 2), {"tags": [3, 3]}, r"tags = [3, 3]: each must be another token"),
        (DemixRouter, (E,), {"tags": [1, 2]}, "tags name 2 domains, but num_experts = 4; give one an expert"),
    ],
)
def test_tags_that_can_not_be_are_refused(make, numbers, options, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        make(M, *numbers, **options, rngs=nnx.Rngs(0))


def test_without_ids_it_says_what_is_missing():
    with pytest.raises(BadInput, match="give the layer its argument ids"):
        DemixRouter(M, 2, tags=[1, 2])(np.zeros((1, 2, M), np.float32), np.ones((1, 2), bool), None)
