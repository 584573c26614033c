"""Processes agree, outside compiled steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh, meeting, simulate_devices
from gshardx.sharding.distributed import Largest, exchange, fetch, on_first, together
from tests.together import finish_both, start_both


def test_alone_everything_is_a_plain_call():
    assert together(lambda: 5) == on_first(lambda: 5) == 5
    assert exchange("word") == ["word"]
    assert Largest(build_mesh(MeshConfig(data=8)))(15) == 15
    with pytest.raises(BadInput, match="no text"):
        on_first(lambda: refuse("no text"))


def refuse(message):
    raise BadInput(message)


def speak(argv):
    """Run by test_two_processes_agree in each of two processes."""
    where, _ = meeting.take_flags(argv)
    with meeting.join(*where) as peers:
        simulate_devices(8, peers.count)
        return agree()


def agree():
    index = jax.process_index()
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    mesh = build_mesh(MeshConfig(data=2, expert=4))
    assert exchange(f"I am {index}, ä") == ["I am 0, ä", "I am 1, ä"]
    assert len(exchange("x" * 5000)[0]) == 1024
    assert on_first(lambda: index + 7) == (7 if index == 0 else None)
    assert together(lambda: index) == index

    largest = Largest(mesh)
    assert [largest(15 if index == step else 0) for step in range(4)] == [0, 15, 15, 0]

    rows = np.arange(32, dtype=np.int32).reshape(8, 4)
    split = NamedSharding(mesh, PartitionSpec(("data", "expert")))
    laid = jax.make_array_from_callback(rows.shape, split, rows.__getitem__)
    assert {shard.index[0].start for shard in laid.addressable_shards} == set(range(4 * index, 4 * index + 4))
    np.testing.assert_array_equal(fetch(laid), rows)
    np.testing.assert_array_equal(fetch(jax.jit(jnp.sum)(laid)), rows.sum())
    with pytest.raises(BadInput, match=r"leaves a process without one; .* product is 8"):
        build_mesh(MeshConfig(data=4))
    print("spoken", flush=True)
    on_first(lambda: refuse("the disk is gone"))
    return 0


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Last, process 0 alone finds bad input: both say it in one line and end at once."""
    (first, said_0), (second, said_1) = finish_both(start_both(tmp_path, str(Path(__file__))), expected=2, limit=120)
    assert first == second == "spoken\n"
    assert said_0 == "error: the disk is gone\n"
    assert said_1 == "error: process 0: the disk is gone\n"


if __name__ == "__main__":
    run_command(speak)
