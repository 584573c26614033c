"""Real commands in real processes, on a text and a model that train in seconds."""

import json
import random
import subprocess
import sys

from tests.children import environment

CONFIG = """
model:
  layers: 2
  width: 16
  heads: 2
  kv_heads: 1
  head_dim: 8
  hidden: 32
  moe: {num_experts: 4, hidden: 16, router_options: {second_expert: random}}
mesh: {data: 8}
data: {path: text.jsonl, tokenizer: bytes, sequence_length: 32}
optimizer: {warmup_steps: 5}
train: {steps: 60, batch_size: 8, sample_tokens: 0}
checkpoint: {every: 4, keep: 3}
"""


def write_inputs(folder):
    """text.jsonl and tiny.yaml."""
    draw = random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]
    with (folder / "text.jsonl").open("w") as out:
        for _ in range(60):
            out.write(json.dumps({"text": " ".join(draw.choice(words) for _ in range(40))}) + "\n")
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


def start(folder, *arguments, module="gshardx.train", env=None):
    """``python -m module arguments`` in ``folder``."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=env or environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_training(folder, run, *more):
    return start(folder, "--config", "tiny.yaml", "--run_dir", str(run), *more)


def finish(process, expected=0, limit=300):
    """Its output and errors, once it has ended as expected."""
    out, err = process.communicate(timeout=limit)
    assert process.returncode == expected, f"exit {process.returncode}\n{out}\n{err}"
    return out, err
