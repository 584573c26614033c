"""What transformers wrote and computed (tests/oracles/public), on a machine without it: read, run, and written back."""

import filecmp
from pathlib import Path

import numpy as np
import pytest

from gshardx.convert.families import FAMILIES
from gshardx.convert.incoming import convert_in
from gshardx.convert.model import Model
from gshardx.convert.outgoing import convert_out
from gshardx.data.tokenizer import build_tokenizer
from gshardx.infer.engine import Engine
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.settings import EngineConfig
from gshardx.sharding import MeshConfig
from tests.infer.answers import answered

PUBLIC = Path(__file__).parent.parent / "oracles" / "public"
NAMES = sorted(path.name for path in PUBLIC.iterdir() if path.is_dir())
WITH_EXPERTS = [name for name in NAMES if name not in ("llama", "qwen3")]
ON_EIGHT = {True: MeshConfig(data=2, expert=2, tensor=2), False: MeshConfig(data=2, fsdp=2, tensor=2)}
SLOW = ("mixtral", "deepseek_v3", "gpt_oss")
"""Of the families, those that `make test` decodes."""
first = [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in NAMES]


def expected(name):
    with np.load(PUBLIC / name / "expected.npz") as arrays:
        return dict(arrays)


def check_logits(model, wanted, repeats=1):
    """``repeats`` of the rows, where a mesh wants more of them."""
    logits, metrics = model(np.tile(wanted["tokens"], (repeats, 1)))
    logits, experts = np.asarray(logits)[-2:], np.asarray(metrics.experts)[:, -2:]
    scale = np.abs(wanted["logits"]).max()
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4 * scale, rtol=0)
    if "experts" in wanted:
        np.testing.assert_array_equal(np.sort(experts, axis=-1), wanted["experts"])


def test_there_is_a_fixture_for_each_family():
    assert sorted(FAMILIES) == NAMES


@pytest.mark.parametrize("name", first)
def test_logits_and_experts_are_those_of_transformers(name):
    check_logits(Model.from_pretrained(PUBLIC / name, dtype="float32"), expected(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_eight_devices_too(name):
    mesh = ON_EIGHT[name in WITH_EXPERTS]
    check_logits(Model.from_pretrained(PUBLIC / name, mesh, dtype="float32"), expected(name), repeats=4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.sweep) for name in NAMES]
)
def test_sixty_four_greedy_tokens_come_from_the_pages_as_from_transformers(name):
    model, wanted = Model.from_pretrained(PUBLIC / name, dtype="float32"), expected(name)
    config = EngineConfig(slots=2, max_length=80, page_size=8, budget=16, tile=8, steps=8)
    engine = Engine(model.plan, model.variables, model.mesh, build_tokenizer("bytes", 0, []), config)
    params = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_end=True)
    answers = answered(engine, [Request("0", wanted["tokens"][0], params)])
    assert answers["0", 0].tokens == wanted["greedy"].tolist()


@pytest.mark.parametrize("name", first)
def test_the_way_back_ends_in_the_same_bytes(name, tmp_path):
    said = []
    convert_in(PUBLIC / name, tmp_path / "run", None, said.append)
    assert "no tokenizer.json" in said[0]
    convert_out(tmp_path / "run", tmp_path / "back", say=said.append)
    files = sorted(path.name for path in (PUBLIC / name).iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == files
    same, differ, failed = filecmp.cmpfiles(PUBLIC / name, tmp_path / "back", files, shallow=False)
    assert (sorted(same), differ, failed) == (files, [], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "run"]


def test_a_model_is_saved_from_its_mesh(tmp_path):
    model = Model.from_pretrained(PUBLIC / "granitemoe", MeshConfig(expert=2, fsdp=2, tensor=2), dtype="float32")
    model.save_pretrained(tmp_path / "saved", dtype="bfloat16", largest=1_000)
    again = Model.from_pretrained(tmp_path / "saved", dtype="float32")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    for one, other in zip(_leaves(model), _leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def _leaves(model):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.variables.params)]
