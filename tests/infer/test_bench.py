"""``infer bench`` against a server that does known things at known times."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from gshardx.errors import BadInput
from gshardx.infer import bench
from tests.infer.fake_server import FIRST, NEXT, RETRY_AFTER, FakeServer, serving

DEAD = "http://127.0.0.1:9"  # nobody listens on the port of "discard"


@pytest.fixture(scope="module")
def served():
    server = FakeServer()
    with serving(server.app) as url:
        yield server, url


@pytest.fixture
def server(served):
    served[0].reset()
    yield served[0]
    assert ended(served[0])


@pytest.fixture
def sent(server, served, tmp_path, capsys):
    """Run the command with flags against the server; the report of ``--json``."""

    def run(*flags, prompts=None, code=0):
        if prompts is not None:
            lines = [json.dumps({"at": 0, "prompt": prompt, "max_tokens": 3}) for prompt in prompts]
            (tmp_path / "trace.jsonl").write_text("\n".join(lines))
            flags = (*flags, "--trace", str(tmp_path / "trace.jsonl"))
        assert command("--url", served[1], "--json", *flags) == code
        return json.loads(capsys.readouterr().out)

    return run


def ended(server):
    """Whether all that the server began comes to an end."""
    deadline = time.monotonic() + 5
    while server.open and time.monotonic() < deadline:
        time.sleep(0.005)
    return server.open == 0


def command(*flags):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.bench(parser.parse_args(flags))


def test_each_request_is_counted_as_what_became_of_it(sent, server):
    found = sent(
        "--timeout", "1.5",
        prompts=["fine", "empty", "error frame", "error line", "malformed", "cut off", "torn", "busy", "broken",
                 "stuck", "fine", "busy"],
    )  # fmt: skip
    assert (found["sent"], found["completed"], found["refused"], found["failed"]) == (12, 2, 2, 8)
    assert (found["cancelled"], found["interrupted"], found["retried"]) == (0, 0, 0)
    assert found["retry_after_seconds"] == RETRY_AFTER
    failures = {why: (one["count"], one["first"]) for why, one in found["failures"].items()}
    cut = failures.pop("cut off")
    assert cut[0] == 2
    assert "without a finish_reason" in cut[1] or "RemoteProtocolError" in cut[1]
    assert failures == {
        "empty": (1, "a finish_reason and no text"),
        "error frame server_error": (1, "out of memory"),
        "error frame 500": (1, "context shift"),
        "malformed": (1, "{"),
        "HTTP 500": (1, "no such thing"),
        "timeout": (1, ""),
    }


def test_times_are_the_servers(sent, server):
    found = sent("--requests", "4", "--rate", "50", "--max_tokens", "4", "--slo_ttft_ms", "1e6")
    assert found["completed"] == 4
    ttft, itl, tpot, e2e = (found[f"{name}_ms"] for name in ("ttft", "itl", "tpot", "e2e"))
    for spread, least in ((ttft, FIRST), (tpot, NEXT), (itl, NEXT), (e2e, FIRST + 3 * NEXT)):
        assert 0.9 * least < spread["mean"] / 1e3 < 20 * least
    assert e2e["p50"] > ttft["p50"]
    assert found["output_tokens_per_second"] == pytest.approx(16 / found["seconds"])
    assert found["prompt_tokens_per_second"] == pytest.approx(28 / found["seconds"]), "what the server counts: 7 each"
    assert found["goodput"] == found["requests_per_second"]


def test_arrivals_do_not_wait_for_answers(sent, server):
    found = sent("--rate", "inf", "--requests", "12", "--max_tokens", "6")
    assert server.most_at_once > 6
    assert found["completed"] == 12


def test_an_answered_request_leaves_its_connection_to_the_next(sent, server, tmp_path):
    trace = tmp_path / "apart.jsonl"
    trace.write_text('{"at": 0, "max_tokens": 1}\n{"at": 0.3, "max_tokens": 1}\n')
    assert sent("--trace", str(trace))["completed"] == 2
    assert len(set(server.ports)) == 1


def test_what_is_sent_is_what_the_flags_say(sent, server, monkeypatch):
    sent("--requests", "1", "--prompt_tokens", "5", "--max_tokens", "2")
    body = server.bodies.pop()
    assert len(body.pop("prompt").split()) == 5
    assert body.pop("stream_options") == {"include_usage": True}
    assert body == {"model": "first-model", "max_tokens": 2, "temperature": 0.0, "stream": True}
    assert "authorization" not in server.headers.pop()
    monkeypatch.setenv("GSHARDX_API_KEY", "from-outside")
    sent("--requests", "1", "--model", "mine", "--temperature", "0.5", "--ignore_eos", "--max_tokens", "1")
    body = server.bodies.pop()
    assert (body["model"], body["temperature"], body["ignore_eos"]) == ("mine", 0.5, True)
    assert server.headers.pop()["authorization"] == "Bearer from-outside"
    assert "given" not in json.dumps(sent("--requests", "1", "--api_key", "given", "--max_tokens", "1"))
    assert server.headers.pop()["authorization"] == "Bearer given"


def test_separators_that_json_holds_and_carriage_returns_end_no_line(sent, server):
    found = sent(prompts=["separators", "carriage returns", "no usage"])
    assert found["completed"] == 3, found["failures"]


def test_a_refused_request_comes_again_once_after_its_time(sent, server):
    found = sent("--retry", prompts=["busy at first", "busy", "busy, no word of when"])
    assert (found["sent"], found["retried"]) == (3, 2)
    assert (found["completed"], found["completed_by_retry"], found["refused"]) == (1, 1, 4)
    assert found["ttft_ms"]["mean"] >= 1e3 * (RETRY_AFTER + FIRST), "its wait is part of what its sender waits"
    assert found["lag_ms"]["max"] < 1e3 * RETRY_AFTER
    assert len(server.bodies) == 5


def test_clients_vanish_and_the_server_sees_it(sent, server):
    found = sent("--requests", "20", "--rate", "200", "--max_tokens", "30", "--cancel", "1", "--seed", "2")
    assert (found["cancelled"], found["completed"], found["failed"]) == (20, 0, 0)
    assert ended(server)
    assert len(server.gone) >= 10, "those that left before the answer began may leave no trace"


def test_what_the_generator_is_late_with_is_in_the_times(sent, server, monkeypatch):
    def slow(*given):
        for one in plan(*given):
            time.sleep(0.05)
            yield one

    plan = bench.plan
    monkeypatch.setattr(bench, "plan", slow)
    found = sent("--requests", "3", "--rate", "1000", "--max_tokens", "1")
    assert found["lag_ms"]["max"] >= 140
    assert found["ttft_ms"]["max"] >= 140 + 1e3 * FIRST


def test_a_late_generator_warns_in_one_line(served, server, monkeypatch, capsys):
    for limit, lines in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr("gshardx.infer.measure.LAG_MS", limit)
        assert command("--url", served[1], "--requests", "1", "--max_tokens", "1") == 0
        warned = capsys.readouterr().err
        assert warned.count("\n") == lines
        assert warned.count("warning: the generator was over") == lines


def test_people_get_a_table(served, server, capsys):
    address = served[1] + "/v1/"  # as other tools have it
    assert command("--url", address, "--requests", "2", "--rate", "inf", "--max_tokens", "2") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"server    {served[1]}, model first-model\nrequests  2 sent: 2 completed, 0 refused (429)")
    assert "to the first text (TTFT)" in said


@pytest.fixture
def interruptible():
    """As started by hand: a shell's background jobs ignore SIGINT, and so do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_reports_what_was_done(sent, server):
    def interrupt():
        if len(server.bodies) == 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    server.on_request = interrupt
    started = time.monotonic()
    found = sent("--retry", prompts=["busy", "stuck", "stuck"], code=130)
    assert time.monotonic() - started < 5
    assert (found["sent"], found["retried"], found["completed"], found["failed"]) == (3, 1, 0, 0)
    assert found["refused"] + found["interrupted"] == 4, "the retry is one or the other"
    assert found["interrupted"] >= 2


def test_a_proxy_of_the_environment_is_not_asked(sent, server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, DEAD)
    assert sent("--requests", "1", "--max_tokens", "1")["completed"] == 1


@pytest.mark.parametrize("url", [DEAD, "localhost:8000", "http://[", "no address"])
def test_an_address_where_nobody_answers_is_named(url, capsys):
    with pytest.raises(BadInput) as error:
        command("--url", url)
    assert str(error.value).startswith(f"--url {url}: can't be reached (")
    assert "; start the server, or mend the address" in str(error.value)


def test_a_server_without_models_asks_for_a_name(served, server):
    server.models = []
    with pytest.raises(BadInput, match=r"GET /v1/models lists no model \(HTTP 200: .*; give --model, or --api_key"):
        command("--url", served[1])
    assert command("--url", served[1], "--model", "mine", "--requests", "1", "--max_tokens", "1") == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--requests", "0"], "--requests 0: must be 1 or more"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--cancel", "1.5"], "--cancel 1.5: must be 0 to 1"),
        (["--cancel", "nan"], "--cancel nan: must be 0 to 1"),
        (["--seconds", "0"], "--seconds 0.0: must be over 0"),
        (["--timeout", "inf"], "--timeout inf: must be over 0"),
        (["--slo_itl_ms", "-4"], "--slo_itl_ms -4.0: must be over 0"),
        (["--rate", "often"], "--rate often: must be requests per second over 0"),
        (["--rate", "inf", "--seconds", "3"], "--rate inf sends all at once, not for a time"),
        (["--rate", "2", "--trace", "x.jsonl"], "--rate and --trace both say when"),
        (["--trace", "x.jsonl"], "x.jsonl: can't be read"),
        (["--prompt_tokens", "uniform:5"], "--prompt_tokens uniform:5: no distribution"),
        (["--max_tokens", "0"], "--max_tokens 0: no distribution"),
        (["--api_key", "two\nlines"], "--api_key (or GSHARDX_API_KEY): has characters"),
    ],
)
def test_a_setting_that_cant_be_is_named_before_anything_is_sent(flags, said):
    with pytest.raises(BadInput) as error:
        command("--url", DEAD, *flags)
    assert str(error.value).startswith(said)


def test_a_number_and_a_time_and_neither_end_the_sending(sent, server):
    assert sent("--rate", "1e5", "--max_tokens", "1")["sent"] == bench.REQUESTS
    server.reset()
    found = sent("--rate", "40", "--seconds", "0.5", "--max_tokens", "1", "--seed", "1")
    assert 8 <= found["sent"] <= 34
    assert sent("--rate", "40", "--seconds", "0.5", "--requests", "3", "--max_tokens", "1")["sent"] == 3


def test_it_starts_without_jax():
    code = "import gshardx.infer.bench, gshardx.infer.send, sys; print(*{'jax', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []
