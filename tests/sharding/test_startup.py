"""What commands settle before JAX starts, seen from real processes."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, jax
from gshardx.sharding.startup import keep_compiled, without_an_absent_tpu
without_an_absent_tpu()
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.jit(lambda x: x * 2 + 1)(1.0)
print(json.dumps([jax.config.jax_platforms, jax.config.jax_compilation_cache_dir]))
"""
JAX_SETTINGS = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


FAULTS = """
import ctypes, resource, jax
from gshardx.sharding.startup import keep_memory
keep_memory()
step = jax.jit(lambda x: x + 1)
x = jax.numpy.ones(10_000_000)
for number in range(50):
    if number == 40:  # glibc has found blocks for all by then
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def run(tmp_path, **more):
    env = {key: value for key, value in os.environ.items() if key not in JAX_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=env | {"XDG_CACHE_HOME": str(tmp_path)} | more,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    platforms, folder = json.loads(done.stdout.splitlines()[-1])
    return platforms, folder, done.stderr


def test_programs_are_kept_in_a_folder_of_this_kind_of_machine_and_nothing_is_printed(tmp_path):
    _, folder, errors = run(tmp_path)
    assert folder.startswith(str(tmp_path / "gshardx" / "xla"))
    assert any(name.startswith("jit__lambda") for name in os.listdir(folder))
    assert errors == ""


@pytest.mark.parametrize("platforms", ["cpu"])
def test_jaxs_own_settings_come_first(tmp_path, platforms):
    kept = tmp_path / "mine"
    chosen, folder, _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(kept), JAX_PLATFORMS=platforms)
    assert (chosen, folder) == (platforms, str(kept))
    assert os.listdir(kept)
    assert not (tmp_path / "gshardx").exists()


@pytest.mark.slow
def test_a_step_on_a_cpu_finds_the_memory_of_the_last_one(tmp_path):
    """A step's 40 MB are 9,766 pages; where the user has told glibc something, they are new each time."""
    faults = {}
    for name, more in (("kept", {}), ("told", {"MALLOC_PERTURB_": "0"})):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | more
        done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
        faults[name] = float(done.stdout)
    assert faults["told"] > 9_700
    assert faults["kept"] < 2_500
