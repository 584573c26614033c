"""Rows reach the devices that hold their experts, and return to where they were; the real collective and a stand-in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers import Gather, Ragged
from gshardx.layers.dispatch.exchange import Compact, offsets, offsets_back
from gshardx.sharding import MeshConfig, build_mesh
from tests.layers.test_moe import assert_equal, inputs, layer, loss_and_gradients


def carried(buffers, rooms, trips):
    """``ragged_all_to_all`` as its documentation says it, one device and one run of rows at a time."""
    received = [room.copy() for room in rooms]
    for me, (starts, sizes, theirs, _) in enumerate(trips):
        for to in range(len(trips)):
            run = buffers[me][starts[to] : starts[to] + sizes[to]]
            received[to][theirs[to] : theirs[to] + sizes[to]] = run
    return received


@pytest.mark.parametrize("seed", range(5))
def test_offsets_carry_every_row_once_without_overlap_and_back(seed):
    draw, devices = np.random.default_rng(seed), 4
    rows = draw.integers(0, 4, (devices, devices)) * draw.integers(0, 2, (devices, devices))
    buffers = [np.arange(100 * me, 100 * me + rows[me].sum()) + 1 for me in range(devices)]
    trips = [tuple(map(np.asarray, offsets(jnp.asarray(rows), me))) for me in range(devices)]
    arrived = carried(buffers, [np.zeros(rows.sum(), int)] * devices, trips)
    for me in range(devices):
        np.testing.assert_array_equal(trips[me][3], [trips[source][1][me] for source in range(devices)])
        expected = np.concatenate([buffers[j][rows[j, :me].sum() : rows[j, : me + 1].sum()] for j in range(devices)])
        np.testing.assert_array_equal(arrived[me][: len(expected)], expected)
        assert not arrived[me][len(expected) :].any()
    returns = [tuple(map(np.asarray, offsets_back(jnp.asarray(rows), me))) for me in range(devices)]
    home = carried(arrived, [np.zeros_like(buffer) for buffer in buffers], returns)
    for before, after in zip(buffers, home, strict=True):
        np.testing.assert_array_equal(after, before)


def stand_in(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``jax.lax.ragged_all_to_all`` out of all-gathers, for CPUs."""
    me = jax.lax.axis_index(axis_name)
    rows = jax.lax.all_gather(operand, axis_name)
    starts, theirs = (jax.lax.all_gather(x, axis_name)[:, me] for x in (input_offsets, output_offsets))
    at = jnp.arange(len(output))
    for source in range(rows.shape[0]):
        inside = (at >= theirs[source]) & (at < theirs[source] + recv_sizes[source])
        run = rows[source].at[starts[source] + at - theirs[source]].get(mode="fill", fill_value=0)
        output = jnp.where(inside[:, None], run, output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("mesh_config", [MeshConfig(expert=8), MeshConfig(data=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize("router", ["gshard", "sigmoid_bias"])
def test_compact_exchange_gives_what_gather_gives(router, mesh_config, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", stand_in)
    expected_step, params = loss_and_gradients(layer(Gather(), router))
    step, _ = loss_and_gradients(layer(Ragged("compact"), router))
    expected = jax.jit(expected_step)(params, inputs()[0])
    with jax.set_mesh(build_mesh(mesh_config)):
        actual = jax.block_until_ready(jax.jit(step)(params, inputs()[0]))
    assert_equal(actual, expected, 1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_the_ragged_collective_forward_and_backward(platform):
    step, params = loss_and_gradients(layer(Ragged("compact")))
    with jax.set_mesh(build_mesh(MeshConfig(data=2, expert=4))):
        lowered = jax.jit(step).trace(params, inputs()[0]).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert text.count("ragged_all_to_all") >= 4
    assert "stablehlo.all_to_all" not in text


def test_received_rows_know_their_experts():
    counts = np.array([[[2, 0], [1, 1]], [[0, 3], [0, 0]]])  # from, to, local expert
    exchange = Compact(jnp.asarray(counts), bound=4, sent=4)
    found = jax.vmap(lambda _: exchange.expert_of_received(), axis_name="expert")(jnp.arange(2))
    np.testing.assert_array_equal(found, [[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 2, 2, 2]])
