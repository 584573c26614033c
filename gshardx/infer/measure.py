"""What a load generator saw of each request, and what that says of the server: counts, percentiles, a printed table."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

LAG_MS = 10.0
"""A generator that is later than this one time in a hundred is too slow for the load."""

Outcome = Literal["completed", "refused", "failed", "cancelled", "interrupted"]
"""refused: answered 429. cancelled: its client closed the connection, as planned. interrupted: open when the user
stopped it all."""


class Record(NamedTuple):
    """One request and what came of it. Times are :func:`time.perf_counter`'s, in seconds."""

    scheduled: float
    """When it was due, whatever the generator was busy with; a retry's is that of the request it repeats."""
    sent: float
    ended: float
    outcome: Outcome
    why: str = ""
    """The kind of a failure."""
    said: str = ""
    """What the server or the network said of the failure."""
    retry: bool = False
    retry_after: float | None = None
    """Seconds after which a refused one may come again, if the server named them."""
    texts: Sequence[float] = ()
    """When each piece of text came."""
    prompt_tokens: int | None = None
    """By the server's count; None: it gave none."""
    output_tokens: int | None = None


class Slo(NamedTuple):
    """What an answer must keep to, in milliseconds; None: nothing."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """For the longest wait between two pieces of text."""
    e2e_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Spread:
    """In milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True)
class Failures:
    """Those of one kind."""

    count: int
    first: str
    """What was said of the first of them."""


@dataclasses.dataclass(frozen=True)
class Report:
    """``sent + retried = completed + refused + failed + cancelled + interrupted``."""

    sent: int
    """First tries."""
    retried: int
    completed: int
    completed_by_retry: int
    """Those of ``completed`` that were refused at first."""
    refused: int
    retry_after_seconds: float | None
    """The median of what refusals named; None: no refusal, or none that named it."""
    failed: int
    failures: dict[str, Failures]
    cancelled: int
    interrupted: int
    seconds: float
    requests_per_second: float
    prompt_tokens_per_second: float | None
    """Of completed requests; None: the server counts no tokens."""
    output_tokens_per_second: float | None
    met_slo: int | None
    """Completed requests that kept to the SLO; None: it asks nothing."""
    goodput: float | None
    """Those a second."""
    ttft_ms: Spread | None
    """From when a request was due to its first text. This and the others are of completed requests; None: of none."""
    itl_ms: Spread | None
    """Between one piece of text and the next, over all requests."""
    tpot_ms: Spread | None
    """For each token after the first, by request: the server may send several in a piece."""
    e2e_ms: Spread | None
    """From when a request was due to the end of its answer."""
    lag_ms: Spread | None
    """How much later than due first tries were sent: the generator's own fault, part of TTFT and end to end."""
    stall_ms: Spread | None
    """How late the generator may have been to read what came, seen at regular moments: its own fault too."""


def report(records: Iterable[Record], started: float, stalls: Sequence[float], slo: Slo) -> Report:
    """Sum up; it took from ``started`` to the last end of a request.

    Args:
        stalls: seconds that the generator woke too late, at regular moments.
    """
    records = list(records)
    by_outcome: dict[Outcome, list[Record]] = {
        "completed": [], "refused": [], "failed": [], "cancelled": [], "interrupted": []
    }  # fmt: skip
    for record in records:
        by_outcome[record.outcome].append(record)
    completed = by_outcome["completed"]
    seconds = max((record.ended for record in records), default=started) - started
    named = [record.retry_after for record in by_outcome["refused"] if record.retry_after is not None]
    met = None if slo == Slo() else sum(meets(record, slo) for record in completed)
    counted = [(record, record.output_tokens - 1) for record in completed if record.output_tokens is not None]
    tpot = [(record.texts[-1] - record.texts[0]) / more for record, more in counted if more > 0]
    return Report(
        sent=sum(not record.retry for record in records),
        retried=sum(record.retry for record in records),
        completed=len(completed),
        completed_by_retry=sum(record.retry for record in completed),
        refused=len(by_outcome["refused"]),
        retry_after_seconds=float(np.median(named)) if named else None,
        failed=len(by_outcome["failed"]),
        failures=_failures(by_outcome["failed"]),
        cancelled=len(by_outcome["cancelled"]),
        interrupted=len(by_outcome["interrupted"]),
        seconds=seconds,
        requests_per_second=_a_second(len(completed), seconds),
        prompt_tokens_per_second=_tokens_a_second([record.prompt_tokens for record in completed], seconds),
        output_tokens_per_second=_tokens_a_second([record.output_tokens for record in completed], seconds),
        met_slo=met,
        goodput=None if met is None else _a_second(met, seconds),
        ttft_ms=spread([record.texts[0] - record.scheduled for record in completed]),
        itl_ms=spread([gap for record in completed for gap in np.diff(record.texts)]),
        tpot_ms=spread(tpot),
        e2e_ms=spread([record.ended - record.scheduled for record in completed]),
        lag_ms=spread([record.sent - record.scheduled for record in records if not record.retry]),
        stall_ms=spread(stalls),
    )


def spread(seconds: Sequence[float]) -> Spread | None:
    """Mean, percentiles (between two values, in proportion) and the largest; None for no values."""
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    return Spread(float(values.mean()), *map(float, np.percentile(values, (50, 90, 95, 99, 100))))


def meets(record: Record, slo: Slo) -> bool:
    """Whether a completed request kept to it."""
    measured = (
        record.texts[0] - record.scheduled,
        max(np.diff(record.texts), default=0.0),
        record.ended - record.scheduled,
    )
    return all(limit is None or value * 1e3 <= limit for value, limit in zip(measured, slo, strict=True))


def lagged(report: Report) -> bool:
    """The generator could not keep its times: what was measured is in part itself."""
    return any(one is not None and one.p99 > LAG_MS for one in (report.lag_ms, report.stall_ms))


def table(report: Report) -> str:
    """For people."""
    failures = [f"{one.count} {why}" + (f" ({one.first})" if one.first else "") for why, one in report.failures.items()]
    refused = f"{report.refused} refused (429"
    if report.retry_after_seconds is not None:
        refused += f", median Retry-After {report.retry_after_seconds:g} s"
    counts = [f"{report.completed} completed", f"{refused})", f"{report.failed} failed"]
    counts += [f"{report.cancelled} cancelled"] if report.cancelled else []
    counts += [f"{report.interrupted} interrupted"] if report.interrupted else []
    lines = [
        ("requests", f"{report.sent} sent: {', '.join(counts)}"),
        ("retried", f"{report.retried}, {report.completed_by_retry} of them completed" if report.retried else ""),
        ("failed", "; ".join(failures)),
        ("time", f"{report.seconds:.2f} s"),
        (
            "speed",
            f"{report.requests_per_second:.2f} requests/s, {_rounded(report.prompt_tokens_per_second)} prompt "
            f"tokens/s, {_rounded(report.output_tokens_per_second)} output tokens/s",
        ),
        (
            "goodput",
            f"{report.goodput:.2f} requests/s ({report.met_slo} answers)" if report.goodput is not None else "",
        ),
        ("lag", f"of this generator: sent {_late(report.lag_ms)} ms late, read {_late(report.stall_ms)} ms"),
    ]
    spreads = [
        ("to the first text (TTFT)", report.ttft_ms),
        ("between pieces of text (ITL)", report.itl_ms),
        ("a token after the first (TPOT)", report.tpot_ms),
        ("to the end (E2E)", report.e2e_ms),
    ]
    names = [field.name for field in dataclasses.fields(Spread)]
    rows = [f"{'milliseconds':31}" + "".join(f"{name:>10}" for name in names)]
    for name, one in spreads:
        cells = dataclasses.astuple(one) if one else ()
        rows.append(f"{name:31}" + ("".join(f"{cell:10,.1f}" for cell in cells) or f"{'-':>10}" * len(names)))
    return "\n".join([f"{name:10}{text}" for name, text in lines if text] + ["", *rows])


def _failures(failed: Sequence[Record]) -> dict[str, Failures]:
    said: dict[str, list[str]] = {}
    for record in failed:
        said.setdefault(record.why, []).append(record.said)
    return {why: Failures(len(all_said), all_said[0]) for why, all_said in said.items()}


def _a_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _tokens_a_second(tokens: Sequence[int | None], seconds: float) -> float | None:
    known = [count for count in tokens if count is not None]
    return _a_second(sum(known), seconds) if known else None


def _late(one: Spread | None) -> str:
    return f"at most {one.max:.1f} (p99 {one.p99:.1f})" if one else "-"


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
