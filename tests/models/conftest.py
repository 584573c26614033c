"""A compiler whose log is seen."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

INVOLUNTARY = "Involuntary full rematerialization"  # the partitioner gives up and gives every device everything


@pytest.fixture
def compiling_anew():
    """Without the persistent cache: the compiler writes its log only while it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
