"""What a run says at its end."""

import pytest

from tests.train.processes import finish, start, start_training, write_inputs


@pytest.mark.slow
def test_a_run_that_can_not_decode_ends_well_says_why_and_is_not_served(tmp_path):
    place = write_inputs(tmp_path)
    flags = ("--model.moe.router", "expert_choice", "--model.moe.router_options", "{}", "--train.steps", "2")
    out, _ = finish(start_training(place, place / "run", *flags))
    assert "no sample   router expert_choice: experts choose among all tokens of a row, later ones too; so these" in out
    assert "gshardx.infer generate" not in out
    arguments = ("generate", "--run", str(place / "run"), "--prompt", "a", "--max_new_tokens", "2")
    _, err = finish(start(place, *arguments, module="gshardx.infer"), expected=2)
    assert err.startswith("error: model.moe.router = expert_choice can't decode")
    assert err.count("\n") == 1
