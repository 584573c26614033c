"""Paged attention against plain attention in NumPy, page by page on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers import FullPages, Int8Pages, paged_attention
from gshardx.layers.paged import _store_and_attend

PAGES, KV, SIZE, D, N = 23, 2, 4, 8, 4
LENGTHS = (1, 4, 5, 17)
"""Tokens of each sequence; a page holds 4."""


def attention(q, keys, values, position, window=None, sinks=None):
    """One query ``[n, d]`` over ``[l, q, d]``, head by head, in float64."""
    first = 0 if window is None else max(0, position + 1 - window)
    out = []
    for head in range(N):
        k, v = (x[first : position + 1, head // (N // KV)].astype(np.float64) for x in (keys, values))
        scores = k @ q[head].astype(np.float64) / np.sqrt(D)
        top = max(scores.max(), -np.inf if sinks is None else sinks[head])
        weights = np.exp(scores - top)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - top))
        out.append(weights @ v / total)
    return np.stack(out)


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.fixture
def sequences(draw):
    """Queries, keys and values of all tokens of each sequence."""
    return [tuple(draw.normal(size=(n, heads, D)).astype(np.float32) for heads in (N, KV, KV)) for n in LENGTHS]


def tables(draw):
    """Disjoint pages in any order."""
    free = list(draw.permutation(np.arange(1, PAGES)))
    return np.asarray([[free.pop() if 4 * i < n else 0 for i in range(5)] for n in LENGTHS], np.int32)


store_and_attend = jax.jit(_store_and_attend)


def full(dirt=0.0):
    return FullPages(jnp.full((PAGES, KV, D, SIZE), dirt), jnp.full((PAGES, KV, SIZE, D), dirt))


def int8(dirt=0.0):
    keys, values = jnp.full((PAGES, KV, D, SIZE), 77, jnp.int8), jnp.full((PAGES, KV, SIZE, D), 77, jnp.int8)
    return Int8Pages(keys, jnp.full((PAGES, KV, 1, SIZE), dirt), values, jnp.full((PAGES, KV, SIZE, 1), dirt))


def in_int8(x):
    """What is left of numbers after 8 bits a head of a token."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.round(x / scale) * scale


def fed(sequences, table, chunks, pool=full(), width=8):  # noqa: B008 (arrays are immutable)
    """The results of all tokens, fed ``chunks[i]`` tokens of each sequence a call, side by side."""
    done, found = [0] * len(sequences), [[] for _ in sequences]
    while any(at < len(q) for at, (q, *_) in zip(done, sequences, strict=True)):
        places = [
            (number, done[number] + offset)
            for number, (q, *_) in enumerate(sequences)
            for offset in range(min(chunks[number], len(q) - done[number]))
        ]
        sequence, positions = np.zeros(width, np.int32), np.full(width, -1, np.int32)
        sequence[: len(places)] = [number for number, _ in places]
        positions[: len(places)] = [at for _, at in places]
        inputs = [
            np.stack([sequences[number][part][at] for number, at in places] + [np.zeros_like(sequences[0][part][0])]
                     * (width - len(places)))
            for part in range(3)
        ]  # fmt: skip
        longest = jnp.int32(positions.max() // SIZE + 1)
        out, pool = store_and_attend(*inputs, pool, table, sequence, positions, longest)
        for row, (number, at) in enumerate(places):
            found[number].append(np.asarray(out[row]))
            done[number] = at + 1
    return [np.stack(rows) for rows in found]


POOLS = pytest.mark.parametrize(("pool", "kept"), [(full, lambda x: x), (int8, in_int8)], ids=["full", "int8"])


@POOLS
def test_every_token_sees_its_own_sequence_up_to_itself(sequences, draw, pool, kept):
    found = fed(sequences, tables(draw), chunks=(1, 2, 3, 2), pool=pool())
    for (q, k, v), result in zip(sequences, found, strict=True):
        for position, row in enumerate(result):
            np.testing.assert_allclose(row, attention(q[position], kept(k), kept(v), position), atol=2e-6)


def test_eight_bits_are_off_by_half_a_step_at_most(draw):
    x = draw.normal(size=(1, KV, D)).astype(np.float32) * 10
    x[0, 0] = 0
    keys, values = int8().put(jnp.asarray([3]), jnp.asarray([1]), jnp.asarray(x), jnp.asarray(x)).read(jnp.asarray([3]))
    for back in (np.asarray(keys)[0, :, :, 1], np.asarray(values)[0, :, 1]):
        assert (back[0] == 0).all()
        assert np.abs(back - x[0])[1].max() <= np.abs(x[0, 1]).max() / 127 / 2 * (1 + 1e-5)


@POOLS
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (1, 4, 1, 2), (0, 0, 0, 8)])
def test_a_tokens_bits_depend_on_nothing_but_its_sequence(sequences, draw, chunks, pool, kept):
    """Not on its neighbours, on chunks, on which pages it has, nor on what they held before, be it NaN."""
    usual = fed(sequences, tables(draw), chunks=(1, 2, 3, 2), pool=pool())
    if chunks[0] == 0:
        sequences, usual = sequences[3:], usual[3:]
        table, chunks = tables(draw)[3:], chunks[3:]
    else:
        table = tables(draw)
    other = fed(sequences, table, chunks, pool(dirt=np.nan))
    for a, b in zip(usual, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("window", "with_sinks"), [(3, False), (None, True), (6, True), (1, True)])
def test_windows_and_sinks(draw, window, with_sinks):
    sinks = draw.normal(size=N).astype(np.float32) if with_sinks else None
    length = 17
    k, v = (draw.normal(size=(length, KV, D)).astype(np.float32) for _ in range(2))
    table = np.asarray([4, 2, 9, 1, 7], np.int32)
    at = np.arange(length)
    pool = full().put(jnp.asarray(table[at // SIZE]), jnp.asarray(at % SIZE), jnp.asarray(k), jnp.asarray(v))
    positions = np.asarray([0, 2, 5, 16], np.int32)
    q = draw.normal(size=(4, N, D)).astype(np.float32)
    out = paged_attention(
        jnp.asarray(q), pool, jnp.asarray(np.tile(table, (4, 1))), jnp.asarray(positions), jnp.int32(5),
        reach=None if window is None else jnp.full(4, window - 1), sinks=None if sinks is None else jnp.asarray(sinks),
    )  # fmt: skip
    for row, position in enumerate(positions):
        expected = attention(q[row], k, v, position, window, sinks)
        np.testing.assert_allclose(np.asarray(out[row]), expected, atol=2e-6)


def test_pages_that_are_out_of_reach_are_not_read_for_a_far_token_and_change_no_bit_of_a_near_one(draw):
    k, v = (draw.normal(size=(17, KV, D)).astype(np.float32) for _ in range(2))
    table, at = jnp.asarray([4, 2, 9, 1, 7], jnp.int32), np.arange(17)
    pool = full(dirt=np.nan).put(table[at // SIZE], jnp.asarray(at % SIZE), jnp.asarray(k), jnp.asarray(v))
    q = jnp.asarray(draw.normal(size=(2, N, D)).astype(np.float32))
    sinks = jnp.asarray(draw.normal(size=N).astype(np.float32))

    def found(rows, positions):
        tables, reach = jnp.tile(table, (len(rows), 1)), jnp.full(len(rows), 2)
        return paged_attention(q[rows], pool, tables, positions, jnp.int32(5), reach=reach, sinks=sinks)

    both = found(jnp.asarray([0, 1]), jnp.asarray([1, 16]))
    np.testing.assert_array_equal(both[1], found(jnp.asarray([1]), jnp.asarray([16]))[0])
    np.testing.assert_array_equal(both[1], found(jnp.asarray([0, 1]), jnp.asarray([-1, 16]))[1])
