"""Gemma 1, 2 and 3 (text): RMSNorm by 1 + w, GeGLU, scaled embeddings; 2 adds soft-caps, windows and norms after
attention and MLP; 3 adds norms of queries and keys and a rotary base for windows instead of the soft-caps."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face, llama
from gsae_jax.lms.transformer import Config, Layer

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED
NORMS_AFTER = {  # Gemma 2 and 3 give Llama's name of the second norm to another one
    "blocks.{}.ln1_post.w": ("layers.{}.post_attention_layernorm.weight", "d -> d"),
    "blocks.{}.ln2.w": ("layers.{}.pre_feedforward_layernorm.weight", "d -> d"),
    "blocks.{}.ln2_post.w": ("layers.{}.post_feedforward_layernorm.weight", "d -> d"),
}
MODEL_TYPES = {
    "gemma": llama.TENSORS,
    "gemma2": llama.TENSORS | NORMS_AFTER,
    "gemma3_text": llama.TENSORS | NORMS_AFTER,
}


def config(settings: Mapping[str, Any], required: tuple[str, ...] = (*hugging_face.SIZES, "head_dim")) -> Config:
    """The model that a `config.json` describes.

    Args:
        settings: the JSON.
        required: fields that must be there.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    hf = hugging_face.read(settings, required, use_bidirectional_attention=False)
    first = hf.model_type == "gemma"
    if not first and hf.query_pre_attn_scalar <= 0:
        raise ValueError(f"has query_pre_attn_scalar = {hf.query_pre_attn_scalar}; it must be positive")
    scale = (hf.head_dim if first else hf.query_pre_attn_scalar) ** -0.5
    types = ["full_attention"] * hf.num_hidden_layers if first else hf.layer_types
    by_type = hf.model_type == "gemma3_text"
    if by_type and hf.attn_logit_softcapping:
        raise ValueError("has attn_logit_softcapping, which is not supported (Gemma 3 models have none)")
    rotary = {kind: hugging_face.rotary(hf, hf.head_dim, layer_type=kind if by_type else None) for kind in set(types)}
    return Config(
        layers=tuple(Layer(scale, hugging_face.window(hf, kind), **rotary[kind]) for kind in types),
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_head=hf.head_dim,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hugging_face.activation(hf.hidden_act if first else hf.hidden_activation),
        norm_eps=hf.rms_norm_eps,
        norm_offset=1.0,
        norm_after=not first,
        gated_mlp=True,
        qk_norm=by_type,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        tied=hf.tie_word_embeddings,
        embedding_scale=hf.hidden_size**0.5,
        attention_softcap=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(hf, "final_logit_softcapping", None) or 0.0,
    )
