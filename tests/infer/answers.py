"""What an engine answers, and what one forward pass of the training modules says of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gshardx.layers import Packed
from gshardx.sharding.guard import forbid_compile


@dataclasses.dataclass
class Answer:
    tokens: list
    logprobs: list
    text: str = ""
    reason: str = ""
    error: str = ""
    prompt_logprobs: list = dataclasses.field(default_factory=list)
    experts: list = dataclasses.field(default_factory=list)


def collected(outputs):
    answers = {}
    for one in outputs:
        answer = answers.setdefault((one.id, one.choice), Answer([], []))
        assert not answer.reason, "an output after the last"
        answer.tokens += one.tokens
        answer.logprobs += one.logprobs
        answer.prompt_logprobs += one.prompt_logprobs
        answer.experts += one.experts
        answer.text += one.text
        answer.reason, answer.error = one.finish_reason or "", one.error
    assert all(answer.reason for answer in answers.values())
    return answers


def answered(engine, requests):
    """All at once."""
    for request in requests:
        engine.submit(request)
    with forbid_compile():
        answers = collected(engine.run())
    assert_everything_is_back(engine)
    return answers


def assert_everything_is_back(engine):
    for shard in engine.scheduler.shards:
        assert shard.pool.held == 0
        assert shard.running == []
        assert len(shard.slots) == engine.config.slots
    assert engine.scheduler.waiting == []


def check_against_full_pass(plan, variables, requests, answers):
    """Every reported log-probability and expert, and greedy's choices, by one dropless pass of the training modules."""
    module = plan.bind(jax.device_put(jax.device_get(variables.params), jax.devices()[0]))
    router = jax.device_get(variables.router)

    @jax.jit
    def computed(tokens, real):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _, metrics = module.hidden(tokens, positions, real > 0, Packed.of(real), None, router)
        return jax.nn.log_softmax(module.logits(hidden)), metrics.experts

    whole = [np.concatenate([request.prompt, answers[request.id, 0].tokens]).astype(np.int32) for request in requests]
    tokens, real = (np.zeros((len(whole), -(-max(map(len, whole)) // 8) * 8), np.int32) for _ in range(2))
    for row, sequence in enumerate(whole):
        tokens[row, : len(sequence)], real[row, : len(sequence)] = sequence, 1
    logprobs, experts = map(np.asarray, computed(tokens, real))
    for row, request in enumerate(requests):
        answer, expected, first = answers[request.id, 0], logprobs[row], len(request.prompt) - 1
        for place, logprob in enumerate(answer.logprobs, start=first):
            assert abs(logprob.logprob - expected[place][logprob.token]) < 1e-5
            if request.params.temperature == 0:
                assert logprob.token == expected[place].argmax()
        if request.params.prompt_logprobs is not None:
            assert [logprob.token for logprob in answer.prompt_logprobs] == request.prompt[1:].tolist()
            for place, logprob in enumerate(answer.prompt_logprobs):
                assert abs(logprob.logprob - expected[place][logprob.token]) < 1e-5
        if request.params.experts:
            assert len(answer.experts) >= len(answer.tokens)
            for place, found in enumerate(answer.experts, start=first):
                np.testing.assert_array_equal(found, experts[:, row, place])
