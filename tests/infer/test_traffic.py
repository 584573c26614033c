"""What is sent when: the distributions asked for, from a seed alone, each mistake named."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.infer.traffic import (
    MOST,
    WORDS,
    Arrival,
    lengths,
    limited,
    plan,
    poisson,
    rate,
    read_trace,
)

SEEDS = st.integers(0, 2**32)


def drawn(text, seed, count):
    draw, generator = lengths(text, "--max_tokens"), np.random.default_rng(seed)
    return [draw(generator) for _ in range(count)]


def planned(seed=0, cancel=0.0, count=200, prompt="uniform:1:20", most="uniform:1:64"):
    arrivals = itertools.islice(poisson(5.0, seed), count)
    return list(plan(arrivals, lengths(prompt, "--prompt_tokens"), lengths(most, "--max_tokens"), cancel, seed))


@given(SEEDS, st.integers(1, MOST))
def test_a_number_alone_is_always_drawn(seed, value):
    assert drawn(str(value), seed, 3) == [value] * 3


@given(SEEDS, st.integers(1, 1000), st.integers(0, 1000))
def test_uniform_lengths_stay_between_their_ends(seed, least, more):
    found = drawn(f"uniform:{least}:{least + more}", seed, 20)
    assert all(type(one) is int and least <= one <= least + more for one in found)


def test_uniform_lengths_are_all_drawn_alike_both_ends_too():
    values, counts = np.unique(drawn("uniform:3:6", 0, 4000), return_counts=True)
    assert list(values) == [3, 4, 5, 6]
    assert counts == pytest.approx([1000] * 4, rel=0.12)


@given(SEEDS, st.integers(1, MOST), st.floats(0, 10))
def test_lognormal_lengths_are_whole_and_from_1(seed, median, sigma):
    assert all(type(one) is int and 1 <= one <= MOST for one in drawn(f"lognormal:{median}:{sigma}", seed, 5))


def test_lognormal_lengths_have_the_median_and_sigma_asked_for():
    logs = np.log(drawn("lognormal:1000:0.5", 1, 4000))
    assert np.exp(np.median(logs)) == pytest.approx(1000, rel=0.04)
    assert logs.std() == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "many", "64:64", "uniform", "uniform:5", "uniform:9:3", "uniform:0:3", "uniform:1:x", "²",
     "lognormal:64", "lognormal:64:-1", "lognormal:64:nan", "lognormal:0:1", "normal:3:4", "9" * 5000],
)  # fmt: skip
def test_what_is_no_distribution_is_named_with_its_flag(text):
    with pytest.raises(BadInput, match=r"^--prompt_tokens .*: no distribution .*; write 64, uniform:16:128"):
        lengths(text, "--prompt_tokens")


def test_poisson_arrivals_come_at_their_mean_rate_and_without_memory():
    at = np.array([arrival.at for arrival in itertools.islice(poisson(20.0, 3), 20_000)])
    assert at[0] == 0
    gaps = np.diff(at)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)
    assert np.mean(gaps > 1 / 20) == pytest.approx(np.exp(-1), rel=0.05)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.03)


def test_an_infinite_rate_is_all_at_once():
    assert {arrival.at for arrival in itertools.islice(poisson(rate("inf"), 0), 50)} == {0.0}


@pytest.mark.parametrize("text", ["0", "-1", "nan", "fast", ""])
def test_what_is_no_rate_is_named(text):
    with pytest.raises(BadInput, match=rf"^--rate {text}: must be requests per second over 0"):
        rate(text)


@given(st.lists(st.floats(0, 100)).map(sorted), st.none() | st.integers(0, 20), st.none() | st.floats(0.1, 100))
def test_the_first_of_arrivals_are_sent_up_to_number_and_time(times, requests, seconds):
    found = [arrival.at for arrival in limited(map(Arrival, times), requests, seconds)]
    assert found == [at for at in times if seconds is None or at < seconds][:requests]


def test_a_seed_says_all_and_another_says_otherwise():
    assert planned(seed=4) == planned(seed=4)
    assert all(one != other for one, other in zip(planned(seed=4), planned(seed=5), strict=True))


def test_what_is_drawn_for_one_purpose_changes_no_other():
    before, after = planned(), planned(cancel=0.5)
    assert [one[:3] for one in before] == [one[:3] for one in after]
    more = planned(most="uniform:100:200")
    assert [(one.at, one.prompt) for one in before] == [(one.at, one.prompt) for one in more]


def test_prompts_are_of_as_many_words_as_tokens_and_differ():
    prompts = [one.prompt.split(" ") for one in planned(prompt="12")]
    assert all(len(prompt) == 12 and set(prompt) <= set(WORDS) for prompt in prompts)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts), "no prefix cache helps"


def test_a_share_of_the_clients_leaves_within_the_answer_the_waiting_ones_most_often():
    assert all(one.leave_after is None for one in planned())
    everybody = planned(cancel=1.0, count=2000, most="64")
    assert {one.leave_after for one in everybody} >= {0, 1, 2, 3, 62}
    assert all(0 <= one.leave_after < 64 for one in everybody)
    assert np.mean([one.leave_after == 0 for one in everybody]) == pytest.approx(1 / 6, rel=0.15)
    assert np.mean([one.leave_after is None for one in planned(cancel=0.3, count=2000)]) == pytest.approx(0.7, rel=0.05)


def written(place, *lines):
    file = place / "trace.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return file


def test_a_trace_is_sent_in_order_of_time_and_what_a_line_lacks_is_drawn(tmp_path):
    trace = read_trace(
        written(
            tmp_path,
            '{"at": 2.5, "prompt_tokens": 3, "max_tokens": 9}',
            '{"at": 0, "prompt": "as it is"}',
            '{"at": 1.0}',
        )
    )
    found = list(plan(trace, lengths("5", "--prompt_tokens"), lengths("7", "--max_tokens"), 0.0, 0))
    assert [(one.at, len(one.prompt.split()), one.max_tokens) for one in found] == [(0, 3, 7), (1, 5, 7), (2.5, 3, 9)]
    assert found[0].prompt == "as it is"


def test_a_line_of_a_trace_changes_no_length_of_the_next(tmp_path):
    traces = [
        read_trace(written(tmp_path, line, '{"at": 1}'))
        for line in ('{"at": 0}', '{"at": 0, "prompt_tokens": 4, "max_tokens": 4}')
    ]
    sizes = lengths("uniform:1:1000", "--max_tokens")
    one, other = (list(plan(trace, sizes, sizes, 0.5, 0))[1] for trace in traces)
    assert (one.max_tokens, len(one.prompt.split())) == (other.max_tokens, len(other.prompt.split()))
    assert one.leave_after == other.leave_after


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("at 3", "line 2: not JSON"),
        ("[3]", 'line 2: no time under "at"'),
        ('{"prompt": "a"}', 'line 2: no time under "at"'),
        ('{"at": 1, "max_token": 3}', "line 2: unknown key max_token; did you mean max_tokens?"),
        ('{"at": -1}', "line 2: at = -1: must be seconds after the start"),
        ('{"at": NaN}', "line 2: at = NaN: must be seconds after the start"),
        ('{"at": "1"}', 'line 2: at = "1": must be seconds after the start'),
        ('{"at": 1, "prompt": 3}', "line 2: prompt = 3: must be text"),
        ('{"at": 1, "max_tokens": true}', "line 2: max_tokens = true: must be a whole number"),
        ('{"at": 1, "prompt_tokens": 0}', "line 2: prompt_tokens = 0: must be a whole number"),
        (json.dumps({"at": 1, "max_tokens": MOST + 1}), "must be a whole number from 1 to 10,000,000"),
    ],
)
def test_a_line_of_a_trace_that_cant_be_is_named(tmp_path, line, said):
    file = written(tmp_path, '{"at": 0}', line)
    with pytest.raises(BadInput) as error:
        read_trace(file)
    assert str(error.value).startswith(str(file))
    assert said in str(error.value)


def test_a_trace_that_cant_be_read_or_is_empty_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.jsonl: can't be read"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match=r"trace\.jsonl: no lines in it"):
        read_trace(written(tmp_path))
