"""Small trees of arrays on eight devices, and runs that have saved some."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.checkpoint.store import CheckpointStore
from gshardx.sharding import MeshConfig, build_mesh


def tree(mesh_config=None, scale=1.0):
    mesh = build_mesh(mesh_config or MeshConfig(expert=8))
    split = NamedSharding(mesh, PartitionSpec(("data", "expert")))
    whole = NamedSharding(mesh, PartitionSpec())
    return {
        "params": {
            "w": jax.device_put(jnp.arange(64.0).reshape(16, 4) * scale, split),
            "norm": {"scale": jax.device_put(jnp.arange(5.0) * scale, whole)},
        },
        "rng": {"key": jax.device_put(jnp.asarray([7, 9], jnp.uint32), whole)},
    }


def abstract(items):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), items)


def saved(folder, steps=(2, 4)):
    store = CheckpointStore(folder, every=2, keep=3, extra={"fact": 1})
    for step in steps:
        store.save(step, tree(scale=step))
    store.close()
    return folder


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
