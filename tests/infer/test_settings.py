"""Sizes of an engine, and the programs that a budget leaves."""

import pytest

from gshardx.errors import BadInput
from gshardx.infer.settings import SCORES, EngineConfig


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 33, 64, 100, 256, 1000])
@pytest.mark.parametrize("programs", [1, 4, 5, 9, 20])
def test_any_number_of_rows_has_a_program_and_there_are_no_more_than_were_asked_for(slots, programs):
    config = EngineConfig(slots=slots, programs=programs)
    rows = config.row_buckets()
    assert rows[-1] == max(2, slots)
    assert rows == sorted(set(rows))
    assert rows[0] == 2 or programs < 5 or slots > 2
    assert len(rows) + len(config.token_buckets()) + 1 <= max(programs, 4)


def test_a_lone_sequence_has_a_program_of_its_own_size():
    assert EngineConfig(slots=256).row_buckets() == [2, 4, 16, 32, 128, 256]
    assert EngineConfig(slots=32).row_buckets() == [2, 4, 8, 16, 32]


def test_places_to_draw_are_whole_tiles():
    assert EngineConfig(slots=32).samples() == 32 + SCORES
    assert EngineConfig(slots=33).samples() == 64 + SCORES
    assert EngineConfig(slots=3, drafts="prompt_lookup", draft_depth=4).samples() == 32 + SCORES


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tile": 1}, "use 2 or more"),
        ({"weights": "int3"}, "weights = int3: must be one of bfloat16, int8, int4"),
        ({"drafts": "eagle"}, "drafts = eagle: must be one of prompt_lookup, fewer_experts"),
        ({"kv_dtype": "fp8"}, "kv_dtype = fp8"),
        ({"programs": 0}, "programs = 0"),
    ],
)
def test_what_cant_be_is_told(given, told):
    with pytest.raises(BadInput, match=told):
        EngineConfig(**given)
