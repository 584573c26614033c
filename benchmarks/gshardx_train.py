"""gshardx's own train step on random tokens: its config, its job, its batches. One number of devices a process."""

import resource
import statistics
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from shape import WARM_UP_STEPS, Shape, steady_median

from gshardx.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from gshardx.data.blocks import Mixture
from gshardx.data.corpora import MemoryCorpus
from gshardx.data.pipeline import TrainingRows, training_rows
from gshardx.sharding import MeshConfig, simulate_devices
from gshardx.sharding.startup import keep_memory
from gshardx.train.job import Job
from gshardx.train.state import init_state


def config_of(shape: Shape, devices: int) -> Config:
    """``shape`` with its experts split over as many of ``devices`` as they can be, and its batch over all."""
    moe = MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        every=1,
        router="gshard" if shape.top_k == 2 else "top_k",
        capacity_factor=shape.capacity_factor,
        hidden=shape.expert_hidden,
        shared_hidden=shape.shared_hidden,
    )
    model = ModelConfig(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        moe=moe,
    )
    experts = shape.expert_devices(devices)
    return Config(
        model=model,
        mesh=MeshConfig(data=devices // experts, expert=experts),
        data=DataConfig(vocab_size=shape.vocab, sequence_length=shape.sequence),
        train=TrainConfig(batch_size=shape.batch),
    )


def random_rows(shape: Shape) -> TrainingRows:
    """The product's own batches, of documents that are one sequence of uniformly random tokens each."""
    pieces = np.random.default_rng(0).integers(shape.vocab, size=(16 * shape.batch, shape.sequence + 1), dtype=np.int32)
    blocks = Mixture([MemoryCorpus(list(pieces))], [np.zeros(len(pieces), bool)], [1.0], shape.sequence, "first_fit", 0)
    return training_rows(blocks, shape.sequence, shape.batch)


def measure(devices: int, steps: int, shape: Shape) -> dict[str, Any]:
    """Train ``steps`` steps on ``devices`` simulated devices; call it before anything else uses JAX.

    Raises:
        BadInput: ``shape`` does not divide over ``devices``.
    """
    config = config_of(shape, devices)
    if devices == 1:
        keep_memory()  # as the command does
    simulate_devices(devices)
    job = Job.of(config, vocab=shape.vocab)
    start = time.perf_counter()
    train_step = job.train_step
    compile_seconds = time.perf_counter() - start
    state = init_state(job.blueprint, job.optimizer, config.seed, job.mesh)
    rows = random_rows(shape)
    seconds, dropped, faults = [], [], [page_faults()]
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = train_step(state, job.to_device(next(rows)))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
        faults.append(page_faults())
        dropped.append(float(metrics.stats.drop_fraction.mean()))
    median = steady_median(seconds)
    return {
        "tokens_per_second": shape.tokens_per_step / median,
        "median_step_seconds": median,
        "compile_seconds": compile_seconds,
        "drop_fraction": statistics.median(dropped),
        "page_faults": statistics.median(np.diff(faults)[WARM_UP_STEPS:].tolist()),
        "note": str(config.mesh),
        "versions": [f"gshardx {version('gshardx')} on jax {jax.__version__}"],
    }


def page_faults() -> int:
    """Pages that Linux has mapped for this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
