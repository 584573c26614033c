"""The step that is compiled: its inputs are as large as real arrays, and a compiler's refusal is understood."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gshardx.errors import BadInput
from gshardx.models import decode
from gshardx.plan import program
from gshardx.plan.program import TooLarge, compile_program, model_on, too_large, vocabulary
from gshardx.sharding import CompiledStep, MeshConfig, build_mesh, bytes_per_device
from gshardx.train.job import Job
from tests.children import environment
from tests.plan.tiny import MESH, SERVING, config, planned

GIB = 2**30


def held(tree):
    """Bytes that the first device holds of real arrays."""
    shards = (shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_inputs_are_as_large_as_a_real_state(stage):
    mesh, chosen = build_mesh(MESH), config(train={"zero_stage": stage})
    inputs = program._inputs(chosen, model_on(chosen, mesh), mesh, "train", SERVING)
    state = Job.of(chosen, vocabulary(chosen), mesh).init_state()
    assert inputs.bytes_per_device() == {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "kv_cache": 0,
    }
    assert bytes_per_device(state.params) == held(state.params)


def test_the_cache_is_as_large_as_a_real_one():
    mesh, chosen = build_mesh(MESH), config()
    plan = model_on(chosen, mesh)
    abstract = decode.abstract_state(plan, SERVING.rows, SERVING.length, mesh)
    cache = [jnp.zeros(a.shape, a.dtype, device=a.sharding) for a in (abstract.k, abstract.v)]
    found = program._inputs(chosen, plan, mesh, "decode", SERVING).bytes_per_device()
    assert found["kv_cache"] == held(cache) == 2 * 2 * 32 * 2 * 8 * 4  # k and v, layers, length, heads, width, fp32
    assert found["optimizer"] == 0


def test_zero_stages_share_out_the_gradients():
    mesh = build_mesh(MeshConfig(fsdp=8))
    found = {}
    for stage in (1, 2, 3):
        chosen = config(MeshConfig(fsdp=8), train={"zero_stage": stage})
        inputs = program._inputs(chosen, model_on(chosen, mesh), mesh, "train", SERVING)
        held = (inputs.parameters, inputs.gradients, inputs.optimizer)
        found[stage] = tuple(map(bytes_per_device, held))
    assert found[1][:2] == (found[1][0], found[1][0])
    assert found[2][:2] == (found[1][0], found[3][0])
    assert found[3][:2] == (found[3][0], found[3][0])
    assert found[1][0] > 7 * found[3][0]
    assert found[1][2] == found[2][2] == found[3][2]


@pytest.mark.slow
def test_lower_stages_are_compiled_as_such():
    assert planned(zero_stage=1)[0].memory["parameters"] > 1.9 * planned()[0].memory["parameters"]


@pytest.mark.parametrize("step", ["train", "forward", "prefill", "decode"])
def test_every_step_is_that_of_its_name(step):
    assert planned(step)[1].step.name == planned(step)[0].step == step


def test_a_refusal_for_another_reason_is_an_error_and_the_compilers_log_is_not_lost(monkeypatch, capfd):
    def refuse(*_):
        os.write(2, b"E0000 of the compiler\n")
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem (20M, of 16M).")

    monkeypatch.setattr(program, "_compile", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_program(config(), build_mesh(MESH), "train", SERVING, GIB)
    assert "E0000 of the compiler" in capfd.readouterr().err


def test_a_refusal_for_memory_is_a_finding(monkeypatch):
    def refuse(*_):
        os.write(2, b"E0000 of the compiler\n")
        raise jax.errors.JaxRuntimeError(REFUSALS[0])

    monkeypatch.setattr(program, "_compile", refuse)
    compiled = compile_program(config(), build_mesh(MESH), "train", SERVING, GIB)
    assert compiled.step == TooLarge(32 * GIB)
    assert compiled.log == "E0000 of the compiler\n"


REFUSALS = [
    # libtpu 0.0.42
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds "
    "available HBM (15.75G).",
    # libtpu 0.0.50
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (32.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details.",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32.00G of 15.75G hbm. Exceeded hbm capacity by "
    "16.25G.",
]


@pytest.mark.parametrize("message", REFUSALS)
def test_what_xla_says_when_memory_is_short(message):
    assert too_large(message) == TooLarge(32 * GIB)


def test_units_of_memory():
    said = "the total memory required for HLO temporaries (1.50T) exceeds available HBM (512.00M)"
    assert too_large(said) == TooLarge(int(1.5 * 2**40))


@pytest.mark.sweep
def test_a_step_too_large_for_a_real_compiler():
    """Logits of 64 sequences of 8,192 tokens are 62 GiB, half of that in bfloat16, more than a v5e has at once."""
    script = """
from gshardx.config import *
from gshardx.plan.program import Serving
from gshardx.plan.report import make_plan
from gshardx.plan.topology import open_topology, prepare
prepare("v5e:1x1")
moe = MoEConfig(every=1, hidden=32, group_size=64)
model = ModelConfig(layers=1, width=16, heads=2, head_dim=8, hidden=32, moe=moe)
config = Config(
    model=model, data=DataConfig(vocab_size=32000, sequence_length=8192), train=TrainConfig(batch_size=64)
)
plan, _ = make_plan(config, open_topology("v5e:1x1"), "forward", Serving(1, 1))
print(plan.fits, plan.memory["peak"], plan.hbm_bytes, plan.predicted_step_seconds)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fits, peak, there, seconds = done.stdout.split()
    assert (fits, seconds) == ("False", "None")
    assert int(peak) > 31 * GIB > int(there)


def test_vocabulary_without_reading_text():
    assert vocabulary(config()) == 257
    assert vocabulary(config(data={"tokenizer": "bpe", "vocab_size": 300})) == 300
    with pytest.raises(BadInput, match=r"absent\.json"):
        vocabulary(config(data={"tokenizer": "absent.json"}))


def test_the_compilers_log_is_kept_from_the_terminal(capfd):
    with program._captured_log() as log:
        os.write(2, b"from below\n")
        print("from Python", file=sys.__stderr__)
    os.write(2, b"afterwards\n")
    assert "from below" in log()
    assert capfd.readouterr().err == "afterwards\n"


def test_a_real_step_comes_out():
    compiled = planned("forward")[1]
    assert isinstance(compiled.step, CompiledStep)
    assert compiled.step.hlo_instructions > 100


def test_what_the_partitioner_gives_up_on_is_in_the_log():
    """As the command has it: JAX lets XLA write warnings, and settles that when it is imported."""
    script = """
import gshardx.plan.__main__
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from gshardx.plan import program
from gshardx.plan.report import complaints
from gshardx.sharding import CompiledStep, MeshConfig, abstract_array, build_mesh, simulate_devices
simulate_devices(8)
mesh = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
def moved(x):
    x = jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec("data", None))
    return jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec(None, ("expert", "tensor")))
with program._captured_log() as log:
    CompiledStep(moved, (abstract_array((16, 16), jnp.float32, ("time", "model"), mesh),), mesh)
print(len(complaints(log())))
"""
    settings = ("XLA_", "JAX_", "TF_CPP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
    assert done.stderr == ""
