"""gshardx: sharded Mixture-of-Experts models in JAX, in GShard's manner."""

__version__ = "0.1.0"
