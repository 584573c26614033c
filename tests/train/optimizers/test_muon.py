"""Muon makes each expert's matrix orthogonal on its own, and sends each matrix once."""

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import OptimizerConfig
from gshardx.sharding import CompiledStep, MeshConfig, abstract_array, build_mesh
from gshardx.train.optimizers.muon import orthogonalise
from tests.oracles.optimizers import newton_schulz
from tests.train.optimizers.stacks import AXES, PARAMETERS, compiled, drawn, units

HIDDEN = [name for name, parameter in PARAMETERS.items() if parameter.hidden]


@pytest.mark.parametrize("name", HIDDEN)
def test_every_layer_s_and_expert_s_matrix_is_orthogonal(name):
    scale = 0.2 * np.sqrt(max(PARAMETERS[name].unit))
    for piece in units(name, orthogonalise(drawn(0)[name], AXES[name])):
        values = np.linalg.svd(piece / scale, compute_uv=False)
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_an_update_has_the_root_mean_square_of_adamw_s():
    """0.2, where the singular values are 1."""
    for name in HIDDEN:
        for piece in units(name, orthogonalise(drawn(1)[name], AXES[name])):
            assert 0.13 < np.sqrt(np.mean(piece**2)) < 0.25


def test_experts_of_any_size_do_not_see_each_other():
    """A thousandth of the gradient gives the same update, and the neighbours' do not change by a bit."""
    x = drawn(0)["experts"]
    smaller = x.copy()
    smaller[1, 2] *= 1e-3
    one, other = (np.array(orthogonalise(value, AXES["experts"])) for value in (x, smaller))
    np.testing.assert_allclose(one[1, 2], other[1, 2], rtol=1e-3, atol=1e-5)
    one[1, 2] = other[1, 2]
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", HIDDEN)
def test_optax_s_iterations_are_the_twin_s(name):
    scale = 0.2 * np.sqrt(max(PARAMETERS[name].unit))
    found = units(name, orthogonalise(drawn(2)[name], AXES[name]))
    for mine, given in zip(found, units(name, drawn(2)[name]), strict=True):
        np.testing.assert_allclose(mine, scale * newton_schulz(given.astype(np.float64)), atol=2e-6)


def sent(mesh_config, names, shape):
    mesh = build_mesh(mesh_config)
    x = abstract_array(shape, jnp.float32, names, mesh)

    def whole(x):
        return orthogonalise(x, names)

    step = CompiledStep(whole, (x,), mesh, out_shardings=x.sharding)
    return [(c.op, c.axes, c.count, c.bytes_per_device) for c in step.collectives]


def test_pieces_of_a_matrix_travel_there_and_back_and_nothing_else_is_sent():
    """On expert=4 x fsdp=2 a device has a 2 x 1 x 8 x 24 piece: both layers' halves of its expert's matrix."""
    piece = 4 * 2 * 1 * 8 * 24
    mesh = MeshConfig(fsdp=2, expert=4)
    assert sent(mesh, AXES["experts"], (2, 4, 16, 24)) == [("all-to-all", ("fsdp",), 1, piece)] * 2


def test_experts_that_divide_are_shared_out_where_layers_do_not():
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    moved = sent(mesh, AXES["experts"], (3, 8, 16, 24))
    assert {op for op, *_ in moved} == {"all-to-all"}
    assert not any("expert" in axes for _, axes, *_ in moved)


def test_matrices_that_cannot_be_shared_out_are_gathered_once():
    """3 layers over fsdp=2: every device gets whole matrices and does all of them; nothing is sent back."""
    moved = sent(MeshConfig(fsdp=2, data=4), AXES["queries"], (3, 16, 2, 4))
    assert moved == [("all-gather", ("fsdp",), 1, 4 * 3 * 16 * 2 * 4 // 2)]


@pytest.mark.slow
def test_a_whole_update_sends_no_expert_to_another_device():
    """But for sums of single values: the gradient's norm."""
    program = compiled(OptimizerConfig(name="muon"), 20, MeshConfig(fsdp=2, expert=4))
    assert all(c.bytes_per_device <= 64 for c in program.step.collectives if "expert" in c.axes)
