"""Gemma 4 (text): as Gemma 3, but with norms by w, heads of another width in layers without a window, layers that read
the keys and values of earlier ones, and something that each layer adds for the token itself."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import gemma, hugging_face, llama
from gsae_jax.lms.transformer import Config, Layer

PREFIX = llama.PREFIX
# Checkpoints may have keys and values of layers that read those of others.
IGNORED = rf"{llama.IGNORED}|^layers\.\d+\.self_attn\.([kv]_proj|[kv]_norm)\."
MODEL_TYPES = {
    "gemma4_text": llama.TENSORS
    | gemma.NORMS_AFTER
    | {
        "blocks.{}.token.W_E": ("embed_tokens_per_layer.weight", "v (l p) -> l v p", "layer"),
        "blocks.{}.token.W_context": ("per_layer_model_projection.weight", "(l p) d -> l d p", "layer"),
        "blocks.{}.token.norm.w": ("per_layer_projection_norm.weight", "p -> p"),
        "blocks.{}.token.W_gate": ("layers.{}.per_layer_input_gate.weight", "p d -> d p"),
        "blocks.{}.token.W_out": ("layers.{}.per_layer_projection.weight", "d p -> p d"),
        "blocks.{}.token_post.w": ("layers.{}.post_per_layer_input_norm.weight", "d -> d"),
        "blocks.{}.scale": ("layers.{}.layer_scalar", "a -> a"),
    }
}


def config(settings: Mapping[str, Any], required: tuple[str, ...] = (*hugging_face.SIZES, "head_dim")) -> Config:
    """The model that a `config.json` describes.

    Args:
        settings: the JSON.
        required: fields that must be there.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    for layer in (settings.get("per_layer_config") or {}).values():
        if others := sorted(layer.keys() - {"head_dim", "num_key_value_heads"}):
            raise ValueError(f"has {others[0]} in per_layer_config, which is not supported")
    hf = hugging_face.read(settings, required, enable_moe_block=False, use_bidirectional_attention="vision")
    d_per_layer = hf.hidden_size_per_layer_input or 0
    if d_per_layer and hf.vocab_size_per_layer_input != hf.vocab_size:
        what = f"has vocab_size_per_layer_input = {hf.vocab_size_per_layer_input}"
        raise ValueError(f"{what}, which is not supported (only its vocab_size, {hf.vocab_size}, is)")
    types, shared = hf.layer_types, hf.num_kv_shared_layers
    if not 0 <= shared < hf.num_hidden_layers or set(types[: len(types) - shared]) != set(types):
        raise ValueError(f"has num_kv_shared_layers = {shared}; before them, there must be a layer of each type")
    layers: list[Layer] = []
    last: dict[str, int] = {}  # layer of each type that has keys and values
    for number, (kind, sharing) in enumerate(zip(types, hf.kv_sharing_modes, strict=True)):
        own, shares = hf.per_layer_config[number], sharing == "reuse"
        last |= {} if shares else {kind: number}
        layers += [
            Layer(
                1.0,
                hugging_face.window(hf, kind),
                **hugging_face.rotary(hf, own.head_dim, layer_type=kind),
                d_head=own.head_dim,
                n_key_value_heads=own.num_key_value_heads,
                d_mlp=hf.intermediate_size * (2 if shares and hf.use_double_wide_mlp else 1),
                values_are_keys=hf.attention_k_eq_v and kind == "full_attention",
                keys_from=last[kind] if shares else None,
            )
        ]
    return Config(
        layers=tuple(layers),
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=max(layer.n_key_value_heads for layer in layers),
        d_head=max(layer.d_head for layer in layers),
        d_mlp=max(layer.d_mlp for layer in layers),
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hugging_face.activation(hf.hidden_activation),
        norm_eps=hf.rms_norm_eps,
        norm_after=True,
        gated_mlp=True,
        qk_norm=True,
        v_norm=True,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        tied=hf.tie_word_embeddings,
        embedding_scale=hf.hidden_size**0.5,
        logit_softcap=hf.final_logit_softcapping or 0.0,
        d_per_layer=d_per_layer,
        block_scale=True,
    )
