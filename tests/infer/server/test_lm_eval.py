"""EleutherAI's lm_eval against the server. It brings seventy packages: GSHARDX_LM_EVAL names a Python that has it."""

import json
import os
import subprocess

import numpy as np
import pytest

from gshardx.infer.request import Request, SamplingParams
from tests.infer.answers import answered
from tests.infer.server.conftest import ROOMY

PYTHON = os.environ.get("GSHARDX_LM_EVAL")
QUESTIONS = [
    ("To be or not to", [" be", " see"]),
    ("O Romeo, Romeo, wherefore art", [" thou", " Juliet, my Montague"]),
    ("My lord", [", I am", "!"]),
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="GSHARDX_LM_EVAL names no Python with lm_eval[api]")
def test_lm_eval_finds_the_engines_loglikelihoods(served, tiny, tmp_path):
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"question": question, "choices": choices}) + "\n" for question, choices in QUESTIONS)
    )
    (tmp_path / "choices.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    asked = f"model=tiny,base_url={served.url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
    command = [PYTHON, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", asked, "--log_samples",
               "--tasks", "choices", "--include_path", tmp_path, "--output_path", tmp_path / "out"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, env=environment, check=True, timeout=300, cwd=tmp_path)
    (samples,) = (tmp_path / "out").rglob("samples_choices_*.jsonl")
    engine = tiny.engine(ROOMY)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        question, choices = QUESTIONS[sample["doc_id"]]
        for choice, (found, greedy) in zip(choices, (one[0] for one in sample["resps"]), strict=True):
            expected, best = scored(engine, tiny.tokenizer, question, choice)
            assert abs(float(found) - expected) < 1e-4
            assert str(greedy) == str(best)


def scored(engine, tokenizer, question, choice):
    """Of ``choice`` after ``question``: its log-probability, and whether each of its tokens is the best one."""
    context, whole = (tokenizer.encode(text) for text in (question, question + choice))
    request = Request("x", np.asarray(whole), SamplingParams(max_new_tokens=1, prompt_logprobs=1))
    logprobs = answered(engine, [request])["x", 0].prompt_logprobs[len(context) - 1 :]
    return sum(one.logprob for one in logprobs), all(one.token == one.best[0][0] for one in logprobs)
