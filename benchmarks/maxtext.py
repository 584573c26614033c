"""MaxText on simulated CPU devices, by a script that sets it up and prints its speed."""

import os
import re
import tempfile
from pathlib import Path

from commands import last_line
from report import NotMeasured, Row
from shape import MIXTRAL, Shape

HOOKS = Path(__file__).resolve().parent / "hooks"


def measure(script: Path, devices: int, steps: int, shape: Shape) -> Row:
    """What ``script DEVICES STEPS KEY=VALUE...`` prints: ``... median_step_s=SECONDS tokens_per_second=N``."""
    if not script.exists():
        raise NotMeasured("no script; give --maxtext SCRIPT")
    with tempfile.TemporaryDirectory() as folder:
        compiling = Path(folder, "seconds")
        environment = os.environ | {"PYTHONPATH": str(HOOKS), "COMPILE_SECONDS": str(compiling)}
        command = ["bash", str(script), str(devices), str(steps), *arguments(shape, devices)]
        line, peak = last_line(command, environment)
        seconds = float(compiling.read_text()) if compiling.exists() else None
    fields = dict(re.findall(r"(\w+)=([\d.]+)", line))
    if "tokens_per_second" not in fields:
        raise NotMeasured(line)
    return {
        "tokens_per_second": float(fields["tokens_per_second"]),
        "median_step_seconds": float(fields["median_step_s"]),
        "peak_bytes": peak,
        "versions": [version()],
        **({} if seconds is None else {"compile_seconds": seconds}),
        **({"note": "Qwen3-Next's block"} if shape.shared_hidden else {}),
    }


def arguments(shape: Shape, devices: int) -> list[str]:
    """What differs from the script's own shape, which is Mixtral's.

    Of MaxText's blocks with a shared expert Llama 4's refuses a capacity and DeepSeek's has latent attention only; so
    the shape with one takes Qwen3-Next's, with attention in every layer. That has a gate more on attention's output and
    one on the shared expert.
    """
    if shape == MIXTRAL:
        return []
    experts = shape.expert_devices(devices)
    changed = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "base_mlp_dim": shape.expert_hidden,
        "base_moe_mlp_dim": shape.expert_hidden,
        "ici_expert_parallelism": experts,
        "ici_data_parallelism": devices // experts,
    }
    if shape.shared_hidden:
        changed |= {
            "decoder_block": "qwen3_next",
            "inhomogeneous_layer_cycle_interval": 1,
            "norm_topk_prob": True,
            "shared_experts": shape.shared_hidden // shape.expert_hidden,
        }
    return [f"{name}={value}" for name, value in changed.items()]


def version() -> str:
    """Asked of the environment that the script uses."""
    venv = Path(os.environ.get("MAXTEXT_VENV", Path.home() / ".cache" / "maxtext-venv"))
    code = "from importlib.metadata import version as v; print('maxtext', v('maxtext'), 'on jax', v('jax'))"
    try:
        return last_line([str(venv / "bin" / "python"), "-c", code])[0]
    except (OSError, NotMeasured):
        return "maxtext, version unknown"
