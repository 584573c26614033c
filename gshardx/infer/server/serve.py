"""``gshardx.infer serve``: one engine behind OpenAI's API, until SIGTERM."""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.infer.options import add_model_flags, engine_of, mesh_of
from gshardx.infer.server.limits import Limits
from gshardx.sharding.guard import count_compiles

if TYPE_CHECKING:
    from gshardx.infer.server.state import Server

LIMITS = {
    "max_queue": "requests that may wait; further ones are told when to come back (429)",
    "max_queued_tokens": "tokens of their prompts",
    "max_wait": "seconds that a request may be expected to wait for its start",
    "max_open": "open requests of one API key, or without keys of one address",
    "max_body": "bytes of a request",
    "deadline": "seconds from a request's arrival to its end",
    "drain": "seconds that open requests are given after SIGTERM",
    "stall": "seconds without a step, though there is work, after which the engine is taken to hang",
}
STUCK = 60.0
"""Seconds after which a connection ends whose client takes nothing of what was sent."""
FLUSHED = 2.0
"""Seconds that last frames are given to leave."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default %(default)s)")
    parser.add_argument("--name", help="of the model, for clients (default: the run directory's)")
    parser.add_argument(
        "--api_keys", type=Path, metavar="FILE", help="one key a line, or name: key; read again when it changes"
    )
    parser.add_argument("--without_keys", action="store_true", help="serve a public address to everybody")
    parser.add_argument(
        "--chat_template", type=Path, metavar="FILE", help="Jinja (default: the run's own, or role: text)"
    )
    parser.add_argument("--log_prompts", action="store_true", help="write prompts to the log")
    for field in dataclasses.fields(Limits):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, metavar="N",
            help=f"{LIMITS[field.name]} (default %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--ahead_ms", type=float, default=40.0, metavar="N",
        help="milliseconds of work given to the device in advance: with more, more tokens a second, and later first "
        "tokens (default %(default)s)",
    )  # fmt: skip
    add_model_flags(parser)
    parser.set_defaults(batch_size=32)


def serve(arguments: argparse.Namespace) -> int:
    """Load, compile, listen; returns 0 after SIGTERM, 130 after Ctrl-C, once open requests have ended.

    Raises:
        BadInput: a wrong flag, an address that can't be listened on, or no run.
    """
    try:
        from gshardx.infer.server.chat import load_template
        from gshardx.infer.server.keys import Keys
        from gshardx.infer.server.state import Server
    except ImportError as error:
        raise BadInput(f"serve needs more packages ({error.name}); pip install 'gshardx[serve]'") from error
    if jax.process_count() > 1:
        raise BadInput("serve runs in one process; start it without --num_processes, on the devices of one host")
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Limits)})
    if not arguments.ahead_ms > 0:
        raise BadInput(f"--ahead_ms {arguments.ahead_ms:g}: must be more than 0")
    _log_to_stderr()
    keys = Keys(arguments.api_keys) if arguments.api_keys else None
    if keys is None and not arguments.without_keys and not _only_here(arguments.host):
        raise BadInput(
            f"--host {arguments.host}: others could reach it, and there are no keys; give --api_keys FILE, or "
            f"--without_keys if everybody may use it"
        )
    with listening(arguments.host, arguments.port) as sock, count_compiles() as compiled:
        run = load_run(arguments.run, mesh_of(arguments))
        template = load_template(arguments.run, arguments.chat_template)
        engine = engine_of(arguments, run, sys.maxsize, 0, arguments.ahead_ms)
        name = arguments.name or arguments.run.resolve().name
        server = Server(engine, name, template, keys, limits, len(compiled.compiled), arguments.log_prompts)
        gc.collect()
        gc.freeze()  # the model and its programs stay; a collection need not look at them again
        host, port = sock.getsockname()[:2]
        told = (
            f"serving {name} (step {run.step}) at http://{f'[{host}]' if ':' in host else host}:{port} with "
            f"{server.admission.slots} sequences of up to {engine.config.max_length} tokens at once; "
            f"{len(compiled.compiled)} programs compiled"
        )
        return asyncio.run(_until_told(server, sock, told))


async def _until_told(server: "Server", sock: socket.socket, ready: str) -> int:
    """Say ``ready`` once it is, and serve until a signal."""
    import uvicorn

    from gshardx.infer.server.app import build_app
    from gshardx.infer.server.transport import Connection

    class Quiet(uvicorn.Server):
        """Leaves signals to us: its own way closes the door first, and kills itself by the signal in the end."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(ready, flush=True)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        build_app(server), http=Connection, log_config=None, access_log=False, ws="none", timeout_keep_alive=30,
        timeout_graceful_shutdown=int(FLUSHED), server_header=False,
    )  # fmt: skip
    front = Quiet(config)
    told: list[signal.Signals] = []
    leaving: list[asyncio.Task[None]] = []

    async def leave() -> None:
        ends = time.monotonic() + server.limits.drain
        while server.worker.open and time.monotonic() < ends and len(told) == 1:
            await asyncio.sleep(0.05)
        server.worker.fail_all("the server is shutting down")
        front.should_exit = True

    def on(number: signal.Signals) -> None:
        server.draining = True
        told.append(number)
        if not leaving:
            print(f"{number.name}: {server.worker.open} requests are open; a second one ends them at once", flush=True)
            leaving.append(asyncio.create_task(leave()))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on, number)
    await front.serve([sock])
    return 130 if told and told[0] is signal.SIGINT else 0


def _only_here(host: str) -> bool:
    try:
        return all(ipaddress.ip_address(one[4][0]).is_loopback for one in socket.getaddrinfo(host, None))
    except OSError as error:
        raise BadInput(f"--host {host}: no such address ({error.strerror or error})") from error


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bound before anything is loaded: a port that is taken is told at once."""
    if not 0 <= port < 1 << 16:
        raise BadInput(f"--port {port}: must be 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY only where it reads TCP there, and without it the second piece of
    # each answer waits for a delayed acknowledgement of the first (Nagle's algorithm).
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; else a client that reads nothing keeps its connection for good
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STUCK))
        try:
            sock.bind((host, port))
        except OSError as error:
            raise BadInput(
                f"--host {host} --port {port}: can't listen there ({error.strerror}); choose another"
            ) from error
        yield sock


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gshardx.server")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
