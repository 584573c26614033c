"""``gshardx.infer bench``: load on any server that has OpenAI's ``/v1/completions``, and what it did under it.

The load is open: a request is sent when it is due, whether others are answered or not, as a crowd of people does. Times
count from when it was due, so that a slow server (or generator) can't hide by having less asked of it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gshardx.errors import BadInput
from gshardx.infer.measure import LAG_MS, Record, Report, Slo, lagged, report, table
from gshardx.infer.traffic import Planned, lengths, limited, plan, poisson, rate, read_trace

REQUESTS = 100
"""Where neither their number nor a time is given."""
RATE = "1"
TICK_SECONDS = 0.01


@dataclasses.dataclass
class _Seen:
    model: str = ""
    started: float = 0.0
    records: list[Record] = dataclasses.field(default_factory=list)
    stalls: list[float] = dataclasses.field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server (default http://127.0.0.1:8000)")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--api_key", metavar="KEY", help="default: the environment's GSHARDX_API_KEY")
    add("--rate", metavar="R", help=f"requests per second, at random moments; inf: all at once (default {RATE})")
    add("--trace", type=Path, metavar="in.jsonl", help='arrivals instead of --rate, one {"at": seconds, '
        '"prompt_tokens": n or "prompt": text, "max_tokens": m} a line; what a line lacks is drawn')  # fmt: skip
    add("--requests", type=int, metavar="N", help=f"send so many (default {REQUESTS}, or the trace's, or --seconds)")
    add("--seconds", type=float, metavar="S", help="send so long")
    drawn = "N, uniform:LEAST:MOST or lognormal:MEDIAN:SIGMA (default 64)"
    add("--prompt_tokens", default="64", metavar="DIST", help=f"words of a prompt: {drawn}")
    add("--max_tokens", default="64", metavar="DIST", help=f"of an answer: {drawn}")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the best token (default)")
    add("--ignore_eos", action="store_true", help="write max_tokens tokens, whatever they are, where servers can")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn here (default 0)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds for a request (default 300)")
    add("--retry", action="store_true", help="send what was refused (429) once more, after its Retry-After")
    add("--cancel", type=float, default=0.0, metavar="P", help="share of clients that close their connection at a "
        "random moment; one whose answer is whole by then does not (default 0)")  # fmt: skip
    slo = "an answer is good (goodput) if"
    add("--slo_ttft_ms", type=float, metavar="MS", help=f"{slo} its first text came so soon after it was due")
    add("--slo_itl_ms", type=float, metavar="MS", help=f"{slo} no wait between two pieces of text was longer")
    add("--slo_e2e_ms", type=float, metavar="MS", help=f"{slo} it ended so soon after it was due")
    add("--json", action="store_true", help="print JSON instead of a table")


def bench(arguments: argparse.Namespace) -> int:
    """Send, wait for all answers and print what was seen; after an interruption, what was seen until then.

    Raises:
        BadInput: a setting or a line of the trace that can't be, or nobody at the address.
    """
    if importlib.util.find_spec("httpx") is None:
        raise BadInput("bench needs httpx; run: pip install 'gshardx[serve]'")
    planned = _planned(arguments)
    headers = _headers(arguments.api_key or os.environ.get("GSHARDX_API_KEY"))
    url = arguments.url.rstrip("/").removesuffix("/v1")
    _allow_connections()
    seen, code = _Seen(), 0
    try:
        asyncio.run(_drive(planned, url, headers, arguments, seen))
    except KeyboardInterrupt:
        code = 130
    slo = Slo(arguments.slo_ttft_ms, arguments.slo_itl_ms, arguments.slo_e2e_ms)
    found = report(seen.records, seen.started, seen.stalls, slo)
    _print(found, arguments, url, seen.model)
    return code


def _planned(arguments: argparse.Namespace) -> Iterable[Planned]:
    """Raises:
    BadInput: a setting that can't be.
    """
    for name, low, high in (("requests", 1, math.inf), ("seed", 0, math.inf), ("cancel", 0, 1)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{name} {value}: must be {low} {'or more' if high == math.inf else f'to {high}'}")
    for name in ("seconds", "timeout", "slo_ttft_ms", "slo_itl_ms", "slo_e2e_ms"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name} {value}: must be over 0")
    sizes = [lengths(getattr(arguments, name), f"--{name}") for name in ("prompt_tokens", "max_tokens")]
    requests = arguments.requests
    if arguments.trace is not None:
        if arguments.rate is not None:
            raise BadInput("--rate and --trace both say when requests come; leave one out")
        arrivals: Iterable[Any] = read_trace(arguments.trace)
    else:
        per_second = rate(arguments.rate or RATE)
        if requests is None and arguments.seconds is None:
            requests = REQUESTS
        if requests is None and math.isinf(per_second):
            raise BadInput("--rate inf sends all at once, not for a time; say how many with --requests")
        arrivals = poisson(per_second, arguments.seed)
    arrivals = limited(arrivals, requests, arguments.seconds)
    return plan(arrivals, sizes[0], sizes[1], arguments.cancel, arguments.seed)


def _headers(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise BadInput(
            "--api_key (or GSHARDX_API_KEY): has characters that no HTTP header holds; give it without line ends"
        )
    return {"Authorization": f"Bearer {api_key}"}


def _allow_connections() -> None:
    """As many as the system lets this process have: each request that is open takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _drive(
    planned: Iterable[Planned],
    url: str,
    headers: Mapping[str, str],
    arguments: argparse.Namespace,
    seen: _Seen,
) -> None:
    """Send each when it is due; ends when all are answered."""
    from gshardx.infer.send import Clients, find_model, send

    async with contextlib.aclosing(Clients(url, headers)) as clients:
        seen.model = await find_model(clients, url, arguments.model)
        same = {
            "model": seen.model,
            "temperature": arguments.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({"ignore_eos": True} if arguments.ignore_eos else {})

        async def ask(one: Planned, due: float) -> None:
            body = {**same, "prompt": one.prompt, "max_tokens": one.max_tokens}
            record = await send(clients, body, one.leave_after, arguments.timeout, due)
            seen.records.append(record)
            if arguments.retry and record.retry_after is not None:
                await asyncio.sleep(record.retry_after)
                seen.records.append(await send(clients, body, one.leave_after, arguments.timeout, due, retry=True))

        watch = asyncio.create_task(_watch(seen.stalls))
        async with asyncio.TaskGroup() as tasks:
            seen.started = time.perf_counter()
            for one in planned:
                due = seen.started + one.at
                if (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                tasks.create_task(ask(one, due))
        watch.cancel()


async def _watch(stalls: list[float]) -> None:
    """Note again and again how much later than it asked to a task is woken, as are those that read answers."""
    while True:
        due = time.perf_counter() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        stalls.append(time.perf_counter() - due)


def _print(found: Report, arguments: argparse.Namespace, url: str, model: str) -> None:
    if arguments.json:
        names = ("trace", "requests", "seconds", "prompt_tokens", "max_tokens", "temperature", "ignore_eos",
                 "seed", "timeout", "retry", "cancel", "slo_ttft_ms", "slo_itl_ms", "slo_e2e_ms")  # fmt: skip
        given = {name: getattr(arguments, name) for name in names}
        settings = {"url": url, "model": model, "rate": None if arguments.trace else arguments.rate or RATE} | given
        print(json.dumps({"settings": settings} | dataclasses.asdict(found), indent=2, default=str))
    else:
        print(f"{'server':10}{url}, model {model}\n{table(found)}")
    if lagged(found):
        print(f"warning: the generator was over {LAG_MS:g} ms late, more than 1 time in 100, so times are in part its "
              "own; lower --rate, or give it a core", file=sys.stderr)  # fmt: skip
