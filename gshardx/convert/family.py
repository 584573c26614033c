"""What a family of public models is, and the settings and rules that several of them share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gshardx.convert.fp8 import BLOCK as FP8_BLOCK
from gshardx.convert.rope import SCALINGS, read_rope, write_rope
from gshardx.convert.rules import Rule
from gshardx.convert.settings import Need, Setting
from gshardx.errors import BadInput


def counted(layers: Sequence[int]) -> int:
    """How many layers, if they are the first.

    Raises:
        BadInput: they are others.
    """
    if list(layers) != list(range(len(layers))):
        raise BadInput(f"mlp_only_layers = {layers} is not supported yet; supported: the first ones, [0, 1, ...]")
    return len(layers)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: model_type in config.json.
        architecture: the class in transformers.
        settings, needs: of config.json.
        fixed: our keys that all models of it share.
        also: their keys that all models of it are written with.
        rules: where tensors go.
        zeros: parameters of ours that it has no tensors for, and that are zero.
        layers_after: their key that counts layers after the last, whose tensors are kept and not used.
    """

    name: str
    architecture: str
    settings: tuple[Setting, ...]
    needs: tuple[Need, ...]
    fixed: Mapping[str, Any]
    rules: tuple[Rule, ...]
    also: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    layers_after: str | None = None


COMMON = (
    Setting("width", "hidden_size"),
    Setting("layers", "num_hidden_layers"),
    Setting("heads", "num_attention_heads"),
    Setting("kv_heads", "num_key_value_heads", lambda ours: ours["heads"]),
    Setting("head_dim", "head_dim", lambda ours: ours["width"] // ours["heads"]),
    Setting("vocab_size", "vocab_size"),
    Setting("norm_epsilon", "rms_norm_eps"),
    # Files from before long contexts don't name it.
    Setting("rope_base", "rope_theta|rope_parameters.rope_theta", 10_000.0, float),
    Setting("rope", "rope_scaling|rope_parameters", lambda ours: {}, read_rope, write_rope),
    Setting("tie_embeddings", "tie_word_embeddings", False),
)
# Our own tied logits are scaled by default, and theirs are not.
PLAIN_LOGITS = Setting("scales.logits", "", lambda ours: 1.0 if ours["tie_embeddings"] else None)
BIAS = Setting(
    "attention.biases", "attention_bias", "none", lambda yes: "qkvo" if yes else "none", lambda ours: ours == "qkvo"
)
QKV_BIAS = Setting(
    "attention.biases", "qkv_bias", "qkv", lambda yes: "qkv" if yes else "none", lambda ours: ours == "qkv"
)
EXPERTS = Setting("moe.num_experts", "num_local_experts|num_experts")
TOP_K = Setting("moe.top_k", "num_experts_per_tok")
RENORMALISE = Setting("moe.router_options.renormalise", "norm_topk_prob", False)
HIDDEN, MOE_HIDDEN = Setting("hidden", "intermediate_size"), Setting("moe.hidden", "intermediate_size")
FINE_HIDDEN = Setting("moe.hidden", "moe_intermediate_size")
EVERY = Setting("moe.every", "decoder_sparse_step", 1)
DENSE_FIRST = Setting("moe.dense_first", "mlp_only_layers", 0, counted, lambda ours: list(range(ours)))
WINDOW = Setting("attention.window", "sliding_window", None)
WINDOW_IF_USED = WINDOW._replace(only=("use_sliding_window", True))


def full_layers(kind: str, every: int | None) -> Setting:
    """``layer_types`` of layers of which some see everything, and the others are of ``kind``; by default as ``every``.

    Its value raises BadInput unless every nth layer is full.
    """

    def read(types: list[str]) -> int | None:
        steps = [None, *range(1, len(types) + 1)]
        found = next((n for n in steps if types == write(n, len(types))), -1)
        if found == -1:
            raise BadInput(f"layer_types = {types} is not supported yet; supported: every nth full_attention")
        return found

    def write(n: int | None, layers: int) -> list[str]:
        return ["full_attention" if n and (i + 1) % n == 0 else kind for i in range(layers)]

    return Setting(
        "attention.full_every", "layer_types", every, lambda types, _: read(types), write, beside=("layers",),
        of_none=True,
    )  # fmt: skip


NEEDS = (
    Need("hidden_act", ("silu",)),
    Need("rope_scaling.rope_type|rope_scaling.type|rope_parameters.rope_type", SCALINGS),
    Need("mlp_bias", (False,)),
)
WHOLE_HEADS = Need("partial_rotary_factor|rope_parameters.partial_rotary_factor", (1.0,))
QUANTISED = (
    Need("quantization_config.quant_method|quantization_config", ("fp8", "mxfp4")),
    Need("quantization_config.weight_block_size", ([FP8_BLOCK, FP8_BLOCK],)),
)
WITH_WINDOW = (*NEEDS, WHOLE_HEADS, *QUANTISED)
PLAIN = (*WITH_WINDOW, Need("sliding_window", (0,), unless=("use_sliding_window", False)))

DROPLESS = {"moe.router": "top_k", "moe.capacity_factor": None}
OUTSIDE = (
    Rule("model.embed_tokens.weight", "v m -> v m", ("embedding.table",)),
    Rule("model.norm.weight", "m -> m", ("final_norm.scale",)),
    Rule("lm_head.weight", "v m -> m v", ("unembedding.kernel",)),
)
LAYER = "model.layers.{layer}."
ATTENTION = (
    Rule(LAYER + "input_layernorm.weight", "m -> m", ("block.attention_norm.scale",)),
    Rule(LAYER + "self_attn.q_proj.weight", "(n d) m -> m n d", ("block.attention.w_q",)),
    Rule(LAYER + "self_attn.k_proj.weight", "(q d) m -> m q d", ("block.attention.w_k",)),
    Rule(LAYER + "self_attn.v_proj.weight", "(q d) m -> m q d", ("block.attention.w_v",)),
    Rule(LAYER + "self_attn.o_proj.weight", "m (n d) -> n d m", ("block.attention.w_o",)),
    Rule(LAYER + "self_attn.q_proj.bias", "(n d) -> n d", ("block.attention.b_q",)),
    Rule(LAYER + "self_attn.k_proj.bias", "(q d) -> q d", ("block.attention.b_k",)),
    Rule(LAYER + "self_attn.v_proj.bias", "(q d) -> q d", ("block.attention.b_v",)),
    Rule(LAYER + "self_attn.o_proj.bias", "m -> m", ("block.attention.b_o",)),
    Rule(LAYER + "post_attention_layernorm.weight", "m -> m", ("block.feed_forward_norm.scale",)),
)
NORM_OF_HEADS = (
    Rule(LAYER + "self_attn.q_norm.weight", "d -> d", ("block.attention.q_norm.scale",)),
    Rule(LAYER + "self_attn.k_norm.weight", "d -> d", ("block.attention.k_norm.scale",)),
)
NORM_OF_ALL = (
    Rule(LAYER + "self_attn.q_norm.weight", "(n d) -> n d", ("block.attention.q_norm.scale",)),
    Rule(LAYER + "self_attn.k_norm.weight", "(q d) -> q d", ("block.attention.k_norm.scale",)),
)
MLP = LAYER + "mlp."
DENSE = (
    Rule(MLP + "gate_proj.weight", "f m -> m f", ("dense.feed_forward.w_gate",)),
    Rule(MLP + "up_proj.weight", "f m -> m f", ("dense.feed_forward.w_up",)),
    Rule(MLP + "down_proj.weight", "m f -> f m", ("dense.feed_forward.w_down",)),
)
MOE = (
    Rule(MLP + "gate.weight", "e m -> m e", ("sparse.feed_forward.router.kernel",)),
    Rule(MLP + "experts.{expert}.gate_proj.weight", "h m -> m h", ("sparse.feed_forward.experts.w_gate",)),
    Rule(MLP + "experts.{expert}.up_proj.weight", "h m -> m h", ("sparse.feed_forward.experts.w_up",)),
    Rule(MLP + "experts.{expert}.down_proj.weight", "m h -> h m", ("sparse.feed_forward.experts.w_down",)),
)
SHARED = (
    Rule(MLP + "shared_expert_gate.weight", "1 m -> m", ("sparse.feed_forward.beside.gate",)),
    Rule(MLP + "shared_expert.gate_proj.weight", "s m -> m s", ("sparse.feed_forward.beside.feed_forward.w_gate",)),
    Rule(MLP + "shared_expert.up_proj.weight", "s m -> m s", ("sparse.feed_forward.beside.feed_forward.w_up",)),
    Rule(MLP + "shared_expert.down_proj.weight", "m s -> s m", ("sparse.feed_forward.beside.feed_forward.w_down",)),
)
BLOCK = LAYER + "block_sparse_moe."
MIXTRAL = (
    Rule(BLOCK + "gate.weight", "e m -> m e", ("sparse.feed_forward.router.kernel",)),
    Rule(BLOCK + "experts.{expert}.w1.weight", "h m -> m h", ("sparse.feed_forward.experts.w_gate",)),
    Rule(BLOCK + "experts.{expert}.w3.weight", "h m -> m h", ("sparse.feed_forward.experts.w_up",)),
    Rule(BLOCK + "experts.{expert}.w2.weight", "m h -> h m", ("sparse.feed_forward.experts.w_down",)),
)
GRANITE = (
    Rule(BLOCK + "router.layer.weight", "e m -> m e", ("sparse.feed_forward.router.kernel",)),
    Rule(
        BLOCK + "input_linear.weight",
        "e (p h) m -> p e m h",
        ("sparse.feed_forward.experts.w_gate", "sparse.feed_forward.experts.w_up"),
    ),
    Rule(BLOCK + "output_linear.weight", "e m h -> e h m", ("sparse.feed_forward.experts.w_down",)),
)
# A dense decoder is one expert that every token goes to: its gate, a softmax of one score, is 1 whatever the score.
ONE_EXPERT = {
    **DROPLESS, "moe.num_experts": 1, "moe.top_k": 1, "moe.every": 1, "moe.losses": {},
    "moe.router_options": {"renormalise": False},
}  # fmt: skip
AS_EXPERT = (
    Rule(MLP + "gate_proj.weight", "h m -> 1 m h", ("sparse.feed_forward.experts.w_gate",)),
    Rule(MLP + "up_proj.weight", "h m -> 1 m h", ("sparse.feed_forward.experts.w_up",)),
    Rule(MLP + "down_proj.weight", "m h -> 1 h m", ("sparse.feed_forward.experts.w_down",)),
)
NO_ROUTER = ("stack.units.sparse.feed_forward.router.kernel",)
