"""Compilations are counted, and forbidden where everything was compiled before."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.sharding import (
    CompiledStep,
    CompileForbidden,
    MeshConfig,
    abstract_array,
    build_mesh,
    count_compiles,
    forbid_compile,
)

MESH = build_mesh(MeshConfig(expert=8))


def fresh():
    """A jitted function that was never called."""

    @jax.jit
    def scale(tokens, factor):
        return tokens * factor

    return scale


def backend_compilations(inside):
    """What XLA started to compile while ``inside`` ran, whatever it raised."""
    started = []

    def listen(event, **facts):
        if event.startswith("/jax/compilation_cache/compile_requests"):
            started.append(event)

    monitoring.register_event_listener(listen)
    try:
        inside()
    finally:
        monitoring.unregister_event_listener(listen)
    return started


def test_compilations_are_counted_by_name():
    scale, x = fresh(), np.ones(3, np.float32)
    with count_compiles() as count:
        scale(x, 2.0)
        scale(x + 1, 3.0)
    assert [name for name in count.compiled if "scale" in name] == count.compiled
    assert len(count.compiled) == 1
    with count_compiles() as again:
        scale(x, 2.0)
    assert again.compiled == []


def test_after_the_block_nothing_is_counted():
    with count_compiles() as count:
        pass
    fresh()(np.ones(4, np.float32), 1.0)
    assert count.compiled == []


def test_what_was_compiled_before_may_run():
    scale, x = fresh(), np.ones(3, np.float32)
    scale(x, 2.0)
    with forbid_compile():
        np.testing.assert_array_equal(scale(x, 4.0), 4 * x)


def test_a_new_function_may_not():
    with forbid_compile(), pytest.raises(CompileForbidden, match=r"scale.* would be compiled here"):
        fresh()(np.ones(3, np.float32), 2.0)


def test_another_shape_is_refused_by_the_arguments_name_before_xla_runs():
    scale = fresh()
    scale(np.ones(3, np.float32), 2.0)

    def another():
        with forbid_compile(), pytest.raises(CompileForbidden) as caught:
            scale(np.ones(5, np.float32), 2.0)
        message = str(caught.value)
        assert "scale" in message
        assert "tokens" in message
        assert "5" in message
        assert "\n" not in message

    assert backend_compilations(another) == []
    assert backend_compilations(lambda: scale(np.ones(6, np.float32), 2.0)) != []  # the listener does listen


def test_another_place_is_refused_too():
    scale = fresh()
    x = jax.device_put(np.ones((8, 2), np.float32), NamedSharding(MESH, PartitionSpec("expert")))
    jax.block_until_ready(scale(x, 2.0))
    moved = jax.device_put(np.ones((8, 2), np.float32), NamedSharding(MESH, PartitionSpec()))
    with forbid_compile(), pytest.raises(CompileForbidden, match="scale"):
        scale(moved, 2.0)


def test_after_an_error_compiling_is_allowed_again_and_logging_is_as_before():
    logger = logging.getLogger("jax")
    before = (list(logger.handlers), logger.propagate, jax.config.jax_explain_cache_misses)
    with pytest.raises(CompileForbidden), forbid_compile():
        fresh()(np.ones(3, np.float32), 2.0)
    assert (list(logger.handlers), logger.propagate, jax.config.jax_explain_cache_misses) == before
    np.testing.assert_array_equal(fresh()(np.ones(3, np.float32), 2.0), np.full(3, 2.0))


def test_a_compiled_step_runs_under_the_guard():
    step = CompiledStep(lambda x: 2 * x, (abstract_array((8, 2), jnp.float32, ("batch", "model"), MESH),), MESH)
    x = jax.device_put(np.ones((8, 2), np.float32), NamedSharding(MESH, PartitionSpec("expert")))
    with forbid_compile():
        np.testing.assert_array_equal(jax.block_until_ready(step(x)), np.full((8, 2), 2.0))
