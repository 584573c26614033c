"""The search: every candidate is valid, the best few are compiled, the winner fits and the reason names the part."""

import dataclasses
import itertools
import json
import math

import jax
import pytest

from gshardx.plan import search as module
from gshardx.plan.estimate import can_lie_on
from gshardx.plan.report import Plan
from gshardx.plan.roofline import Roofline
from gshardx.plan.search import candidates, meshes, search
from gshardx.sharding import MeshConfig, build_mesh
from tests.plan.tiny import config, topology

CONFIG = config(MeshConfig(expert=8), data={"tokenizer": "bpe", "vocab_size": 512})


@pytest.mark.parametrize("devices", [1, 6, 8, 12, 2048])
def test_every_mesh_once(devices):
    found = list(meshes(devices))
    assert len(set(found)) == len(found)
    assert {mesh.size for mesh in found} == {devices}
    # Ordered products of four factors: for each prime power p^n, C(n + 3, 3) ways.
    powers = {1: [], 6: [1, 1], 8: [3], 12: [2, 1], 2048: [11]}[devices]
    assert len(found) == math.prod(math.comb(power + 3, 3) for power in powers)


def test_candidates_are_valid_and_different():
    found = list(candidates(CONFIG, topology()))
    assert len({candidate.flags for candidate in found}) == len(found) > 100
    assert {candidate.config.model.remat for candidate in found} == {"none", "dots", "keep_all_to_all", "full"}
    assert {candidate.config.model.moe.capacity_factor for candidate in found} == {1.0, 1.25, 2.0}
    for candidate in found:
        assert can_lie_on(candidate.config, topology())
        assert build_mesh(candidate.config.mesh).size == 8
        train = candidate.config.train
        rows = candidate.microbatch * candidate.config.mesh.batch_shards * train.accumulation_steps
        assert rows == train.batch_size
    same = [candidate for candidate in found if candidate.learns_the_same]
    assert {(c.config.train.batch_size, c.config.model.moe.capacity_factor) for c in same} == {(8, 1.25)}
    assert {candidate.config.train.accumulation_steps for candidate in same} == {
        1,
        2,
    }  # a batch of 8, on 4 shards or more
    assert len(same) * 4 < len(found)


def test_a_dropless_config_stays_dropless():
    dropless = config(MeshConfig(expert=8), moe={"capacity_factor": None, "dispatcher": "auto"})
    found = list(candidates(dropless, topology()))
    assert {candidate.config.model.moe.capacity_factor for candidate in found} == {None}
    assert "capacity_factor null" in found[0].flags


def plan_of(candidate, there, seconds, peak):
    """What compiling might have found."""
    line = Roofline(compute=seconds / 4, memory=seconds / 2, device=seconds / 2, interconnect=seconds / 2)
    tokens = candidate.estimate.tokens
    fits = peak <= there.chip.hbm_bytes
    plan = Plan("cpu:8", "cpu", 8, 8, {}, "train", fits, int(there.chip.hbm_bytes), 1, 1, 1, {"peak": peak}, tokens)
    return dataclasses.replace(plan, roofline=line)


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for compiling: ``answers(number, candidate's config)`` gives seconds and peak bytes of each."""
    calls = []

    def use(answers):
        def make_plan(config, there, step, serving):
            assert step == "train"
            candidate = next(c for c in candidates(config, there) if c.config == config)
            calls.append(candidate)
            return plan_of(candidate, there, *answers(len(calls) - 1, candidate)), None

        monkeypatch.setattr(module, "make_plan", make_plan)
        return calls

    return use


def test_the_best_by_estimate_are_compiled_and_the_fastest_that_fits_wins(compiler):
    calls = compiler(lambda number, _: ([4.0, 3.0, 1.0, 2.0, 9.0][number], [100, 100, 2**40, 100, 100][number]))
    found = search(CONFIG, topology())
    ranked = sorted(
        (c for c in candidates(CONFIG, topology()) if c.learns_the_same), key=lambda c: -c.estimate.tokens_per_second
    )
    assert [call.flags for call in calls[:4]] == [candidate.flags for candidate in ranked[:3]] + [calls[3].flags]
    assert found.other[0].flags == calls[4].flags
    assert not found.other[0].learns_the_same
    winner, plan = found.winner
    assert winner.flags == calls[3].flags
    assert (plan.fits, plan.roofline.step) == (True, 2.0)
    assert len(found.plans) == 4
    assert found.considered > len(found.candidates) >= 4


def test_what_needs_more_than_one_that_did_not_fit_is_passed_over(compiler):
    limit = 2**29
    calls = compiler(lambda number, candidate: (1.0, 2**40 if number < 6 else limit))
    found = search(CONFIG, topology())
    peaks = [candidate.estimate.peak for candidate in calls[:7]]
    assert all(later < earlier for earlier, later in itertools.pairwise(peaks))
    assert found.winner[0].flags == calls[6].flags
    assert len(found.plans) == 7  # more than four, because none of those fitted


def test_a_candidate_that_breaks_the_compiler_is_passed_over(compiler, capsys):
    def answer(number, _):
        if number == 0:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nin a file")
        return 1.0, 1

    calls = compiler(answer)
    found = search(CONFIG, topology())
    assert [candidate.flags for candidate, _ in found.plans] == [call.flags for call in calls[1:5]]
    assert capsys.readouterr().err == "passed over, the compiler failed: INTERNAL: RET_CHECK failure\n"


def test_nothing_fits(compiler):
    calls = compiler(lambda number, candidate: (1.0, 2**40))
    found = search(CONFIG, topology())
    assert found.winner is None
    assert 0 < len(found.plans) <= 12
    assert found.other is None
    assert len(calls) <= 12 + 2
    assert str(found).endswith("nothing fits: use more devices, or a smaller batch or model")
    assert json.loads(json.dumps(found.as_json()))["winner"] is None


def test_estimates_that_do_not_fit_are_not_compiled(compiler):
    calls = compiler(lambda number, candidate: (1.0, 1))
    found = search(CONFIG, topology(hbm_bytes=1000))
    assert (calls, found.candidates, found.winner) == ([], [], None)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"compute": 0.1}, "largest difference is computing, 500.000 ms less"),
        ({"memory": 0.2}, "largest difference is memory traffic, 800.000 ms less"),
        ({"interconnect": 0.1}, "largest difference is sending, 400.000 ms less"),
    ],
)
def test_the_reason_names_the_part(compiler, part, told):
    slower = Roofline(compute=0.6, memory=1.0, device=1.0, interconnect=0.5)
    faster = dataclasses.replace(slower, device=0.3, **part)
    compiler(lambda number, _: (1.0, 1))
    found = search(CONFIG, topology())
    lines = [faster, slower, slower, slower]
    plans = [(c, dataclasses.replace(p, roofline=line)) for (c, p), line in zip(found.plans, lines, strict=True)]
    reason = dataclasses.replace(found, plans=plans).reason()
    assert told in reason
    assert reason.startswith(f"best: {plans[0][0].flags}\n")
    assert f"it is bound by {faster.bound}" in reason


def test_the_text_and_the_json_say_the_same(compiler):
    calls = compiler(lambda number, _: (4.0 - number if number < 4 else 9.0, 1))
    said = []
    found = search(CONFIG, topology(), say=said.append)
    facts = json.loads(json.dumps(found.as_json()))
    assert said == [f"compiling {candidate.flags}" for candidate in calls]
    assert facts["winner"] == calls[3].flags
    *same, other = calls
    assert [one["flags"] for one in facts["compiled"]] == [candidate.flags for candidate in same]
    assert facts["other"]["flags"] == other.flags
    assert not found.other[0].learns_the_same
    assert all(candidate.learns_the_same for candidate, _ in found.plans)
    assert facts["because"] in str(found)
    assert facts["fitting"] == len(found.candidates)
    for candidate in calls:
        assert candidate.flags in str(found)
    assert "it learns otherwise" in str(found)


@pytest.mark.sweep
def test_a_real_search():
    found = search(config(MeshConfig(expert=8), train={"batch_size": 64}), topology())
    assert found.winner is not None
    candidate, plan = found.winner
    fitting = [plan.tokens_per_second for _, plan in found.plans if plan.fits]
    assert plan.tokens_per_second == max(fitting)
    assert plan.mesh == candidate.config.mesh.shape
    assert plan.mesh["tensor"] == 1  # 257 tokens of the vocabulary
    assert candidate.flags in str(found)
