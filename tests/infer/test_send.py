"""One request at a time against a server that does known things; the whole command is in ``test_bench.py``."""

import asyncio
import contextlib
import time

import pytest

from gshardx.infer.send import Clients, send
from tests.infer.fake_server import FIRST, FakeServer, serving


@pytest.fixture(scope="module")
def url():
    with serving(FakeServer().app) as address:
        yield address


def records(url, *prompts, leave_after=None, timeout=5.0, early=0.0):
    """Of requests one after another, each due ``early`` seconds before it is sent."""

    async def ask():
        async with contextlib.aclosing(Clients(url, {})) as clients:
            return [
                await send(
                    clients, {"prompt": prompt, "max_tokens": 3}, leave_after, timeout, time.perf_counter() - early
                )
                for prompt in prompts
            ]

    return asyncio.run(ask())


def test_a_record_says_when_each_text_came_and_what_the_server_counted(url):
    (record,) = records(url, "fine", early=0.5)
    assert (record.outcome, record.why, record.retry) == ("completed", "", False)
    assert (record.prompt_tokens, record.output_tokens) == (7, 3)
    assert 0.5 <= record.sent - record.scheduled < 1
    assert len(record.texts) == 3
    assert record.sent + 0.9 * FIRST < record.texts[0] <= record.texts[1] <= record.texts[2] <= record.ended


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_client_leaves_after_as_many_texts_as_planned(url, count):
    (record,) = records(url, "fine", leave_after=count)
    assert (record.outcome, len(record.texts)) == ("cancelled", count)


def test_a_client_leaves_before_the_server_says_anything(url):
    (record,) = records(url, "slow to begin", leave_after=0)
    assert record.outcome == "cancelled"
    assert record.ended - record.sent < 0.9


def test_a_client_whose_answer_ends_before_it_would_leave_has_it(url):
    (record,) = records(url, "fine", leave_after=4)
    assert record.outcome == "completed"


def test_a_client_is_whole_again_after_each_end(url):
    prompts = ["torn", "fine", "error frame", "fine", "malformed", "fine", "busy", "fine", "broken", "fine"]
    assert [record.outcome for record in records(url, *prompts)] == [
        "failed", "completed", "failed", "completed", "failed", "completed", "refused", "completed", "failed",
        "completed",
    ]  # fmt: skip


def test_open_requests_have_a_client_each_and_later_ones_use_them_again():
    async def use():
        clients = Clients("http://127.0.0.1:9", {})
        async with clients.one() as one, clients.one() as other:
            assert one is not other
        async with clients.one() as again:
            assert again in (one, other)
        await clients.aclose()
        return one.is_closed and other.is_closed

    assert asyncio.run(use())


@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3.0), ("0", 0.0), ("0.5", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None),
                            ("nan", None), ("inf", None)]
)  # fmt: skip
def test_retry_after_is_read_where_it_is_seconds(url, header, seconds):
    (record,) = records(url, f"busy for {header}")
    assert (record.outcome, record.retry_after) == ("refused", seconds)


@pytest.mark.parametrize(
    ("line", "why", "said"),
    [
        ('{"error": "plain"}', "error frame", "plain"),
        ('{"error": {"message": "m", "code": 503, "type": "t"}}', "error frame 503", "m"),
        ('{"error": {}}', "error frame", ""),
        ("3", "malformed", "3"),
        ('{"choices": [4]}', "malformed", '{"choices": [4]}'),
        (
            '{"choices": [], "usage": {"prompt_tokens": 3}}',
            "malformed",
            '{"choices": [], "usage": {"prompt_tokens": 3}}',
        ),
        ('{"choices": []}', "cut off", "the stream ended without a finish_reason"),
    ],
)
def test_frames_that_are_no_text_end_in_a_failure_that_quotes_them(url, line, why, said):
    (record,) = records(url, f"say: {line}")
    assert (record.outcome, record.why, record.said) == ("failed", why, said)
