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
