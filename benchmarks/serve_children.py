"""What benchmarks/serve_cpu.py measures the server beside, each a process of its own; needs gshardx[serve].

python benchmarks/serve_children.py make FOLDER [--small]      # a run with random weights, and weights.npz
python benchmarks/serve_children.py engine RUN SLOTS LENGTH    # its engine without a server
python benchmarks/serve_children.py bare ANSWERS               # a FastAPI app that returns known bytes
"""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
import jax
import numpy as np
from gshardx_decode import model_config
from shape import MIXTRAL, Shape

from gshardx.checkpoint.store import CheckpointStore
from gshardx.config import Config
from gshardx.data.tokenizer import train_bpe
from gshardx.infer.engine import Engine
from gshardx.infer.load import load_run
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.settings import EngineConfig
from gshardx.infer.traffic import WORDS
from gshardx.models.build import Variables, blueprint
from gshardx.models.items import items_of
from gshardx.sharding import MeshConfig, build_mesh, simulate_devices
from gshardx.sharding.startup import keep_compiled, keep_memory
from gshardx.train.run_dir import RunDir

SMALL = Shape("small", experts=2, top_k=1, expert_hidden=16, layers=1, width=16, heads=2, kv_heads=1, head_dim=8)


def make(folder: Path, shape: Shape) -> None:
    """A run as training leaves it, at step 0, whose tokenizer has a token for each word that a load generator sends."""
    folder.mkdir(parents=True)
    run, config = RunDir(folder), Config(model=model_config(shape))
    tokenizer = train_bpe(shape.vocab, [" ".join(["", *WORDS]) for _ in range(100)] + [" ".join(map(str, range(9999)))])
    assert tokenizer.vocab_size == shape.vocab
    plan = blueprint(config.model, shape.vocab, build_mesh(MeshConfig()))
    variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
    run.write_config(config)
    store = CheckpointStore(run.checkpoints, 1, 1, {"tokenizer": run.keep_tokenizer(tokenizer)})
    store.save(0, items_of(variables))
    store.close()
    flat = jax.tree_util.tree_flatten_with_path(variables.params)[0]
    np.savez(
        folder / "weights.npz",
        **{".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in flat},
    )


def engine(run_dir: Path, slots: int, length: int) -> None:
    """Of each line with prompts say how long their answers took, in waves of so many, once the prompts were tokens."""
    keep_memory()
    run = load_run(run_dir, MeshConfig())
    made = Engine(run.blueprint, run.variables, run.mesh, run.tokenizer, EngineConfig(slots=slots, max_length=length))
    print("ready", flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        prompts = [run.tokenizer.encode(text) for text in load["prompts"]]
        params = SamplingParams(max_new_tokens=load["max_tokens"], temperature=0.0, ignore_end=True)
        drawn, host, begun = made.stats.drawn_tokens, time.thread_time(), time.perf_counter()
        text = []
        for first in range(0, len(prompts), load["wave"]):
            for number, prompt in enumerate(prompts[first : first + load["wave"]]):
                made.submit(Request(str(number), prompt, params))
            text += [output.text for output in made.run()]
        found = {
            "seconds": time.perf_counter() - begun,
            "host_seconds": time.thread_time() - host,
            "tokens": made.stats.drawn_tokens - drawn,
            "prompt_tokens": len(prompts[0]),
            "text": "".join(text) if len(prompts) == 1 else "",
        }
        print(json.dumps(found), flush=True)


def bare(answers: dict[str, str]) -> None:
    """Each path of ``answers`` returns its text, after reading what was sent, with uvicorn as the server sets it."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.responses import Response

    app = FastAPI(docs_url=None, redoc_url=None)

    def add(path: str, content: bytes) -> None:
        @app.api_route(path, methods=["GET", "POST"])
        async def answer(http: HttpRequest) -> Response:
            await http.body()
            return Response(content, media_type="application/json")

    for path, text in answers.items():
        add(path, text.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, http="h11", log_config=None, access_log=False, timeout_keep_alive=30, server_header=False
        )
        print(f"serving nothing at http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run([sock])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, arguments in (("make", ["folder"]), ("engine", ["run", "slots", "length"]), ("bare", ["answers"])):
        command = commands.add_parser(name)
        for argument in arguments:
            command.add_argument(argument)
    commands.choices["make"].add_argument("--small", action="store_true")
    args: Any = parser.parse_args()
    if args.command == "bare":
        return bare(json.loads(args.answers))
    simulate_devices(1)
    keep_compiled()
    if args.command == "make":
        return make(Path(args.folder), SMALL if args.small else MIXTRAL)
    return engine(Path(args.run), int(args.slots), int(args.length))


if __name__ == "__main__":
    main()
