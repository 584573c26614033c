"""Counts and percentiles of made-up records, against numbers worked out apart."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.infer.measure import LAG_MS, Failures, Record, Slo, lagged, meets, report, spread, table


def record(scheduled=0.0, outcome="completed", texts=(0.1, 0.2, 0.4), **changed):
    given = {"sent": scheduled + 0.001, "ended": scheduled + 0.5, "prompt_tokens": 7, "output_tokens": 3}
    texts = [scheduled + text for text in texts]
    return Record(**({"scheduled": scheduled, "outcome": outcome, "texts": texts} | given | changed))


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=60))
def test_percentiles_are_those_of_the_sorted_values_in_proportion_between_two(values):
    ordered = sorted(values)

    def percentile(p):
        place = p / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return 1e3 * (low + (high - low) * (place - math.floor(place)))

    found = spread(values)
    for p, value in ((50, found.p50), (90, found.p90), (95, found.p95), (99, found.p99)):
        assert value == pytest.approx(percentile(p), abs=1e-6)
        assert value == pytest.approx(1e3 * np.percentile(values, p), abs=1e-6)
    assert (found.mean, found.max) == pytest.approx((1e3 * math.fsum(values) / len(values), 1e3 * max(values)))


def test_of_nothing_there_is_no_spread():
    assert spread([]) is None


RECORDS = st.builds(
    record,
    scheduled=st.floats(10, 20),
    outcome=st.sampled_from(["completed", "refused", "failed", "cancelled", "interrupted"]),
    why=st.sampled_from(["HTTP 500", "empty"]),
    retry=st.booleans(),
    retry_after=st.none() | st.floats(0, 9),
)


@given(st.lists(RECORDS, max_size=30), (st.none() | st.floats(50, 200)).map(Slo))
def test_each_request_is_counted_once(records, slo):
    found = report(records, 10.0, [], slo)
    ends = found.completed + found.refused + found.failed + found.cancelled + found.interrupted
    assert found.sent + found.retried == ends == len(records)
    assert sum(one.count for one in found.failures.values()) == found.failed
    assert found.completed_by_retry <= min(found.completed, found.retried)
    assert (found.met_slo is None) == (slo.ttft_ms is None)
    assert found.met_slo is None or found.met_slo <= found.completed
    assert (found.ttft_ms is None) == (found.completed == 0)
    assert found.requests_per_second * found.seconds == pytest.approx(found.completed)
    assert f"{found.sent} sent: {found.completed} completed" in table(found)


def test_times_count_from_when_a_request_was_due():
    found = report([record(5.0), record(6.0, texts=(0.3, 0.4, 0.45))], 5.0, [], Slo())
    assert found.seconds == 1.5
    assert found.ttft_ms.mean == pytest.approx(200)
    assert found.itl_ms.mean == pytest.approx((100 + 200 + 100 + 50) / 4)
    assert found.itl_ms.max == pytest.approx(200)
    assert found.tpot_ms.mean == pytest.approx((300 / 2 + 150 / 2) / 2)
    assert found.e2e_ms.p99 == pytest.approx(500)
    assert found.lag_ms.max == pytest.approx(1)
    assert found.requests_per_second == pytest.approx(2 / 1.5)
    assert found.prompt_tokens_per_second == pytest.approx(14 / 1.5)
    assert found.output_tokens_per_second == pytest.approx(6 / 1.5)


def test_only_completed_requests_have_times_and_tokens():
    others = [record(outcome=outcome, why="x") for outcome in ("refused", "failed", "cancelled", "interrupted")]
    found = report(others, 0.0, [], Slo())
    assert (found.ttft_ms, found.itl_ms, found.tpot_ms, found.e2e_ms) == (None,) * 4
    assert found.output_tokens_per_second is None
    assert found.lag_ms is not None


def test_an_answer_of_one_piece_or_uncounted_tokens_has_no_time_between():
    found = report([record(texts=(0.1,), output_tokens=1)], 0.0, [], Slo(itl_ms=1))
    assert (found.itl_ms, found.tpot_ms, found.met_slo) == (None, None, 1)
    uncounted = report([record(prompt_tokens=None, output_tokens=None)], 0.0, [], Slo())
    assert (uncounted.tpot_ms, uncounted.prompt_tokens_per_second) == (None, None)
    assert uncounted.itl_ms.max == pytest.approx(200)
    assert "- prompt tokens/s, - output tokens/s" in table(uncounted)


def test_refusals_say_the_median_of_when_to_come_again():
    refused = [record(outcome="refused", retry_after=after) for after in (1.0, None, 4.0, 2.0)]
    found = report([*refused, record(retry=True)], 0.0, [], Slo())
    assert (found.refused, found.retry_after_seconds, found.sent, found.retried) == (4, 2.0, 4, 1)
    assert "4 refused (429, median Retry-After 2 s)" in table(found)
    assert "1, 1 of them completed" in table(found)


def test_failures_are_told_by_kind_with_what_was_said_first():
    ends = [("HTTP 500", "a"), ("empty", ""), ("HTTP 500", "b")]
    failed = [record(outcome="failed", why=why, said=said) for why, said in ends]
    found = report(failed, 0.0, [], Slo())
    assert found.failures == {"HTTP 500": Failures(2, "a"), "empty": Failures(1, "")}
    assert "2 HTTP 500 (a); 1 empty" in table(found)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), True),
        (Slo(ttft_ms=101), True),
        (Slo(ttft_ms=99), False),
        (Slo(itl_ms=201), True),
        (Slo(itl_ms=199), False),
        (Slo(e2e_ms=501), True),
        (Slo(e2e_ms=499), False),
        (Slo(101, 201, 499), False),
        (Slo(101, 201, 501), True),
    ],
)
def test_an_answer_is_good_if_it_meets_all_that_is_asked(slo, met):
    assert meets(record(), slo) == met


def test_goodput_counts_good_answers_a_second():
    good, slow = record(), record(texts=(0.4, 0.5))
    found = report([good, slow, record(outcome="failed", why="empty")], 0.0, [], Slo(ttft_ms=200))
    assert (found.met_slo, found.goodput) == (1, pytest.approx(2.0))
    assert "goodput   2.00 requests/s (1 answers)" in table(found)


def test_a_generator_is_late_if_it_sends_or_reads_late():
    fine, late = 0.9e-3 * LAG_MS, 1.1e-3 * LAG_MS
    assert not lagged(report([record(sent=fine)], 0.0, [fine], Slo()))
    assert lagged(report([record(sent=late)], 0.0, [fine], Slo()))
    assert lagged(report([record(sent=fine)], 0.0, [late], Slo()))
    assert not lagged(report([record(sent=9.0, retry=True)], 0.0, [], Slo())), "a retry is due after its Retry-After"
    assert not lagged(report([], 0.0, [], Slo()))


def test_the_table_has_a_row_for_each_time():
    found = dataclasses.replace(report([record()], 0.0, [0.002], Slo()), ttft_ms=None)
    rows = table(found).splitlines()
    assert rows[-5].split() == ["milliseconds", "mean", "p50", "p90", "p95", "p99", "max"]
    assert rows[-4].split()[-6:] == ["-"] * 6
    assert rows[-3].split()[-6:] == ["150.0", "150.0", "190.0", "195.0", "199.0", "200.0"]
    assert "sent at most 1.0 (p99 1.0) ms late, read at most 2.0 (p99 2.0) ms" in table(found)
