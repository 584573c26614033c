"""Notes that routers keep of tokens, in every memory: the mean of a document's so far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.layers import KVCache, Packed
from gshardx.layers.memory import Kept
from gshardx.layers.notes import recalled
from tests.oracles.documents import means

B, T, N = 2, 12, 5
NOTES = np.random.default_rng(0).normal(size=(B, T, N)).astype(np.float32)
GROUPED = Kept(2, 3)


def expected(segments):
    found = np.zeros((B, T, N))
    for row in range(B):
        for document in set(segments[row]):
            here = segments[row] == document
            found[row, here] = means(NOTES[row, here], np.ones(here.sum(), bool))
    return found


@pytest.mark.parametrize(("kept", "queries"), [(GROUPED, 2), (GROUPED, 4), (Kept(1, 8, 6), 3)], ids=str)
def test_of_packed_documents_each_has_its_own_mean(kept, queries):
    segments = np.asarray([[1] * 5 + [2] * 4 + [3] * 3, [1] * 12])
    found, _ = jax.jit(lambda notes: recalled(notes, Packed.of(segments), layer=0, kept=kept, queries=queries))(NOTES)
    np.testing.assert_allclose(found, expected(segments), atol=1e-6)


@pytest.mark.parametrize(("kept", "queries"), [(GROUPED, 2), (Kept(1, 8, 6), 3)], ids=str)
def test_a_cache_recalls_them_from_call_to_call(kept, queries):
    """Cut anywhere; all of them, or those since the last fourth place."""
    k = jnp.zeros((3, B, 16, kept.heads, kept.width))
    memory = KVCache(k, None if kept.values else k, jnp.zeros((B, 1), jnp.int32))
    found, start = [], 0
    for size in (5, 1, 1, 5):
        positions = start + np.arange(size) + np.zeros((B, 1), np.int32)
        memory = KVCache(memory.k, memory.v, jnp.asarray(positions))
        new, at = NOTES[:, start : start + size], {"layer": 2, "kept": kept, "queries": queries}
        mean, memory = recalled(new, memory, **at)
        near, memory = recalled(new, memory, jnp.asarray(positions % 4), **at)
        found.append(np.stack([mean, near]))
        start += size
    whole, of_four = np.concatenate(found, 2)
    np.testing.assert_allclose(whole, expected(np.ones((B, T), int)), atol=1e-6)
    np.testing.assert_allclose(of_four, expected(np.tile(np.arange(T) // 4, (B, 1))), atol=1e-6)


def test_notes_that_find_no_room_are_refused():
    with pytest.raises(BadInput, match="the router keeps 5 values of a token, but a layer has room for 4; use more kv"):
        recalled(NOTES, Packed.of(np.ones((B, T), np.int32)), layer=0, kept=Kept(1, 4), queries=1)
