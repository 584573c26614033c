"""How fast training batches come from a tokenised folder, with the model removed; prints one table.

python benchmarks/data.py [--seconds 5] [--sequence_length 256 1024] [--packing first_fit best_fit concatenate]

Documents of random tokens, 20 to 1,500 of them, go into ArrayRecord shards; each row of the table reads them with cold
readers: shuffled, packed, as NumPy arrays. CPU seconds are those of this process; a busy machine does not change them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import Table, goal

from gshardx.data.blocks import Mixture
from gshardx.data.encoding import Encoded
from gshardx.data.faults import Faults
from gshardx.data.pipeline import training_rows
from gshardx.data.records import FORMAT, INDEX, RECORD_TOKENS, RecordCorpus
from gshardx.data.shards import ShardWriter
from gshardx.data.tokenize import write_json

VOCABULARY = 32_000
SHARDS = 4
TRAINING_RATE = 50_000
"""Tokens a second of a training step beside which the pipeline's time is held."""


def write_folder(folder: Path, tokens: int) -> None:
    """What the tokenize command writes, of random documents."""
    draw = np.random.default_rng(0)
    shards = []
    for number in range(SHARDS):
        writer, room = ShardWriter(folder, f"{number:05d}"), tokens // SHARDS
        while room > 0:
            ids = draw.integers(VOCABULARY, size=draw.integers(20, 1500)).astype(np.uint16)
            writer.write(Encoded(ids, ids.tobytes()))
            room -= len(ids)
        shards.append(writer.finish(0))
    index = {"format": FORMAT, "tokenizer": "", "dtype": "<u2", "record_tokens": RECORD_TOKENS}
    write_json(folder / INDEX, index | {"shards": [vars(shard) for shard in shards]})


def measure(folder: Path, sequence_length: int, packing: str, seconds: float) -> dict[str, Any]:
    corpus = RecordCorpus(folder, Faults())
    blocks = Mixture([corpus], [np.zeros(len(corpus.lengths), bool)], [1.0], sequence_length, packing, 0)
    rows = training_rows(blocks, sequence_length, max(1, 16_384 // sequence_length))
    next(rows)
    tokens = slots = 0
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        weights = next(rows)["weights"]
        tokens, slots = tokens + int(weights.sum()), slots + weights.size
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    return {
        "packing": packing,
        "sequence": sequence_length,
        "million tokens/s": tokens / wall / 1e6,
        "million tokens/CPU s": tokens / used / 1e6,
        "% of a step at 50k tokens/s": 100 * TRAINING_RATE * used / tokens,
        "% padding": 100 * (1 - tokens / slots),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in the folder")
    parser.add_argument("--sequence_length", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--packing", nargs="+", default=["first_fit", "best_fit", "concatenate"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), options.tokens)
        rows = [
            measure(Path(folder), length, packing, options.seconds)
            for length in options.sequence_length
            for packing in options.packing
        ]
    print("\n".join(Table("Training batches from a tokenised folder", rows).markdown()))
    worst = max(row["% of a step at 50k tokens/s"] for row in rows)
    print(goal("the pipeline's share of a step at 50,000 tokens/s", worst, 3.0, unit=" %"))


if __name__ == "__main__":
    main()
