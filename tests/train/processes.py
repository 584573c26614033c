"""Real commands in real processes, on a text and a model that train in seconds."""

import json
import random
import subprocess
import sys

from tests.children import PIPES, environment
from tests.warm import Fork

STEPS = 28
CONFIG = f"""
model:
  layers: 2
  width: 16
  heads: 2
  kv_heads: 1
  head_dim: 8
  hidden: 32
  moe: {{num_experts: 4, hidden: 16, router_options: {{second_expert: random}}}}
mesh: {{data: 8}}
data: {{path: text.jsonl, tokenizer: bytes, sequence_length: 32}}
optimizer: {{warmup_steps: 5}}
train: {{steps: {STEPS}, batch_size: 8, sample_tokens: 0}}
checkpoint: {{every: 4, keep: 3}}
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


def start(folder, *arguments, module="gshardx.train"):
    """``python -m module arguments`` in ``folder``, its imports done."""
    return Fork(["-m", module, *arguments], cwd=folder, env=environment(), **PIPES)


def start_anew(folder, *arguments, module="gshardx.train", env=None):
    """The same with nothing done before."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=folder, env=env or environment(), **PIPES)


def start_training(folder, run, *more, start=start, **options):
    return start(folder, "--config", "tiny.yaml", "--run_dir", str(run), *more, **options)


def finish(process, expected=0, limit=300):
    """Its output and errors, once it has ended as expected."""
    out, err = process.communicate(timeout=limit)
    assert process.returncode == expected, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learning(run):
    """What a step computed, of every step."""
    return [{k: v for k, v in line.items() if k.startswith(("step", "learning", "moe"))} for line in lines_of(run)]


def content(run, step):
    """Every file of a checkpoint's arrays and iterator, byte for byte (compression is deterministic)."""
    folder = run / "checkpoints" / str(step)
    skipped = ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json", "_METADATA", "array_metadatas")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in str(path) for part in skipped)
    }
