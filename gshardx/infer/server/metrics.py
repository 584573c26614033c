"""What Prometheus reads: counts of the engine and times of the server, made when they are asked for."""

import bisect
import collections
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gshardx.infer.server.limits import Admission
from gshardx.infer.server.worker import Worker

LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Histogram:
    """Seconds by bucket, each observation with a weight."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float, weight: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += weight
        self.sum += seconds * weight

    def family(self, name: str, said: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, said, buckets=buckets, sum_value=self.sum)


class Timings:
    """Of answers, and how requests ended."""

    def __init__(self) -> None:
        self.first, self.between, self.whole = Histogram(LONG), Histogram(SHORT), Histogram(LONG)
        self.answered: collections.Counter[tuple[str, int]] = collections.Counter()

    def tokens(self, at: float, before: float, count: int, first: bool) -> None:
        """``count`` tokens of a continuation came together; ``before``, its last ones or the request did."""
        if first:
            self.first.observe(at - before)
        else:
            self.between.observe((at - before) / count, count)

    def ended(self, seconds: float) -> None:
        self.whole.observe(seconds)


class ServerCollector(Collector):
    """Reads a worker's engine between two of its steps, as it is."""

    def __init__(self, worker: Worker, admission: Admission, timings: Timings, startup_compilations: int) -> None:
        self._worker, self._admission, self._timings = worker, admission, timings
        self._startup = startup_compilations

    def collect(self) -> Iterator[Metric]:
        seen, stats, worker = self._worker.seen, self._worker.engine.stats, self._worker
        for name, value, said in (
            ("up", float(worker.trouble is None), "1 while the engine moves, 0 once it has died or hangs"),
            ("requests_open", worker.open, "requests that somebody waits for"),
            ("sequences_running", seen.running, "continuations in a slot of the engine"),
            ("sequences_waiting", seen.waiting + worker.entering, "continuations that wait for a slot"),
            ("prompt_tokens_waiting", seen.waiting_tokens, "tokens of the prompts that wait"),
            ("startup_compilations", self._startup, "programs that XLA compiled before the server was ready"),
        ):
            yield GaugeMetricFamily(f"gshardx_{name}", said, value=value)
        pages = GaugeMetricFamily("gshardx_kv_pages", "pages of the cache by use", labels=["state"])
        for state, count in (("free", seen.free), ("prefix", seen.evictable), ("held", seen.held)):
            pages.add_metric([state], count)
        yield pages
        for name, value, said in (
            ("engine_steps", worker.steps, "steps of the engine, its heartbeat"),
            ("prompt_tokens", stats.prompt_tokens, "tokens of prompts that were started"),
            ("prefix_hit_tokens", stats.cached_tokens, "of these, found in the prefix cache"),
            ("generated_tokens", stats.drawn_tokens, "tokens drawn"),
            ("computed_tokens", stats.tokens, "tokens computed for sequences"),
            ("padded_tokens", stats.padded_tokens, "tokens computed in all, with padding"),
            ("guessed_tokens", stats.guessed_tokens, "tokens guessed ahead"),
            ("accepted_tokens", stats.accepted_tokens, "of these, right"),
            ("retractions", stats.retractions, "sequences that gave up their pages"),
            ("compilations", stats.compilations, "programs compiled while serving; should stay 0"),
            ("dropped_choices", stats.dropped_choices, "choices that no expert took; 0 unless their number varies"),
            ("refused_requests", self._admission.refused, "requests answered with 429"),
        ):
            yield CounterMetricFamily(f"gshardx_{name}", said, value=value)
        load = CounterMetricFamily("gshardx_expert_choices", "choices that experts took", labels=["layer", "expert"])
        for layer, counts in enumerate(stats.expert_load.tolist()):
            for expert, count in enumerate(counts):
                load.add_metric([str(layer), str(expert)], count)
        yield load
        answered = CounterMetricFamily("gshardx_responses", "responses by path and status", labels=["path", "status"])
        for (path, status), count in list(self._timings.answered.items()):
            answered.add_metric([path, str(status)], count)
        yield answered
        yield self._timings.first.family("gshardx_ttft_seconds", "from a request's arrival to its first token")
        yield self._timings.between.family("gshardx_inter_token_seconds", "between two tokens of a continuation")
        yield self._timings.whole.family("gshardx_request_seconds", "from a request's arrival to its end")


def registry(collector: ServerCollector) -> CollectorRegistry:
    """With figures of the process itself."""
    found = CollectorRegistry()
    found.register(collector)
    ProcessCollector(registry=found)
    return found
