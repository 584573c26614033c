"""llama.cpp decoding a Mixtral with random weights on the CPU, greedily, all in fp32: prints one JSON object.

Needs llama-cpp-python and gguf only: the model's file is made here, for a moment.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from shape import MIXTRAL, Shape

THREADS = 2
PROMPT, NEW = 64, 128
"""Tokens of each prompt, and after it."""


def write(shape: Shape, path: Path) -> None:
    """llama.cpp reads Mixtral as the architecture "llama" with experts; a matrix is ``[outputs, inputs]``."""
    file, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    file.add_vocab_size(shape.vocab)
    file.add_context_length(PROMPT + NEW)
    file.add_embedding_length(shape.width)
    file.add_block_count(shape.layers)
    file.add_feed_forward_length(shape.expert_hidden)
    file.add_head_count(shape.heads)
    file.add_head_count_kv(shape.kv_heads)
    file.add_key_length(shape.head_dim)
    file.add_value_length(shape.head_dim)
    file.add_rope_dimension_count(shape.head_dim)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_expert_count(shape.experts)
    file.add_expert_used_count(shape.top_k)
    file.add_tokenizer_model("none")
    m, h, e = shape.width, shape.expert_hidden, shape.experts
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "attn_q": (queries, m), "attn_k": (keys, m), "attn_v": (keys, m), "attn_output": (m, queries),
        "ffn_gate_inp": (e, m), "ffn_gate_exps": (e, h, m), "ffn_up_exps": (e, h, m), "ffn_down_exps": (e, m, h),
    }  # fmt: skip
    shapes = {f"blk.{number}.{name}": one for number in range(shape.layers) for name, one in layer.items()}
    for name, one in {"token_embd": (shape.vocab, m), "output": (shape.vocab, m), **shapes}.items():
        file.add_tensor(f"{name}.weight", draw.normal(scale=one[-1] ** -0.5, size=one).astype(np.float32))
    norms = [f"blk.{number}.{name}" for number in range(shape.layers) for name in ("attn_norm", "ffn_norm")]
    for name in ("output_norm", *norms):
        file.add_tensor(f"{name}.weight", np.ones(m, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


class Sequences:
    """``batch`` sequences of a model, a token each at a time."""

    def __init__(self, path: Path, batch: int, vocab: int) -> None:
        self.batch, self.vocab = batch, vocab
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256 * batch, batch * PROMPT, batch * PROMPT
        params.n_seq_max, params.n_threads, params.n_threads_batch = batch, THREADS, THREADS
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not (self.model and self.context):
            raise RuntimeError("llama.cpp could not read the model")
        self.room = llama_cpp.llama_batch_init(batch * PROMPT, 0, 1)

    def decode(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """The best token after each row ``[batch, t]``, which stands at position ``first``."""
        rows, count = tokens.shape
        self.room.n_tokens = rows * count
        for number, (row, offset) in enumerate(np.ndindex(rows, count)):
            self.room.token[number] = int(tokens[row, offset])
            self.room.pos[number], self.room.n_seq_id[number] = first + offset, 1
            self.room.seq_id[number][0], self.room.logits[number] = row, offset == count - 1
        if llama_cpp.llama_decode(self.context, self.room):
            raise RuntimeError("llama_decode failed")
        scores = np.ctypeslib.as_array(
            ctypes.cast(llama_cpp.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)), (rows, self.vocab)
        )
        return scores.argmax(-1)[:, None]

    def seconds(self, prompts: np.ndarray) -> float:
        """Of the new tokens alone."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        token = self.decode(prompts, 0)
        start = time.perf_counter()
        for number in range(NEW - 1):
            token = self.decode(token, PROMPT + number)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    batch = parser.parse_args().batch
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixtral.gguf"
        write(MIXTRAL, path)
        sequences = Sequences(path, batch, MIXTRAL.vocab)
        prompts = np.random.default_rng(1).integers(0, MIXTRAL.vocab, (batch, PROMPT))
        usual = statistics.median(sequences.seconds(prompts) for _ in range(3))
    print(
        json.dumps(
            {
                "tokens_per_second": batch * (NEW - 1) / usual,
                "versions": [f"llama-cpp-python {version('llama-cpp-python')}"],
            }
        )
    )


if __name__ == "__main__":
    main()
