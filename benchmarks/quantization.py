"""What fewer bits cost a trained model: KL divergence from its own predictions, and how often the best token stays.

    python benchmarks/quantization.py --run runs/quickstart

Teacher-forced over text that the run was not trained on, through the paged cache that serves. KL is the mean over
tokens of the divergence of the other distribution from the full model's, in nats.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Table

from gshardx.data.faults import Faults
from gshardx.data.sources import open_sources
from gshardx.infer.exchange import choose_exchange
from gshardx.infer.load import LoadedRun, load_run
from gshardx.infer.program import abstract_state
from gshardx.infer.quantize import quantize
from gshardx.infer.settings import EngineConfig
from gshardx.infer.weights import separate
from gshardx.layers import Paged
from gshardx.sharding import MeshConfig, simulate_devices

SEQUENCE = 256
WAYS: dict[str, dict[str, str]] = {
    "bfloat16 weights": {"weights": "bfloat16"},
    "int8 weights": {"weights": "int8"},
    "int4 weights": {"weights": "int4"},
    "int8 keys and values": {"kv_dtype": "int8"},
    "int8 weights, keys and values": {"weights": "int8", "kv_dtype": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of gshardx.train")
    parser.add_argument("--sequences", type=int, default=32, help=f"of {SEQUENCE} tokens (default 32)")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    simulate_devices(1)
    run = load_run(args.run, MeshConfig())
    documents = open_sources(run.config.data, Faults()).held_out_documents(Faults()).documents
    tokens = np.concatenate(documents)[: args.sequences * SEQUENCE].reshape(-1, SEQUENCE)
    full, whole = scores(run, tokens), weight_bytes(run, None)
    rows = []
    for name, options in WAYS.items():
        other = scores(run, tokens, **options)
        p = np.exp(full)
        rows.append(
            {
                "stored": name,
                "KL, nats": float((p * (full - other)).sum(-1).mean()),
                "same best token, %": 100 * float((full.argmax(-1) == other.argmax(-1)).mean()),
                "bytes of weights": weight_bytes(run, options.get("weights")) / whole,
            }
        )
    print("\n".join(Table(f"Fewer bits, {tokens.size:,} tokens of step {run.step}", rows).markdown()))


def scores(run: LoadedRun, tokens: np.ndarray, weights: str | None = None, kv_dtype: str | None = None) -> np.ndarray:
    """Log-probabilities of every next token, fp32 ``[n, t, v]``."""
    plan, variables = separate(run.blueprint, run.variables, run.mesh, choose_exchange(run.config.model, run.mesh, 1))
    if weights is not None:
        plan, variables = quantize(plan, variables, weights)
    sizes = EngineConfig(slots=1, max_length=SEQUENCE, kv_dtype=kv_dtype).sizes(run.mesh)
    pages = jnp.arange(1, 1 + sizes.table, dtype=jnp.int32)[None, None]
    at = jnp.arange(SEQUENCE, dtype=jnp.int32)[None]

    @jax.jit
    def forward(variables: Any, k: Any, v: Any, tokens: jax.Array) -> jax.Array:
        model = plan.bind(variables.params)
        memory = Paged(k, v, pages, jnp.zeros_like(at), at, jnp.int32(sizes.table))
        hidden, _, _ = model.hidden(tokens, at, at >= 0, memory, None, variables.router)
        return jax.nn.log_softmax(model.logits(hidden)[0])

    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state(plan, sizes, run.mesh))
    with jax.set_mesh(run.mesh):
        return np.stack([np.asarray(forward(variables, state.k, state.v, row[None])) for row in tokens])


def weight_bytes(run: LoadedRun, weights: str | None) -> int:
    plan, variables = separate(run.blueprint, run.variables, run.mesh, choose_exchange(run.config.model, run.mesh, 1))
    if weights is not None:
        _, variables = quantize(plan, variables, weights)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variables.params))


if __name__ == "__main__":
    main()
