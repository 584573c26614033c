"""The rows of benchmarks/serve_cpu.py's table, and their goals."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from report import NotMeasured
from serve_processes import Serving, closed_loop, line_of, open_loop, serving
from timing import goal

from gshardx.infer.measure import LAG_MS
from gshardx.infer.traffic import Arrival, plan

HERE = Path(__file__).resolve().parent
OVER_ENGINE, FRONT, LOADED = 0.9, 0.1, 2.0
"""Goals: tokens a second over the engine's, the event loop's CPU seconds for each second of the engine, and the time to
the first token under load over that without."""
LOAD = 0.8
"""Of the capacity."""
WORDS = 8
"""Of a short prompt."""
LLAMA = "llama.cpp's server"
MOST = 100_000
EXPLAINED = (
    "event loop: the server's main thread, with HTTP, JSON and the tokenizer; the engine's own thread plans, fills "
    "buffers and makes text, and was measured without a server. Both, and the client, compute beside XLA's threads"
)
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
Row = dict[str, Any]


class Found(NamedTuple):
    rows: list[Row]
    goals: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the engine, and of what it is asked: words of a prompt, and tokens of an answer."""

    slots: int = 32
    length: int = 256
    prompt: int = 64
    new: int = 128
    short: int = 32
    """Tokens of an answer where many come and go."""
    streams: tuple[int, ...] = (32, 96)
    connections: tuple[int, ...] = (1, 16)
    busy: int = 64
    """Connections that keep a server at its capacity."""


@dataclasses.dataclass
class Bench:
    """What all measurements share. seconds: of each. seed: of the newest prompts: none is sent twice to a server, which
    might have kept its keys and values."""

    sizes: Sizes
    folder: Path
    seconds: float
    rounds: int
    seed: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "random"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def prompts(self, count: int, words: int) -> list[str]:
        """As the load generator makes them."""
        self.seed += 1
        return [one.prompt for one in plan([Arrival(0.0)] * count, lambda _: words, lambda _: 1, 0.0, self.seed)]

    def server(self, port: int) -> contextlib.AbstractContextManager[Serving]:
        """python -m gshardx.infer serve, which refuses nobody; port 0: any."""
        flags = {
            "run": self.run, "port": port, "batch_size": self.sizes.slots, "max_length": self.sizes.length,
            "max_open": MOST, "max_queue": MOST, "max_queued_tokens": MOST * self.sizes.length, "max_wait": 600,
        }  # fmt: skip
        command = [sys.executable, "-m", "gshardx.infer", "serve", *(f"--{name}={one}" for name, one in flags.items())]
        return serving(command, self.log("server"))

    def child(self, *arguments: object) -> list[str]:
        """A command of serve_children.py."""
        return [sys.executable, str(HERE / "serve_children.py"), *map(str, arguments)]

    def open_loop(self, server: Serving, *arrivals: str) -> Row:
        """python -m gshardx.infer bench with prompts of its own."""
        self.seed += 1
        shape = {"prompt_tokens": self.sizes.prompt, "max_tokens": self.sizes.short, "seed": self.seed}
        flags = (f"--{name}={value}" for name, value in shape.items())
        return open_loop(server, self.seconds, "--ignore_eos", *flags, *arrivals)


class Alone:
    """The engine without a server; see serve_children.py."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        line_of(process, log)

    def answer(self, prompts: list[str], tokens: int, wave: int) -> Row:
        asked = self._process.stdin
        assert asked
        asked.write(json.dumps({"prompts": prompts, "max_tokens": tokens, "wave": wave}) + "\n")
        asked.flush()
        found: Row = json.loads(line_of(self._process, self._log))
        return found


def bodies(prompts: Iterable[str], tokens: int, **more: Any) -> list[Row]:
    return [{"prompt": one, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more} for one in prompts]


def row(what: str, ours: list[float], name: str = "", theirs: list[float] | None = None) -> Row:
    """Medians over rounds; of ratios the range as well."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if theirs else []
    return {
        "what": what,
        "gshardx": statistics.median(ours),
        "beside": name,
        "there": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "",
    }


def streaming(bench: Bench, server: Serving, alone: Alone) -> Found:
    """Waves of streams of equal length over HTTP, and of the engine alone."""
    found = Found([], [], [EXPLAINED])
    for count in bench.sizes.streams:
        over_http, engine = waves(bench, server, alone, count)
        took = [one["seconds"] for one in engine]

        def beside_time(what: str, each: list[Row], name: str, took: list[float] = took, count: int = count) -> Row:
            return row(f"{count} streams: {what}", [one[name] for one in each], "s of the engine alone", took)

        tokens = row(f"{count} streams: tokens/s", tokens_a_second(over_http), "engine alone", tokens_a_second(engine))
        front = beside_time("CPU s of the event loop", over_http, "front_cpu_seconds")
        found.rows.extend(
            [
                tokens,
                front,
                beside_time("CPU s of the client", over_http, "client_cpu_seconds"),
                beside_time("CPU s of the engine's own thread", engine, "host_seconds"),
            ]
        )
        about = f"{count} streams"
        found.goals.append(goal(f"{about} over HTTP beside the engine", tokens["ratio"], OVER_ENGINE, at_least=True))
        found.goals.append(goal(f"{about}, the event loop's CPU beside the engine's time", front["ratio"], FRONT))
    return found


def waves(bench: Bench, server: Serving, alone: Alone, count: int) -> tuple[list[Row], list[Row]]:
    """What each round found over HTTP, and of the engine: of the same prompts, ``count`` at once, and the next once all
    are answered.

    Raises:
        NotMeasured: they differ in the number of tokens.
    """
    over_http: list[Row] = []
    engine: list[Row] = []
    sizes = bench.sizes

    def ask(prompts: list[str]) -> None:
        asked = bodies(prompts, sizes.new, **STREAM)
        over_http.append(closed_loop(server, "/v1/completions", asked, count))

    def compute(prompts: list[str]) -> None:
        engine.append(alone.answer(prompts, sizes.new, count))

    once = bench.prompts(count, sizes.prompt)
    ask(once)
    compute(once)
    repeats = max(1, round(bench.seconds / engine[0]["seconds"]))
    for number in range(bench.rounds):
        prompts = bench.prompts(count * repeats, sizes.prompt)
        for turn in (ask, compute) if number % 2 else (compute, ask):
            turn(prompts)
        told, expected = (over_http[-1]["tokens"], engine[-1]["tokens"]), count * repeats * sizes.new
        if told != (expected, expected):
            raise NotMeasured(f"{told[0]} tokens over HTTP and {told[1]} of the engine, and not {expected}")
    return over_http[1:], engine[1:]


def tokens_a_second(each: list[Row]) -> list[float]:
    return [one["tokens"] / one["seconds"] for one in each]


def short_requests(bench: Bench, server: Serving) -> Found:
    """Beside a FastAPI app that returns the same bytes."""
    found = Found([], [], [])
    asked = {"/health": [], "/v1/completions": bodies(bench.prompts(500, WORDS), 1)}
    said = {path: closed_loop(server, path, each[:1], 1, 0.1)["body"] for path, each in asked.items()}
    with serving(bench.child("bare", json.dumps(said)), bench.log("bare")) as bare:
        for path, each in asked.items():
            for connections in bench.sizes.connections:
                ours: list[Row] = []
                theirs: list[Row] = []
                for number in range(bench.rounds):
                    turns = [(server, ours), (bare, theirs)]
                    for one, into in turns if number % 2 else reversed(turns):
                        into.append(closed_loop(one, path, each, connections, bench.seconds))
                what = f"{path}{' of 1 token' if each else ''}, {connections} connections"
                speeds, front = (
                    [[one[name] for one in side] for side in (ours, theirs)]
                    for name in ("requests_per_second", "front_ms")
                )
                found.rows.append(row(f"{what}: requests/s", speeds[0], "bare FastAPI", speeds[1]))
                found.rows.append(row(f"{what}: CPU ms of the event loop", front[0], "bare FastAPI", front[1]))
    return found


def under_load(bench: Bench, server: Serving, llama: Serving | None, note: str) -> Found:
    """Time to the first token at a share of the capacity, over that of requests that come alone; and llama.cpp's server
    at the same rate."""
    sizes, found = bench.sizes, Found([], [], [note])
    capacity, calm, loaded = [], [], []
    their_capacity, theirs = [], []
    for _ in range(bench.rounds):
        asked = bodies(bench.prompts(4096, sizes.prompt), sizes.short)
        for number, body in enumerate(asked):  # of many lengths, lest all end at once
            body["max_tokens"] = sizes.short // 2 + number % (sizes.short + 1)
        capacity.append(closed_loop(server, "/v1/completions", asked, sizes.busy, bench.seconds)["requests_per_second"])
        rate = ("--rate", f"{LOAD * capacity[-1]}", "--seconds", f"{bench.seconds}")
        calm.append(bench.open_loop(server, *calmly(bench, server)))
        loaded.append(bench.open_loop(server, *rate))
        if llama is not None:
            their_capacity.append(
                closed_loop(llama, "/v1/completions", asked, sizes.busy, bench.seconds)["requests_per_second"]
            )
            theirs.append(bench.open_loop(llama, *rate))
    at = f"at {LOAD:.0%} of the capacity"
    found.rows.append(row(f"capacity, {sizes.busy} connections: requests/s", capacity, LLAMA, their_capacity))
    found.rows.append(row(f"{at}: requests/s", speeds(loaded), LLAMA, speeds(theirs)))
    for part in ("p50", "p90"):
        ours = first_ms(loaded, part)
        found.rows.append(row(f"{at}: TTFT {part} ms", ours, "one at a time", first_ms(calm, part)))
        found.goals.append(goal(f"TTFT {part} {at} over that of one at a time", found.rows[-1]["ratio"], LOADED))
        found.rows.append(row(f"{at}: TTFT {part} ms", ours, LLAMA, first_ms(theirs, part)))
    for name, each in (("gshardx", loaded), (LLAMA, theirs)):
        found.notes.extend(
            f"{name}, {at}, round {number + 1}: {said}" for number, one in enumerate(each) if (said := troubles(one))
        )
    return found


def calmly(bench: Bench, server: Serving) -> tuple[str, str]:
    """Arrivals of which each finds the last one answered: as far apart as two of them take."""
    asked = bodies(bench.prompts(500, bench.sizes.prompt), bench.sizes.short)
    apart = 2 / closed_loop(server, "/v1/completions", asked, 1, bench.seconds / 4)["requests_per_second"]
    trace = bench.folder / "calm.jsonl"
    trace.write_text("".join(json.dumps({"at": number * apart}) + "\n" for number in range(int(bench.seconds / apart))))
    return "--trace", str(trace)


def speeds(reports: list[Row]) -> list[float]:
    return [one["requests_per_second"] for one in reports]


def first_ms(reports: list[Row], part: str) -> list[float]:
    return [one["ttft_ms"][part] for one in reports]


def troubles(one: Row) -> str:
    """What a reader of a load generator's figures must know."""
    said = [f"{one[name]} {name}" for name in ("refused", "failed", "interrupted") if one[name]]
    said += [f"({failure['first']})" for failure in one["failures"].values()]
    late = max(one[name]["p99"] for name in ("lag_ms", "stall_ms"))
    return ", ".join(said + ([f"the generator was {late:.0f} ms late (p99)"] if late > LAG_MS else []))


def restarts(bench: Bench, server: Serving) -> Found:
    """From ``kill -9`` until it is ready again."""
    seconds, compiled = [], []
    begun = killed(server)
    for _ in range(bench.rounds):
        with bench.server(server.port) as again:
            seconds.append(time.perf_counter() - begun)
            compiled.append(again.metric("gshardx_startup_compilations"))
            begun = killed(again)
    rows = [row("from kill -9 to /ready: s", seconds), row("programs compiled meanwhile", compiled)]
    return Found(rows, [goal("programs compiled by a restart", max(compiled), 0, unit="")], [])


def killed(server: Serving) -> float:
    """When."""
    begun = time.perf_counter()
    server.process.kill()
    server.process.wait()
    return begun
