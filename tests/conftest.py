"""Eight simulated devices for every test, and how they compile, set here and nowhere else, before JAX starts."""

import gc
import os
from pathlib import Path

MAPS = Path("/proc/self/maps")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from gshardx.sharding import simulate_devices  # noqa: E402
from tests.children import QUICK_TO_COMPILE  # noqa: E402

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
simulate_devices(8)
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
# Tracing makes millions of objects that are no garbage; looking for it is a twentieth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Linux gives a process 65,530 memory maps (vm.max_map_count), a compiled program takes some ten, and at the limit
    XLA's compiler dies of a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def settings_given_back():
    """For commands that set variables and JAX's own settings for the whole process."""
    before = dict(os.environ)
    kept = {name: getattr(jax.config, name) for name in ("jax_enable_compilation_cache", "jax_platforms")}
    yield
    os.environ.clear()
    os.environ.update(before)
    for name, value in kept.items():
        jax.config.update(name, value)
