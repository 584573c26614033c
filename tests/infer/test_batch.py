"""``infer batch`` on real files: in order, restartable, each mistake named."""

import argparse
import json

import pytest

from gshardx.errors import BadInput
from gshardx.infer import batch

LINES = [
    {"prompt": "to be", "max_new_tokens": 9},
    {"prompt": "or not", "id": "second", "n": 2, "seed": 4},
    {"prompt": "", "id": "empty"},
    {"prompt": "x" * 60, "id": "long", "max_new_tokens": 60},
    {"prompt": "question", "temperature": 0, "logprobs": 1, "stop": ["e"], "logit_bias": {"65": 2.5}},
]


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    monkeypatch.setattr(batch, "load_run", lambda path, mesh: model.run())
    write(tmp_path, LINES)
    return tmp_path


def write(place, lines):
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(place, *flags):
    parser = argparse.ArgumentParser()
    batch.add_arguments(parser)
    paths = [str(place / name) for name in ("in.jsonl", "out.jsonl")]
    given = ["--run", "run", "--max_new_tokens", "4", "--max_length", "64", "--batch_size", "2", *flags]
    assert batch.batch(parser.parse_args([*paths, *given])) == 0
    return [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_lines(place, capsys):
    found = run(place)
    assert [line["id"] for line in found] == [1, "second", "empty", "long", 5]
    assert found[0]["usage"] == {"completion_tokens": 9}
    assert [choice["finish_reason"] for choice in found[1]["choices"]] == ["length", "length"]
    assert found[1]["choices"][0]["text"] != found[1]["choices"][1]["text"]
    assert "empty" in found[2]["error"]
    assert "over the length of 64" in found[3]["error"]
    only = found[4]["choices"][0]
    assert len(only["logprobs"][0]["best"]) == 1
    assert "5 answers, 2 of them errors" in capsys.readouterr().out


@pytest.mark.slow
def test_where_it_was_interrupted_it_goes_on(place, capsys):
    whole = run(place)
    text = (place / "out.jsonl").read_text()
    for cut in (0, 5, text.index("\n") + 1, len(text) - 1):
        (place / "out.jsonl").write_text(text[:cut])
        assert run(place) == whole
    capsys.readouterr()
    run(place)
    assert "all 5 answers are there" in capsys.readouterr().out


@pytest.mark.slow
def test_more_refused_lines_than_are_read_ahead_do_not_end_it(place):
    write(place, [*[{"prompt": ""}] * 40, {"prompt": "a"}])
    assert "choices" in run(place)[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ("[1]", 'line 2: no text under "prompt"'),
        ('{"prompt": 3}', 'line 2: no text under "prompt"'),
        ('{"prompt": "a", "temprature": 1}', "line 2: unknown key temprature; did you mean temperature?"),
        ('{"prompt": "a", "top_p": 2}', "line 2: top_p = 2: must be 0 to 1"),
        ('{"prompt": "a", "top_k": "many"}', 'line 2: top_k = "many": of another type'),
        ('{"prompt": "a", "logit_bias": [1]}', "line 2: logit_bias = [1]: of another type"),
        ('{"prompt": "a", "stop": "x", "seed": true}', "line 2: seed = true: of another type"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_starts(place, line, said):
    (place / "in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(BadInput) as error:
        run(place)
    assert said in str(error.value)
    assert not (place / "out.jsonl").exists()


def test_an_output_of_other_requests_is_left_alone(place):
    other = '{"id": "another", "choices": []}\n'
    (place / "out.jsonl").write_text(other)
    with pytest.raises(BadInput, match="line 1: answers another request"):
        run(place)
    assert (place / "out.jsonl").read_text() == other


def test_files_that_cant_be_read_are_named(place):
    (place / "in.jsonl").unlink()
    with pytest.raises(BadInput, match=r"in\.jsonl: can't be read"):
        run(place)
    (place / "in.jsonl").write_text("")
    with pytest.raises(BadInput, match="no lines in it"):
        run(place)
