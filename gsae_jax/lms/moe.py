"""Mixtral, Qwen 3 MoE and GPT-OSS: as Llama, but a router chooses a few experts for each token; GPT-OSS adds attention
sinks, biases and a clamped activation."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face, llama
from gsae_jax.lms.experts import Experts
from gsae_jax.lms.transformer import Config, Layer, check_size

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED
MLP = "blocks.{}.mlp."
# The layout with one tensor for all experts, which transformers has in memory, and writes if it is told to.
FUSED = {
    "W_gate": ("layers.{}.mlp.experts.gate_up_proj", "e (glu m) d -> glu e d m", 0),
    "W_in": ("layers.{}.mlp.experts.gate_up_proj", "e (glu m) d -> glu e d m", 1),
    "W_out": ("layers.{}.mlp.experts.down_proj", "e d m -> e m d"),
}


def _with_experts(router: str, gate: str, up: str, down: str, *dense: str) -> dict[str, Any]:
    """The table of a family whose files have a tensor for each expert."""
    transposed = {"W_gate": "e m d -> e d m", "W_in": "e m d -> e d m", "W_out": "e d m -> e m d"}
    names = zip(transposed, (gate, up, down), strict=True)
    table: dict[str, list[Any]] = {f"{MLP}{W}": [(name, transposed[W]), FUSED[W]] for W, name in names}
    for W in dense:  # layers without experts
        table[f"{MLP}{W}"].append(llama.TENSORS[f"{MLP}{W}"])
    routers = dict.fromkeys((router, "layers.{}.mlp.gate.weight"))
    return llama.TENSORS | table | {f"{MLP}W_router": [(name, "e d -> d e") for name in routers]}


EACH, MIXTRAL = "layers.{}.mlp.experts.*.", "layers.{}.block_sparse_moe."
MODEL_TYPES = {
    "mixtral": _with_experts(
        MIXTRAL + "gate.weight", *(f"{MIXTRAL}experts.*.{name}.weight" for name in ("w1", "w3", "w2"))
    ),
    "qwen3_moe": _with_experts(
        "layers.{}.mlp.gate.weight", *(f"{EACH}{name}_proj.weight" for name in ("gate", "up", "down")), *FUSED
    ),
    "gpt_oss": llama.TENSORS
    | {
        "blocks.{}.attn.sinks": ("layers.{}.self_attn.sinks", "h -> h"),
        MLP + "W_router": ("layers.{}.mlp.router.weight", "e d -> d e"),
        MLP + "b_router": ("layers.{}.mlp.router.bias", "e -> e"),
        MLP + "b_out": ("layers.{}.mlp.experts.down_proj_bias", "e d -> e d"),
        MLP + "W_out": [
            ("layers.{}.mlp.experts.down_proj_blocks", "e d m -> e m d"),
            ("layers.{}.mlp.experts.down_proj", "e m d -> e m d"),
        ],
    }
    | {
        f"{MLP}{W}": [
            ("layers.{}.mlp.experts.gate_up_proj_blocks", "e (m glu) d -> glu e d m", part),
            ("layers.{}.mlp.experts.gate_up_proj", "e d (m glu) -> glu e d m", part),
        ]
        for part, W in enumerate(("W_gate", "W_in"))
    }
    | {
        f"{MLP}{b}": ("layers.{}.mlp.experts.gate_up_proj_bias", "e (m glu) -> glu e m", part)
        for part, b in enumerate(("b_gate", "b_in"))
    },
}


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    kind = settings["model_type"]
    quantised = settings.get("quantization_config") or {}
    if kind == "gpt_oss" and quantised.get("quant_method") == "mxfp4":  # `weights.dequantised` reads it
        settings = {name: value for name, value in settings.items() if name != "quantization_config"}
    number = next((name for name in ("num_experts", "num_local_experts") if name in settings), "num_local_experts")
    more = ("moe_intermediate_size",) if kind == "qwen3_moe" else ()
    # GPT-OSS has an activation function of its own, whatever hidden_act says.
    lacking = {"hidden_act": "silu"} if kind == "gpt_oss" else {}
    hf = hugging_face.read(settings, (*hugging_face.SIZES, number, "num_experts_per_tok", *more), **lacking)
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    own_bias = kind == "gpt_oss"
    if own_bias and hf.swiglu_limit <= 0:
        raise ValueError(f"has swiglu_limit = {hf.swiglu_limit}; it must be positive")
    experts = Experts(
        n_experts=hf.num_local_experts,
        experts_per_token=hf.num_experts_per_tok,
        d_mlp=hf.moe_intermediate_size if kind == "qwen3_moe" else hf.intermediate_size,
        normalized=kind != "qwen3_moe" or hf.norm_topk_prob,
        bias=own_bias,
        limit=hf.swiglu_limit if own_bias else 0.0,
        slope=hf.swiglu_alpha if own_bias else 1.0,
    )
    check_size("moe_intermediate_size", experts.d_mlp)
    sparse = [True] * hf.num_hidden_layers
    if kind == "qwen3_moe":
        check_size("decoder_sparse_step", hf.decoder_sparse_step)
        sparse = [
            layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
            for layer in range(hf.num_hidden_layers)
        ]
    types = hf.layer_types if kind == "gpt_oss" else ["sliding_attention"] * hf.num_hidden_layers
    rotary = hugging_face.rotary(hf, d_head)
    bias = getattr(hf, "attention_bias", False)
    return Config(
        layers=tuple(
            Layer(
                d_head**-0.5,
                hugging_face.window(hf, layer_type),
                **rotary,
                experts=experts if has_experts else None,
            )
            for layer_type, has_experts in zip(types, sparse, strict=True)
        ),
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_head=d_head,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hugging_face.activation(hf.hidden_act),
        norm_eps=hf.rms_norm_eps,
        gated_mlp=True,
        qk_norm=kind == "qwen3_moe",
        qkv_bias=bias,
        attention_out_bias=bias,
        attention_sinks=kind == "gpt_oss",
        tied=hf.tie_word_embeddings,
    )
