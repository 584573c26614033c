"""The routes as clients use them: OpenAI's own client, curl, and what they get beside what the engine says itself."""

import asyncio
import json
import math
import shutil
import subprocess
import time

import numpy as np
import openai
import pytest

from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.server.keys import Keys
from tests.infer.answers import answered
from tests.infer.server.conftest import ROOMY
from tests.infer.server.running import serving


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(tiny, prompt, **params):
    """What the engine itself says to the same request."""
    given = SamplingParams(**{"max_new_tokens": 12, "seed": 3, **params})
    answers = answered(tiny.engine_of_its_own, [Request("x", tiny.tokenizer.encode(prompt), given)])
    return [answers["x", choice] for choice in range(given.n)]


@pytest.fixture(scope="module", autouse=True)
def _own_engine(tiny):
    tiny.engine_of_its_own = tiny.engine(ROOMY)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_the_engines(client, tiny, stream):
    expected = alone(tiny, "To be", n=2, temperature=0.7, top_p=0.9)
    said = client.completions.create(
        model="tiny", prompt="To be", max_tokens=12, n=2, seed=3, temperature=0.7, top_p=0.9, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for one in said if stream else [said]:
        usage = one.usage or usage
        for choice in one.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[0], texts[1]] == [one.text for one in expected]
    assert [reasons[0], reasons[1]] == [one.reason for one in expected]
    assert usage.prompt_tokens == 5
    assert usage.completion_tokens == sum(len(one.tokens) for one in expected)


@pytest.mark.parametrize("stream", [False, True])
def test_chats_are_the_default_template(client, tiny, stream):
    expected = alone(tiny, "user: To be\n\nassistant:", logprobs=2)[0]
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "To be"}], max_completion_tokens=12, seed=3, logprobs=True,
        top_logprobs=2, stream=stream,
    )  # fmt: skip
    text, logprobs = "", []
    for one in said if stream else [said]:
        for choice in one.choices:
            text += (choice.delta if stream else choice.message).content or ""
            logprobs += choice.logprobs.content
    assert text == expected.text
    assert [one.logprob for one in logprobs] == [one.logprob for one in expected.logprobs]
    assert b"".join(bytes(one.bytes) for one in logprobs) == bytes_of(tiny, expected.tokens)
    assert [[best.logprob for best in one.top_logprobs] for one in logprobs] == [
        [value for _, value in one.best] for one in expected.logprobs
    ]


def bytes_of(tiny, tokens):
    """Of the test's tokenizer, whose tokens are bytes."""
    names = dict(zip(byte_names(), range(256), strict=True))
    return bytes(names[tiny.tokenizer.inner.id_to_token(token)] for token in tokens)


def byte_names():
    """GPT-2's printable character of each byte, by its published rule."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def test_several_clients_at_once_get_their_own_answers(served, tiny):
    prompts = [f"Act {number}" for number in range(9)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            asked = (client.completions.create(model="tiny", prompt=one, max_tokens=12, seed=3) for one in prompts)
            return [one.choices[0].text for one in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [alone(tiny, prompt)[0].text for prompt in prompts]


def test_several_prompts_in_one_request_keep_their_order(served, tiny):
    body = {"prompt": ["To be", "O Romeo"], "n": 2, "max_tokens": 12, "seed": 3}
    found = served.post("/v1/completions", body).json()
    expected = [one.text for prompt in body["prompt"] for one in alone(tiny, prompt, n=2)]
    assert [(one["index"], one["text"]) for one in found["choices"]] == list(enumerate(expected))
    assert found["usage"]["prompt_tokens"] == 12


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_reads_it(served, tiny):
    """Its ``local-completions`` sums ``token_logprobs[len(context):-1]``, asking for one token more."""
    tokens = tiny.tokenizer.encode("To be, or not to be").tolist()
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    found = served.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == len(tokens) + 1
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1, temperature=0.0)
    request = Request("x", np.asarray(tokens, np.int32), params)
    expected = answered(tiny.engine_of_its_own, [request])["x", 0].prompt_logprobs
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == [one.logprob for one in expected]
    assert [next(iter(one.values())) for one in found["top_logprobs"][1:-1]] == [one.best[0][1] for one in expected]
    assert "".join(found["tokens"][:-1]) == "To be, or not to be"
    assert found["text_offset"][:-1] == list(range(len(tokens)))
    scored = served.post("/v1/completions", {**body, "max_tokens": 0}).json()
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert scored["usage"]["completion_tokens"] == 0


def test_stop_texts_bias_and_end_are_obeyed(served, tiny):
    body = {"prompt": "x", "max_tokens": 20, "seed": 3, "logit_bias": {"66": 100}, "temperature": 0}
    assert served.post("/v1/completions", body).json()["choices"][0]["text"] == "c" * 20
    found = served.post("/v1/completions", {**body, "stop": ["ccc"]}).json()
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == ("", "stop")
    end = {**body, "logit_bias": {str(tiny.tokenizer.end): 100}}
    assert served.post("/v1/completions", end).json()["choices"][0]["finish_reason"] == "stop"
    assert served.post("/v1/completions", {**end, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("stream", [False, True])
def test_json_mode_and_schemas(client, stream):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=100, response_format=form, stream=stream
    )
    text = "".join(one.choices[0].delta.content for one in said) if stream else said.choices[0].message.content
    assert json.loads(text)["n"] in (1, 2)


def test_experts_are_reported_with_their_tokens(served, tiny):
    body = {"prompt": "To be", "max_tokens": 12, "seed": 3, "experts": True, "stream": True}
    chunks = [line for line in served.post("/v1/completions", body).text.split("\n\n") if line.startswith("data: {")]
    choices = [json.loads(chunk[6:])["choices"][0] for chunk in chunks]
    expected = alone(tiny, "To be", experts=True)[0]
    assert [chosen for one in choices for chosen in one.get("experts", [])] == expected.experts
    assert sum(len(one.get("tokens", [])) for one in choices) == len(expected.tokens)


def test_a_seed_is_drawn_where_none_is_given(served):
    body = {"prompt": "To be", "max_tokens": 30}
    texts = {served.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", {"prompt": "x", "max_token": 5}, 400, "did you mean max_tokens"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": "x" * 300}, 400, "over the length of 256"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "nothing is asked for"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "use 'tiny'"),
        ("completions", {"prompt": [70000]}, 400, "no token 70000"),
        ("completions", {"prompt": ["x"] * 128, "n": 128}, 400, "send fewer"),
        ("completions", {"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "json_schema is missing"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "nothing but text",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(served, path, body, status, said):
    found = served.post(f"/v1/{path}", body)
    assert found.status_code == status
    assert said in found.json()["error"]["message"]
    assert "\n" not in found.json()["error"]["message"]


def test_the_clients_own_errors_are_raised(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt", prompt="x")


def test_what_openai_alone_knows_is_ignored(client):
    said = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        user="me",
        store=False,
        metadata={"a": "b"},
    )
    assert said.choices[0].message.role == "assistant"


def test_text_to_tokens_and_back(served, tiny):
    text = "à la carte ☃"
    tokens = served.post("/tokenize", {"prompt": text}).json()
    assert tokens["tokens"] == tiny.tokenizer.encode(text).tolist()
    assert served.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}


def test_a_long_text_is_tokenised_and_refused(served):
    found = served.post("/v1/completions", {"prompt": "word " * 20_000})
    assert found.status_code == 400
    assert served.post("/v1/completions", {"prompt": "x" * (1 << 20)}).status_code == 413


def test_models_health_and_the_page(served, client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert served.get("/health").json()["status"] == "ok"
    assert served.get("/ready").status_code == 200
    page = served.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert served.get("/nowhere").json()["error"]["message"] == "Not Found"


def metrics_of(text):
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


def test_metrics_count_what_happened(served):
    before = metrics_of(served.get("/metrics").text)
    served.post("/v1/completions", {"prompt": "To be", "max_tokens": 10, "ignore_eos": True, "seed": 1})
    served.until_idle()
    found = metrics_of(served.get("/metrics").text)
    change = {name: value - before.get(name, 0) for name, value in found.items()}
    assert change["gshardx_generated_tokens_total"] == 10
    assert change["gshardx_prompt_tokens_total"] == 5
    assert change["gshardx_ttft_seconds_count"] == change["gshardx_request_seconds_count"] == 1
    assert 1 <= change["gshardx_inter_token_seconds_count"] <= 9
    assert change['gshardx_responses_total{path="/v1/completions",status="200"}'] == 1
    chosen = sum(value for name, value in change.items() if name.startswith("gshardx_expert_choices_total"))
    computed = 5 + 9 - change["gshardx_prefix_hit_tokens_total"]
    assert chosen == 2 * computed
    assert found["gshardx_compilations_total"] == found["gshardx_dropped_choices_total"] == 0
    assert found['gshardx_kv_pages{state="held"}'] == 0
    assert math.isclose(found["gshardx_up"], 1)
    stats = served.get("/stats").json()
    assert sum(map(sum, stats["expert_load"])) == sum(
        value for name, value in found.items() if name.startswith("gshardx_expert_choices_total")
    )


def test_keys_are_asked_for_and_may_be_revoked(tiny, tmp_path):
    file = tmp_path / "keys"
    good, gone = "a-good-key-of-some-length", "another-key-of-some-length"
    file.write_text(f"alice: {good}\nbob: {gone}\n")
    file.chmod(0o600)
    with serving(tiny.engine(ROOMY), Keys(file)) as running:
        ask = {"prompt": "x", "max_tokens": 1}

        def status(key):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return running.post("/v1/completions", ask, headers=headers).status_code

        assert [status(key) for key in (None, "wrong", good[:-1], good, gone)] == [401, 401, 401, 200, 200]
        for path in ("/metrics", "/stats", "/v1/models"):
            assert running.get(path).status_code == 401
            assert running.get(path, headers={"Authorization": f"Bearer {good}"}).status_code == 200
        assert running.get("/health").status_code == running.get("/").status_code == 200
        file.write_text(f"alice: {good}\n")
        wait_for(lambda: status(gone) == 401)
        assert status(good) == 200
        running.until_idle()


def wait_for(condition, seconds=5.0):
    """Until it holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_as_in_the_readme(served):
    command = ["curl", "-sS", f"{served.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    body = json.dumps({"prompt": "To be", "max_tokens": 4, "stream": True})
    found = subprocess.run([*command, body], capture_output=True, text=True, timeout=30, check=True).stdout
    assert found.endswith("data: [DONE]\n\n")
