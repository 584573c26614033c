"""The server on this machine's CPU: what it adds to its engine, and how it does beside FastAPI and llama.cpp's server.

    python benchmarks/serve_cpu.py --llama_python PYTHON      # one table, then the goals
    python benchmarks/serve_cpu.py --small --seconds 1        # whether it runs; measures nothing

The model "mixtral" of decode_cpu.py: random weights, greedy, fp32. What is compared is measured in turns; a ratio is
the median of those within a round. Server, client and engine are processes that share the cores, so that a client's
work slows a server down: it is said beside. The engine alone is ``Engine.run()`` on the same prompts, as tokens, at the
server's sizes. Closed loops are serve_client.py's, open ones those of ``python -m gshardx.infer bench``.
"""

import argparse
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from report import Machine, NotMeasured
from serve_processes import Serving, closed_loop, failed, running, serving
from serve_rows import LLAMA, Alone, Bench, Found, Sizes, bodies, restarts, short_requests, streaming, under_load
from timing import Table

HERE = Path(__file__).resolve().parent
SMALL = Sizes(slots=4, length=64, prompt=8, new=16, short=8, streams=(4,), connections=(1, 2), busy=8)
SAID = "the river ran under the old bridge and"
F32 = 0
"""A type of ggml's."""
INSTALL = "pip install 'llama-cpp-python[server]' gguf, there or in --llama_python PYTHON"


def main() -> int:
    args = parse()
    machine, begun = Machine(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SMALL if args.small else Sizes(), Path(folder), args.seconds, args.rounds)
        subprocess.run(bench.child("make", bench.run, *["--small"] * args.small), check=True)
        found = list(measured(bench, args.llama_python))
    table = Table(
        title(bench), [row for one in found for row in one.rows], [note for one in found for note in one.notes]
    )
    text = "\n".join([*table.markdown(), *(f"- {line}" for one in found for line in one.goals)])
    tiny = "a tiny model, so that this measures nothing; " if args.small else ""
    text += f"\n\n{tiny}{machine}; {time.monotonic() - begun:.0f} s in all"
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="about, of each measurement")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each has its turn")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see whether all of it runs")
    parser.add_argument("--llama_python", default=sys.executable, metavar="PYTHON",
                        help="has llama-cpp-python[server] and gguf")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there what is printed, too")
    return parser.parse_args()


def title(bench: Bench) -> str:
    sizes = bench.sizes
    return (
        f"Serving: {sizes.slots} sequences at once; streams of {sizes.prompt} + {sizes.new} tokens, "
        f"{sizes.prompt} + {sizes.short} under load"
    )


def measured(bench: Bench, llama_python: str) -> Iterator[Found]:
    engine = bench.child("engine", bench.run, bench.sizes.slots, bench.sizes.length)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(bench.server(0))
        with running(engine, bench.log("engine")) as process:
            alone = Alone(process, bench.log("engine"))
            yield unless_it_fails("streams", lambda: streaming(bench, server, alone))
            told = alone.answer([SAID], bench.sizes.short, 1)["text"]
        yield unless_it_fails("short requests", lambda: short_requests(bench, server))
        llama, note = None, ""
        try:
            llama = stack.enter_context(llama_server(bench, llama_python))
            note = alike(bench, llama, told)
        except NotMeasured as reason:
            note = f"{LLAMA}: not measured: {reason}"
        yield unless_it_fails("load", lambda: under_load(bench, server, llama, note))
        if llama is not None:
            llama.process.kill()
        yield unless_it_fails("restart", lambda: restarts(bench, server))


def unless_it_fails(what: str, measure: Callable[[], Found]) -> Found:
    """Or why there is nothing, as a note."""
    begun = time.monotonic()
    try:
        return measure()
    except NotMeasured as reason:
        return Found([], [], [f"{what}: not measured: {reason}"])
    finally:
        print(f"{what}: done in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def llama_server(bench: Bench, python: str) -> Iterator[Serving]:
    """llama-cpp-python's, with the same weights, all in fp32.

    Raises:
        NotMeasured: it is not installed, or does not start.
    """
    try:
        subprocess.run([python, "-c", "import gguf, llama_cpp.server.app"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotMeasured(INSTALL) from error
    path, log = bench.folder / "random.gguf", bench.log("llama")
    with running([python, str(HERE / "llama_cpp_export.py"), str(bench.run), str(path)], log) as process:
        if process.wait():
            raise failed(log)
    port = free_port()
    flags = {
        "model": path, "port": port, "n_ctx": bench.sizes.length, "n_threads": 2, "n_threads_batch": 2,
        "type_k": F32, "type_v": F32, "interrupt_requests": False, "verbose": False,
    }  # fmt: skip
    with serving(
        [python, "-m", "llama_cpp.server", *(f"--{name}={one}" for name, one in flags.items())], log, port
    ) as one:
        yield one


def alike(bench: Bench, llama: Serving, told: str) -> str:
    """Whether both say the same, for a start."""
    asked = bodies([SAID], bench.sizes.short)
    heard = json.loads(closed_loop(llama, "/v1/completions", asked, 1)["body"])["choices"][0]["text"]
    same = len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(told, heard, strict=False))))
    return (
        f"{LLAMA}: the same weights; of the {len(told)} characters that gshardx writes after {SAID!r} the first {same} "
        "are the same. It computes one request at a time, others wait"
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
