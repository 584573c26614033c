"""Whatever is sent, the server answers as its schema says, tells nothing of its inside, and goes on serving others."""

import json
import random
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from gshardx.infer.server.app import build_app
from gshardx.infer.server.limits import Limits
from gshardx.infer.server.metrics import Timings
from tests.infer.server.malformed import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    INSIDE,
    TOKENIZE,
    Trial,
    check,
    overheard,
    send,
    trial,
    watched,
    wire,
)

PLAIN = {"prompt": "To be", "max_tokens": 4, "temperature": 0}
SCHEMA = build_app(types.SimpleNamespace(limits=Limits(), timings=Timings(), keys=None)).openapi()
API = schemathesis.openapi.from_dict(
    SCHEMA, config=SchemathesisConfig.from_dict({"seed": 0, "generation": {"mode": "all"}})
)
load_all_checks()
UNCHECKED = [
    CHECKS.get_one(name)
    for name in (
        *("ignored_auth", "missing_required_header"),  # this server has no keys
        "positive_data_acceptance",  # no schema says how long a prompt may be, or what templates take
        "negative_data_rejection",  # "1" is taken for 1
    )
]


def tame(body):
    """What is right about ``body``, made such that the engine has something to do, and little."""
    for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 2)):
        if type(body.get(name)) in (int, float):
            body[name] = max(1, min(body[name], most))
    if isinstance(body.get("prompt"), str):
        body["prompt"] = body["prompt"][:20] or "Hi"
    if isinstance(body.get("response_format"), dict) and isinstance(body["response_format"].get("json_schema"), dict):
        body["response_format"]["json_schema"]["schema"] = {"type": "integer"}
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if isinstance(body.get("messages"), list) and all(isinstance(one, dict) for one in body["messages"]):
        body["messages"] = [{"role": "user", "content": "Hi"} for _ in body["messages"]]
        body.setdefault("max_tokens", 4)


@pytest.mark.slow
@API.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_schema_says(case, served):
    if isinstance(case.body, dict):
        tame(case.body)
    response = case.call(base_url=served.url, timeout=60)
    assert response.status_code < 500
    assert not INSIDE.search(response.text)
    case.validate_response(response, excluded_checks=UNCHECKED)  # raises AssertionErrors, one for each difference


def test_the_schema_is_what_is_served(served):
    assert served.get("/openapi.json").json() == SCHEMA
    assert "422" not in json.dumps(SCHEMA)


def attempt(served, seed):
    """Whether a request drawn from ``seed`` was answered."""
    drawn = trial(random.Random(seed), served.server.limits.max_body)
    try:
        answer = send(served.url, drawn)
        if answer is not None:
            check(drawn, answer)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {drawn.method} {drawn.path[:60]}: {drawn.wire[:400]!r}") from error
    return answer is not None


def say(served):
    """The answer to a good request."""
    answer = served.post(COMPLETIONS, PLAIN)
    assert answer.status_code == 200
    return answer.json()["choices"][0]["text"]


@pytest.mark.sweep
def test_ten_thousand_malformed_requests_harm_nobody(served):
    expected, answered = say(served), 0
    with watched(served.url) as gaps, overheard() as errors, ThreadPoolExecutor(4) as pool:
        for first in range(0, 10_000, 500):
            answered += sum(pool.map(lambda seed: attempt(served, seed), range(first, first + 500)))
            assert say(served) == expected
    served.until_idle()
    assert answered > 9000
    assert not errors
    assert max(gaps) < 3


def test_a_path_with_one_slash_more_is_another(served):
    answer = served.post(f"{TOKENIZE}/", {"prompt": "a"})
    assert answer.status_code == 404
    check(
        Trial("POST", TOKENIZE, b""), send(served.url, Trial("POST", TOKENIZE, wire("POST", f"{TOKENIZE}/", [], b"")))
    )


def test_where_a_body_stops_being_json_is_told(served):
    answer = served.post(TOKENIZE, content='{"prompt": "a" "b"}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert said == "the body is not JSON: Expecting ',' delimiter at character 15"


MANY = 200_000


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COMPLETIONS, {"prompt": [None] * MANY}, "prompt"),
        (COMPLETIONS, {"prompt": [[-1] * 2000] * 100}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {f"x{n}": 1 for n in range(60_000)}}, "logit_bias: 60,000 tokens"),
        (CHAT, {"messages": [None] * MANY}, "messages.0"),
        (DETOKENIZE, {"tokens": [-1] * MANY}, "tokens.0"),
        (DETOKENIZE, {f"x{n}": 1 for n in range(60_000)}, "unknown field 'x0'; did you mean tokens?"),
    ],
)
def test_many_errors_hold_nobody_up(served, path, body, said):
    longest = []
    for _ in range(3):  # others use this machine too
        with watched(served.url) as gaps:
            answer = served.post(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(said)
        longest.append(max(gaps, default=0))
    assert min(longest) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "prompt", "status"),
    [(TOKENIZE, "hello " * 150_000, 200), (COMPLETIONS, ["hello " * 680] * 128, 400)],
    ids=["one", "many"],
)
def test_long_texts_hold_nobody_up(served, path, prompt, status):
    shares = []
    for _ in range(3):
        with watched(served.url) as gaps:
            began = time.monotonic()
            answer = served.post(path, {"prompt": prompt})
            took = time.monotonic() - began
        assert answer.status_code == status
        shares.append(max(gaps) / took)
    assert min(shares) < 0.5


@pytest.mark.slow
def test_schemas_that_take_long_hold_no_chats_up(served):
    schema = {"type": "integer", "multipleOf": 99_999_989}

    def bomb():
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = served.post(COMPLETIONS, PLAIN | {"response_format": form})
        assert answer.status_code == 400
        assert "too much time or memory" in answer.json()["error"]["message"]

    with ThreadPoolExecutor(8) as pool:
        bombs = [pool.submit(bomb) for _ in range(8)]
        time.sleep(0.5)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert served.post(CHAT, chat).status_code == 200
        assert sum(one.done() for one in bombs) < 4
        for one in bombs:
            one.result()
