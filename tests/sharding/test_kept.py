"""Steps that were compiled once are read back, and only where nothing that they depend on has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.sharding import CompiledStep, MeshConfig, build_mesh, kept
from gshardx.sharding.guard import count_compiles
from gshardx.sharding.kept import KeptSteps


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "steps"
    jax.config.update("jax_compilation_cache_dir", before)


def made(mesh, facts="a", name="double", times=2):
    steps = KeptSteps(mesh, facts)

    def double(x):
        return times * x

    with steps.making():
        return steps.get(name, lambda: CompiledStep(double, (jax.ShapeDtypeStruct((8,), jnp.float32),), mesh))


def result(step):
    return np.asarray(step(jnp.arange(8.0)))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=4)], ids=str)
def test_the_second_start_compiles_nothing(folder, mesh):
    mesh, x = build_mesh(mesh), jnp.arange(8.0)
    np.testing.assert_array_equal(result(made(mesh)), 2 * x)
    with count_compiles() as count:
        step = made(mesh)
    assert count.compiled == []
    np.testing.assert_array_equal(result(step), 2 * x)
    assert len(list(folder.iterdir())) == 1


def test_other_facts_code_or_names_are_other_files(folder, monkeypatch):
    mesh = build_mesh(MeshConfig())
    made(mesh)
    assert result(made(mesh, facts="b", times=3))[1] == 3
    assert result(made(mesh, name="triple", times=3))[1] == 3
    monkeypatch.setattr(kept, "_own_code", lambda: "edited")
    assert result(made(mesh, times=5))[1] == 5
    assert len(list(folder.iterdir())) == 4


def test_a_damaged_file_is_made_again(folder):
    mesh = build_mesh(MeshConfig())
    made(mesh)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert result(made(mesh))[1] == 2
    assert file.stat().st_size > 0.9 * len(whole)


def test_without_a_place_nothing_is_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert KeptSteps(build_mesh(MeshConfig()), "a").folder is None
        assert result(made(build_mesh(MeshConfig())))[1] == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
