"""A gshardx run as the GGUF file that llama.cpp reads, tokenizer and all: python llama_cpp_export.py RUN OUT.gguf

Needs gguf, and numpy and yaml with it, only: the weights are RUN/weights.npz, as serve_children.py writes them. The
config is one that Mixtral's architecture covers: plain top-k experts in every layer, softmax over those chosen, SwiGLU,
fp32.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import yaml

LENGTH = 4096
"""Tokens of a sequence, as the file says; the server may have less room."""


def export(run: Path, path: Path) -> None:
    weights, file = np.load(run / "weights.npz"), gguf.GGUFWriter(path, "llama")
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    block = {name.removeprefix("stack.units.sparse."): weights[name] for name in weights if ".sparse." in name}
    layers, width, heads, head_dim = block["attention.w_q"].shape
    experts, hidden = block["feed_forward.experts.w_up"].shape[1], block["feed_forward.experts.w_up"].shape[3]
    file.add_vocab_size(len(weights["embedding.table"]))
    file.add_context_length(LENGTH)
    file.add_embedding_length(width)
    file.add_block_count(layers)
    file.add_feed_forward_length(hidden)
    file.add_head_count(heads)
    file.add_head_count_kv(block["attention.w_k"].shape[2])
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_rope_dimension_count(head_dim)
    file.add_rope_freq_base(model["rope_base"])
    file.add_layer_norm_rms_eps(1e-6)
    file.add_expert_count(experts)
    file.add_expert_used_count(model["moe"]["top_k"])
    add_tokenizer(file, json.loads((run / "tokenizer.json").read_text(encoding="utf-8")))
    tensors = {
        "token_embd": weights["embedding.table"],
        "output": weights["unembedding.kernel"].T,
        "output_norm": weights["final_norm.scale"],
    }
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in of_layer({n: w[layer] for n, w in block.items()})}
    for name, tensor in tensors.items():
        file.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def of_layer(block: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """A matrix is [outputs, inputs] there."""
    expert = "feed_forward.experts.w_"
    return [
        ("attn_norm", block["attention_norm.scale"]),
        ("attn_q", pairs_together(block["attention.w_q"])),
        ("attn_k", pairs_together(block["attention.w_k"])),
        ("attn_v", block["attention.w_v"].reshape(len(block["attention.w_v"]), -1).T),
        ("attn_output", block["attention.w_o"].reshape(-1, block["attention.w_o"].shape[-1]).T),
        ("ffn_norm", block["feed_forward_norm.scale"]),
        ("ffn_gate_inp", block["feed_forward.router.kernel"].T),
        *((f"ffn_{name}_exps", block[expert + name].swapaxes(1, 2)) for name in ("gate", "up", "down")),
    ]


def pairs_together(w: np.ndarray) -> np.ndarray:
    """``[m, n, d]`` to ``[n d, m]``. llama.cpp's "llama" turns neighbours by an angle; here they are half a head
    apart."""
    width, heads, head_dim = w.shape
    return w.reshape(width, heads, 2, head_dim // 2).swapaxes(2, 3).reshape(width, -1).T


def add_tokenizer(file: gguf.GGUFWriter, tokenizer: dict) -> None:
    """Byte-level BPE, split as GPT-2's."""
    model, special = tokenizer["model"], {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    ids = {**model["vocab"], **special}
    names = sorted(ids, key=ids.__getitem__)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(names)
    file.add_token_types([gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names])
    file.add_token_merges(merges)
    (end,) = special.values()
    file.add_eos_token_id(end)
    file.add_bos_token_id(end)
    file.add_add_bos_token(False)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
