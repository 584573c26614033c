"""What one GPU makes of the MoE layer: measured ceilings, grouped matrix products, layers of public models' shapes.

    python benchmarks/gpu.py --output FILE --hf_python PYTHON_WITH_TORCH_AND_TRANSFORMERS
    python benchmarks/gpu.py --parts ceilings grouped --shapes Mixtral --tokens 4096
    python benchmarks/gpu.py --small    # on a CPU too: checks that the script runs, measures nothing

Everything is bf16. FLOPs are those of the experts and useful ones only: routing, padding and dropped choices count
nothing. Times are medians over rounds; a round is a loop of calls inside one compiled program.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_layers
import jax
import jax.numpy as jnp
from gpu_loop import Clock, Function, NotAvailable, Row, drawn
from gpu_shapes import LOADS, SHAPES, SMALL_SHAPES, SMALL_TOKENS, TOKENS, LayerShape, group_sizes
from timing import Table, cell

HERE = Path(__file__).resolve().parent
SMALL = "small shapes: checks that the script runs, measures nothing"
Cases = list[tuple[LayerShape, int]]


def main() -> int:
    args = parse()
    # While JAX holds none of the GPU's memory.
    others = transformers_results(args) if "layers" in args.parts else gpu_layers.Others("", [])
    if jax.default_backend() == "cpu" and not args.small:
        print("error: no GPU here; --small checks the script on a CPU", file=sys.stderr)
        return 2
    shapes = SMALL_SHAPES if args.small else SHAPES
    chosen = [shape for shape in shapes if any(name in shape.name for name in args.shapes)]
    cases = [(shape, tokens) for shape in chosen for tokens in (SMALL_TOKENS if args.small else args.tokens)]
    text = ""
    for table in tables(args, cases, others):
        text += "\n".join(table.markdown()) + "\n"
        print("\n".join(table.markdown()), flush=True)
        if args.output:
            args.output.write_text(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["ceilings", "grouped", "layers"], default=["grouped", "layers"])
    parser.add_argument("--shapes", nargs="+", default=[""], help="parts of their names; default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--iterations", type=int, default=10, help="calls a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hf_python", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the tables there, one after the other")
    parser.add_argument("--small", action="store_true", help=SMALL)
    args = parser.parse_args()
    if args.small:
        args.iterations, args.rounds = 2, 1
    return args


def tables(args: argparse.Namespace, cases: Cases, others: gpu_layers.Others) -> Iterator[Table]:
    yield device_table(args)
    clock = Clock(args.iterations, args.rounds)
    table, best = ceilings(clock, args.small)
    yield table
    clock = dataclasses.replace(clock, ceiling=best)
    if "grouped" in args.parts:
        yield grouped_products(clock, cases)
    if "layers" in args.parts:
        yield gpu_layers.table(clock, cases, others)


def device_table(args: argparse.Namespace) -> Table:
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    facts = {"device": device.device_kind, "memory GB": memory and memory / 1e9}
    facts |= {name: installed(name) for name in ("jax", "jaxlib", "tokamax", "gshardx")}
    small = [f"{device.platform.upper()}, {SMALL}"] if args.small else []
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    return Table("Device", [facts], [f"{datetime.date.today()}: `{command}`", *small])


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def ceilings(clock: Clock, small: bool) -> tuple[Table, float]:
    """The table, and the fastest matrix product in FLOP/s."""
    rows, best = [], 0.0
    for n in (256,) if small else (4096, 8192, 16384):
        seconds = clock.seconds(jnp.matmul, drawn((n, n)), drawn((n, n), n**-0.5, seed=1))
        best = max(best, 2 * n**3 / seconds)
        rows.append(
            {"what": f"[{n}, {n}] x [{n}, {n}]", "ms": 1e3 * seconds, "rate": rate(2 * n**3 / seconds, "FLOP/s")}
        )
    for size in (2**20,) if small else (2**28, 2**31):
        seconds = clock.seconds(jnp.negative, drawn((size // 2,)))
        rows.append({"what": f"copy of {size:,} bytes", "ms": 1e3 * seconds, "rate": rate(2 * size / seconds, "B/s")})
    notes = ["shares below are of the fastest matrix product", "a copy reads and writes: both count"]
    return Table("Measured ceilings, bf16", rows, notes), best


def rate(value: float, unit: str) -> str:
    return f"{cell(value / 1e12)} T{unit}" if value > 1e12 else f"{cell(value / 1e9)} G{unit}"


def grouped_products(clock: Clock, cases: Cases) -> Table:
    """Rows sorted by expert, each expert with its up projection; fwd+bwd has the gradients of rows and weights."""
    rows = [row for shape, tokens in cases for row in product_rows(clock, shape, tokens)]
    return Table("Grouped matrix products, [tokens k, m] x [e, m, h]", rows)


def product_rows(clock: Clock, shape: LayerShape, tokens: int) -> Iterator[Row]:
    n, flops = tokens * shape.top_k, shape.forward_flops(tokens) / 3
    x = drawn((n, shape.width))
    w = drawn((shape.experts, shape.width, shape.hidden), shape.width**-0.5, seed=1)
    for load, name in itertools.product(LOADS, PRODUCTS):
        if load == "even" or name != BATCHED:
            sizes = group_sizes(load, shape.experts, n)
            row = {"shape": shape.name, "rows": n, "load": load, "product": name}
            row["busiest / mean"] = float(sizes.max() / sizes.mean())
            yield row | clock.columns(PRODUCTS[name], flops, shape.backward, x, w, jnp.asarray(sizes))


def tokamax_product(implementation: str) -> Function:
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        if importlib.util.find_spec("tokamax") is None:
            raise NotAvailable("tokamax is not installed")
        import tokamax
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # tokamax would parse the command line, and refuse options that are not its own
        return tokamax.ragged_dot(x, w, sizes, implementation=implementation)

    return product


BATCHED = "batched matmul, even groups only"
PRODUCTS: dict[str, Function] = {
    BATCHED: lambda x, w, sizes: jnp.matmul(x.reshape(len(w), -1, w.shape[1]), w),
    "jax.lax.ragged_dot": jax.lax.ragged_dot,
    "tokamax, Triton": tokamax_product("triton"),
    "tokamax, Mosaic": tokamax_product("mosaic"),
}
"""Each raises what keeps it from running."""


def transformers_results(args: argparse.Namespace) -> gpu_layers.Others:
    """From a process of its own; without rows, the note says why."""
    command = [args.hf_python, str(HERE / "hf_experts.py"), "--rounds", str(args.rounds)]
    command += ["--iterations", str(args.iterations), *(["--small"] if args.small else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return gpu_layers.Others(f"transformers grouped_mm: not measured: {reason}", [])
    found = json.loads(done.stdout.splitlines()[-1])
    note = f"transformers grouped_mm: {found['versions']}, eager, so launches count"
    return gpu_layers.Others(note, found["rows"])


if __name__ == "__main__":
    sys.exit(main())
