"""Programs are held against each other before the first request."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.infer import programs
from gshardx.infer.settings import EngineConfig
from tests.infer.conftest import SMALL

pytestmark = pytest.mark.slow
AGREE = pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="XLA of jax 0.12 rounds 2, 4 and 8 rows of so small a model differently"
)


def off_by_a_bit(call):
    """The same, but the last bit of each log-probability is another."""
    real = call.program

    def program(variables, state, buffer):
        state, words = real(variables, state, buffer)
        fields = call.result.views(np.array(words))
        fields["logprob"][:] = np.nextafter(fields["logprob"], np.float32(1))
        return state, jax.device_put(np.concatenate([v.reshape(-1).view(np.int32) for v in fields.values()]))

    call.program = program


@AGREE
def test_all_agree_on_this_machine(engine):
    assert engine.sizes.tile == SMALL.tile
    assert (list(engine.programs.steps), list(engine.programs.decodes)) == ([8, 16], [2, 4])


@AGREE
def test_a_small_program_that_gives_other_bits_is_left_out(model):
    found = model.engine()
    off_by_a_bit(found.programs.decodes[2])
    assert found.programs.agree(found._variables)
    assert list(found.programs.decodes) == [4]
    assert found.programs.decode_for(1) is found.programs.decodes[4]


def test_where_the_largest_differ_the_tile_is_halved(model, monkeypatch):
    tiles = []

    class Differing(programs.Programs):
        def __init__(self, blueprint, sizes, *args, **kwargs):
            super().__init__(blueprint, sizes, *args, **kwargs)
            tiles.append(sizes.tile)
            if sizes.tile > 4:
                off_by_a_bit(self.decodes[4])

    monkeypatch.setattr("gshardx.infer.programs.Programs", Differing)
    engine = model.engine(dataclasses.replace(SMALL, budget=12))  # 16 tokens in tiles of 8, 12 in tiles of 4
    assert engine.sizes.tile == 4
    assert engine.scheduler.budget == max(engine.programs.steps) == 12
    assert tiles == [8, 4]


@pytest.mark.parametrize("name", ["slots", "page_size", "tile"])
def test_sizes_that_cant_be_are_named(name):
    with pytest.raises(BadInput, match=f"{name} = 0: must be"):
        dataclasses.replace(EngineConfig(), **{name: 0})


def test_a_kernel_that_is_not_there_is_named(model):
    with pytest.raises(BadInput, match="no kernel of a cpu for float32 pages of 4 tokens and heads of 4; use xla"):
        model.engine(dataclasses.replace(SMALL, attention="pallas"))
