"""The automatic choice: what it takes where, and that it says so."""

import jax
import numpy as np
import pytest

from gshardx.layers import Auto, Einsum, Gather, Ragged, choose_dispatcher
from gshardx.layers.dispatch import auto
from tests.layers.test_moe import inputs, layer

SHAPE = {"group": 1024, "hidden": 1024, "num_experts": 8, "top_k": 2, "dropless": False}


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"on": "cpu"}, Gather, "gather: S/H = 1.00 on cpu"),
        ({"on": "gpu"}, Gather, "gather"),
        ({"on": "tpu", "hidden": 16384}, Einsum, "S/H = 0.06"),
        ({"on": "tpu"}, Gather, "S/H = 1.00"),
        ({"on": "cpu", "dropless": True}, Ragged, "4 times the choices"),
        ({"on": "cpu", "dropless": True, "num_experts": 512}, Ragged, "256 times"),
        ({"on": "cpu", "dropless": True, "group": 1}, Gather, "dropless by capacity"),
    ],
    ids=str,
)
def test_the_choice_follows_shape_and_backend_and_names_its_reason(change, kind, said):
    choice = choose_dispatcher(**(SHAPE | change))
    assert isinstance(choice.dispatcher, kind)
    assert said in choice.reason


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_dropless_on_accelerators_is_ragged_only_with_a_fast_kernel(backend, monkeypatch):
    for installed, kind in ((True, Ragged), (False, Gather)):
        monkeypatch.setattr(auto, "has_fast_kernel", lambda _, installed=installed: installed)
        assert isinstance(choose_dispatcher(**(SHAPE | {"on": backend, "dropless": True})).dispatcher, kind)


def test_a_layer_with_auto_is_a_layer_with_what_it_chose():
    x, valid = inputs()
    chosen, by_name = (jax.jit(layer(one))(x, valid, jax.random.key(0))[0] for one in (Auto(hidden=12), Gather()))
    np.testing.assert_array_equal(chosen, by_name)
