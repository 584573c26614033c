"""Histograms as Prometheus reads them; what the server counts is in test_app.py."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Known
from prometheus_client.registry import Collector

from gshardx.infer.server.metrics import SHORT, Histogram, Timings


class One(Collector):
    def __init__(self, histogram):
        self.histogram = histogram

    def collect(self):
        yield self.histogram.family("seconds", "some")


def exported(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        if not name.startswith("seconds_created")
    }


@given(st.lists(st.tuples(st.sampled_from([*SHORT, 0.0, 0.0007, 0.042, 3.0]), st.integers(1, 5)), max_size=20))
def test_weighted_seconds_are_counted_as_the_clients_library_counts_them(observed):
    own, known = Histogram(SHORT), Known("seconds", "some", buckets=SHORT, registry=None)
    for seconds, weight in observed:
        own.observe(seconds, weight)
        for _ in range(weight):
            known.observe(seconds)
    found, expected = exported(One(own)), exported(known)
    assert found.keys() == expected.keys()
    assert all(abs(found[name] - expected[name]) < 1e-9 for name in found)


def test_tokens_that_come_together_share_their_time():
    timings = Timings()
    timings.tokens(10.5, 10.0, 1, True)
    timings.tokens(10.9, 10.5, 4, False)
    assert (timings.first.sum, sum(timings.first.counts)) == (0.5, 1)
    assert sum(timings.between.counts) == 4
    assert abs(timings.between.sum - 0.4) < 1e-9
