"""Requests that use everything get over HTTP what the engine says itself, token for token."""

import asyncio
import dataclasses
import json

import httpx
import pytest

from tests.infer.answers import answered
from tests.infer.server.conftest import ROOMY
from tests.infer.test_engine import mixed


def test_the_engines_mix_through_http(served, tiny):
    check_mix(served, tiny, 40)


@pytest.mark.sweep
def test_a_thousand_requests_through_http(served, tiny):
    check_mix(served, tiny, 1000)


def check_mix(served, tiny, count):
    requests = [
        dataclasses.replace(one, params=dataclasses.replace(one.params, experts=False)) for one in mixed(11, count)
    ]
    expected = answered(tiny.engine(ROOMY), requests)
    bodies = [body_of(one, stream=number % 2 == 0) for number, one in enumerate(requests)]

    async def ask_all():
        async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
            gate = asyncio.Semaphore(48)

            async def ask(body):
                async with gate:
                    found = await client.post("/v1/completions", json=body)
                assert found.status_code == 200, found.text
                return events(found.text) if body["stream"] else [found.json()]

            return await asyncio.gather(*(ask(body) for body in bodies))

    for request, found in zip(requests, asyncio.run(ask_all()), strict=True):
        choices = whole_choices(found)
        for choice in range(request.params.n):
            own, said = expected[request.id, choice], choices[choice]
            assert said["text"] == own.text
            assert said["finish_reason"] == own.reason
            if request.params.logprobs is not None:
                assert said["logprobs"]["token_logprobs"] == [one.logprob for one in own.logprobs]


def body_of(request, stream):
    params = request.params
    return {
        "prompt": request.prompt.tolist(),
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": {str(token): value for token, value in params.logit_bias.items()},
        "seed": params.seed,
        "n": params.n,
        "logprobs": params.logprobs,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_tokens),
        **(
            {"response_format": {"type": "json_schema", "json_schema": {"schema": json.loads(params.json_schema)}}}
            if params.json_schema
            else {}
        ),
        "stream": stream,
    }


def whole_choices(parts):
    """Of an answer, in one part or many, by index."""
    whole = {}
    for choice in (choice for one in parts for choice in one["choices"]):
        said = whole.setdefault(choice["index"], {"text": "", "logprobs": {"token_logprobs": []}})
        said["text"] += choice["text"]
        said["finish_reason"] = choice["finish_reason"]
        if choice["logprobs"]:
            said["logprobs"]["token_logprobs"] += choice["logprobs"]["token_logprobs"]
    return whole


def events(text):
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
