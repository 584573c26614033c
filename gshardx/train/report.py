"""What a finished run shows: how good it is, a sample of its text, and what to do next."""

import textwrap
from collections.abc import Callable

import numpy as np

from gshardx.models.build import Variables
from gshardx.models.generator import Generator, SamplingOptions
from gshardx.train.evaluate import BITS_PER_BYTE, xz_bits_per_byte
from gshardx.train.goodput import Goodput, in_words
from gshardx.train.job import Job
from gshardx.train.metrics import Scalars
from gshardx.train.run_dir import RunDir
from gshardx.train.text import Text


def report(
    job: Job,
    run: RunDir,
    text: Text,
    variables: Variables,
    scores: Scalars,
    command: str,
    goodput: Goodput,
    say: Callable[[str], None],
) -> None:
    """Sample, and print the run's summary; ``scores``: of held-out text."""
    xz = xz_bits_per_byte(text)
    documents, size = len(text.held_out.documents), sum(text.held_out.sizes)
    say(f"\nvalidation  {scores[BITS_PER_BYTE]:.3f} bits per byte on {documents} held-out document(s), {size:,} bytes")
    if xz is not None:
        say(f"            ({xz:.3f} for xz -9e, which reads the training text first)")
    leak = job.blueprint.bind(job.blueprint.params).stack.router.leak
    if leak is not None:
        say(f"no sample   router {job.config.model.moe.router}: {leak}; so these bits are better than the model is")
    elif job.config.train.sample_tokens:
        say(f"sample      {_sample(job, variables, text)}")
    say(f"goodput     {in_words(goodput.seconds)}")
    say(f"run         {run.path}")
    say(f"resume      {command}")
    if leak is None:
        say(f'generate    python -m gshardx.infer generate --run {run.path} --prompt "To be" --max_new_tokens 100')
    say(f"look        python -m gshardx.report {run.path}, or tensorboard --logdir {run.path}")


def _sample(job: Job, variables: Variables, text: Text) -> str:
    """Text that follows the end token, that is, the start of a document."""
    count = job.config.train.sample_tokens
    generator = Generator(
        job.blueprint, variables, job.mesh, length=count + 1, rows=job.config.mesh.batch_shards, chunk=1
    )
    start = [np.asarray([text.tokenizer.end], np.int32)]
    tokens = [one.token for one in generator.generate(start, count, SamplingOptions(temperature=0.8))]
    return textwrap.indent(text.tokenizer.decode(tokens), " " * 12).strip()
