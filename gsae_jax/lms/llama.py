"""Llama 2 and 3, Mistral, Qwen 2 and 3: RMSNorm, SwiGLU, rotary positions, grouped key-value heads."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face
from gsae_jax.lms.transformer import Config, Layer

PREFIX = "model."
IGNORED = r"rotary_emb\.inv_freq$"
TENSORS = {
    "embed.W_E": ("embed_tokens.weight", "v d -> v d"),
    "blocks.{}.ln1.w": ("layers.{}.input_layernorm.weight", "d -> d"),
    "blocks.{}.attn.W_Q": ("layers.{}.self_attn.q_proj.weight", "(h k) d -> h d k"),
    "blocks.{}.attn.W_K": ("layers.{}.self_attn.k_proj.weight", "(h k) d -> h d k"),
    "blocks.{}.attn.W_V": ("layers.{}.self_attn.v_proj.weight", "(h k) d -> h d k"),
    "blocks.{}.attn.b_Q": ("layers.{}.self_attn.q_proj.bias", "(h k) -> h k"),
    "blocks.{}.attn.b_K": ("layers.{}.self_attn.k_proj.bias", "(h k) -> h k"),
    "blocks.{}.attn.b_V": ("layers.{}.self_attn.v_proj.bias", "(h k) -> h k"),
    "blocks.{}.attn.q_norm.w": ("layers.{}.self_attn.q_norm.weight", "k -> k"),
    "blocks.{}.attn.k_norm.w": ("layers.{}.self_attn.k_norm.weight", "k -> k"),
    "blocks.{}.attn.W_O": ("layers.{}.self_attn.o_proj.weight", "d (h k) -> h k d"),
    "blocks.{}.attn.b_O": ("layers.{}.self_attn.o_proj.bias", "d -> d"),
    "blocks.{}.ln2.w": ("layers.{}.post_attention_layernorm.weight", "d -> d"),
    "blocks.{}.mlp.W_gate": ("layers.{}.mlp.gate_proj.weight", "m d -> d m"),
    "blocks.{}.mlp.b_gate": ("layers.{}.mlp.gate_proj.bias", "m -> m"),
    "blocks.{}.mlp.W_in": ("layers.{}.mlp.up_proj.weight", "m d -> d m"),
    "blocks.{}.mlp.b_in": ("layers.{}.mlp.up_proj.bias", "m -> m"),
    "blocks.{}.mlp.W_out": ("layers.{}.mlp.down_proj.weight", "d m -> m d"),
    "blocks.{}.mlp.b_out": ("layers.{}.mlp.down_proj.bias", "d -> d"),
    "ln_final.w": ("norm.weight", "d -> d"),
    "unembed.W_U": ("lm_head.weight", "v d -> d v"),
}
MODEL_TYPES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), TENSORS)


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    hf = hugging_face.read(settings)
    kind = hf.model_type
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    everywhere = "sliding_attention" if kind == "mistral" else "full_attention"
    types = hf.layer_types if kind.startswith("qwen") else [everywhere] * hf.num_hidden_layers
    rotary = hugging_face.rotary(hf, d_head)
    return Config(
        layers=tuple(Layer(d_head**-0.5, hugging_face.window(hf, layer_type), **rotary) for layer_type in types),
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
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or getattr(hf, "attention_bias", False),
        attention_out_bias=kind != "qwen2" and getattr(hf, "attention_bias", False),
        mlp_bias=getattr(hf, "mlp_bias", False),
        tied=hf.tie_word_embeddings,
    )
