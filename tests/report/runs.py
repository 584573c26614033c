"""Folders of runs with made-up numbers, in the formats that the trainer writes."""

import json
import math
import random
import zlib

BUCKETS = {"init": 4.0, "compile": 21.0, "data_wait": 3.5, "step": 410.0, "checkpoint_stall": 6.0, "restore": 0.0,
           "lost_work": 0.0, "evaluation": 12.0}  # fmt: skip
BEGAN = 1_790_000_000.0
FAULTS = [
    (0, 0, "start", "started"), (5, 20, "checkpoint", "saved"), (6, 40, "checkpoint", "saved"),
    (7, 60, "skipped_step", "gradients are not finite"), (8, 120, "rollback", "back to step 100"),
    (9, 150, "start", "resumed from step 150"), (11, 400, "end", "finished"),
]  # fmt: skip


def write_run(
    folder,
    steps=400,
    layers=2,
    experts=8,
    every=1,
    sources=(),
    collapsed=False,
    seed=0,
    goodput=None,
    events=None,
    **keys,
):
    """A run that learns; ``collapsed``: its last router sends all to two experts from the middle on."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    (folder / "config.yaml").write_text(_config(steps, layers, experts, seed, **keys))
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(every, steps + 1, every):
            out.write(json.dumps(metrics(draw, step, steps, layers, experts, sources, collapsed)) + "\n")
    with (folder / "expert_load.jsonl").open("w") as out:
        apart = max(1, steps // 200)
        for step in range(apart, steps + 1, apart):
            loads = [load(draw, step / steps, experts, collapsed and layer == layers - 1) for layer in range(layers)]
            out.write(json.dumps({"step": step, "load": loads}) + "\n")
    seconds = BUCKETS | (goodput or {})
    (folder / "goodput.json").write_text(json.dumps({"seconds": seconds, "step": steps, "starts": 1, "until": BEGAN}))
    write_events(folder, events or [(0, 0, "start", "started"), (500, steps, "end", "finished")])
    return folder


def write_events(folder, events):
    """(seconds since the start, step, event, text)"""
    with (folder / "events.jsonl").open("w") as out:
        for seconds, step, kind, text in events:
            line = {"time": BEGAN + seconds, "step": step, "event": kind, "text": text}
            if kind == "start":
                line |= {"versions": {"gshardx": "0.1.0", "jax": "0.10.2", "python": "3.11.9"}, "devices": "8 x cpu",
                         "processes": 1, "command": "python -m gshardx.train --config tiny.yaml"}  # fmt: skip
            out.write(json.dumps(line) + "\n")


def metrics(draw, step, steps, layers, experts, sources=(), collapsed=False):
    """One line."""
    done = step / steps
    loss = 2.1 + 6 * math.exp(-6 * done) + draw.gauss(0, 0.08)
    bad = collapsed and done > 0.5
    line = {
        "step": step, "learning/loss": loss, "learning/aux_loss": 1.1,
        "learning/grad_norm": math.exp(draw.gauss(-0.7, 0.3)),
        "learning/current_learning_rate": 0.01 * min(1, done * 20) * (0.52 + 0.48 * math.cos(math.pi * done)),
        "guard/skipped_steps": 0.0, "guard/rollbacks": 0.0, "data/skipped": 0.0, "perf/step_seconds": 0.02,
        "perf/tokens_per_second": 1e5 * (1 + draw.gauss(0, 0.02)) * (0.6 if draw.random() < 0.01 else 1),
        "perf/mfu": 0.41,
    }  # fmt: skip
    for layer in range(layers):
        gone = bad and layer == layers - 1
        line |= {
            f"moe/layer_{layer}/entropy": math.log(experts) * (0.02 if gone else 0.9 - 0.3 * done)
            + draw.gauss(0, 0.004),
            f"moe/layer_{layer}/drop_fraction": 0.62 if gone else 0.03 + 0.02 * layer / layers + draw.random() * 0.01,
            f"moe/layer_{layer}/load_max_over_mean": experts / 2 if gone else 1.3 + 0.3 * draw.random(),
            f"moe/layer_{layer}/dead_experts": experts - 2.0 if gone else 0.0,
        }
    for name in ("entropy", "drop_fraction", "load_max_over_mean", "dead_experts"):
        line[f"moe/{name}"] = sum(line[f"moe/layer_{layer}/{name}"] for layer in range(layers)) / layers
    if step % max(1, steps // 20) == 0:
        line |= {
            "evaluation/loss": loss + 0.1,
            "evaluation/bits_per_byte": loss / 2,
            "evaluation/token_accuracy": 0.7 - loss / 12,
        }
        for source in sources:
            harder = 0.6 + zlib.crc32(source.encode()) % 100 / 100
            line |= {f"evaluation/{source}/loss": loss * harder,
                     f"evaluation/{source}/bits_per_byte": loss * harder / 2,
                     f"evaluation/{source}/token_accuracy": 0.6 / harder}  # fmt: skip
    return line


def load(draw, done, experts, collapsed=False):
    """Shares over the mean; 1.0 is balance."""
    if collapsed and done > 0.5:
        return [experts / 2 if expert in (1, experts - 2) else 0.0 for expert in range(experts)]
    spread = 0.15 + 0.35 * math.exp(-5 * done)
    raw = [math.exp(draw.gauss(0, 0.1) + spread * math.sin(7.0 * expert + 1)) for expert in range(experts)]
    return [round(one * experts / sum(raw), 4) for one in raw]


def _config(steps, layers, experts, seed, name="gshard"):
    return f"""run_dir: somewhere
seed: {seed}
model:
  layers: {2 * layers}
  width: 512
  moe: {{num_experts: {experts}, top_k: 2, router: {name}, losses: {{balance: 0.01}}}}
train: {{steps: {steps}, batch_size: 16}}
optimizer: {{name: adamw, learning_rate: {0.01 / (1 + seed)}}}
"""
