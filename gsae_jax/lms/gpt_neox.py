"""GPT-NeoX, of which Pythia is made: parallel residual (or not), rotary positions on a part of each head."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face
from gsae_jax.lms.transformer import Config, Layer

PREFIX = "gpt_neox."
IGNORED = r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"  # the causal mask and the frequencies
TENSORS = {
    "embed.W_E": ("embed_in.weight", "v d -> v d"),
    "blocks.{}.ln1.w": ("layers.{}.input_layernorm.weight", "d -> d"),
    "blocks.{}.ln1.b": ("layers.{}.input_layernorm.bias", "d -> d"),
    "blocks.{}.attn.W_Q": ("layers.{}.attention.query_key_value.weight", "(h qkv k) d -> qkv h d k", 0),
    "blocks.{}.attn.W_K": ("layers.{}.attention.query_key_value.weight", "(h qkv k) d -> qkv h d k", 1),
    "blocks.{}.attn.W_V": ("layers.{}.attention.query_key_value.weight", "(h qkv k) d -> qkv h d k", 2),
    "blocks.{}.attn.b_Q": ("layers.{}.attention.query_key_value.bias", "(h qkv k) -> qkv h k", 0),
    "blocks.{}.attn.b_K": ("layers.{}.attention.query_key_value.bias", "(h qkv k) -> qkv h k", 1),
    "blocks.{}.attn.b_V": ("layers.{}.attention.query_key_value.bias", "(h qkv k) -> qkv h k", 2),
    "blocks.{}.attn.W_O": ("layers.{}.attention.dense.weight", "d (h k) -> h k d"),
    "blocks.{}.attn.b_O": ("layers.{}.attention.dense.bias", "d -> d"),
    "blocks.{}.ln2.w": ("layers.{}.post_attention_layernorm.weight", "d -> d"),
    "blocks.{}.ln2.b": ("layers.{}.post_attention_layernorm.bias", "d -> d"),
    "blocks.{}.mlp.W_in": ("layers.{}.mlp.dense_h_to_4h.weight", "m d -> d m"),
    "blocks.{}.mlp.b_in": ("layers.{}.mlp.dense_h_to_4h.bias", "m -> m"),
    "blocks.{}.mlp.W_out": ("layers.{}.mlp.dense_4h_to_h.weight", "d m -> m d"),
    "blocks.{}.mlp.b_out": ("layers.{}.mlp.dense_4h_to_h.bias", "d -> d"),
    "ln_final.w": ("final_layer_norm.weight", "d -> d"),
    "ln_final.b": ("final_layer_norm.bias", "d -> d"),
    "unembed.W_U": ("embed_out.weight", "v d -> d v"),
}
MODEL_TYPES = {"gpt_neox": TENSORS}


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    hf = hugging_face.read(settings)
    d_head = hf.hidden_size // hf.num_attention_heads
    rotary = hugging_face.rotary(hf, d_head, hf.rope_parameters["partial_rotary_factor"])
    layer = Layer(d_head**-0.5, **rotary)
    return Config(
        layers=(layer,) * hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_attention_heads,
        d_head=d_head,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hugging_face.activation(hf.hidden_act),
        norm_eps=hf.layer_norm_eps,
        normalization="LN",
        parallel=hf.use_parallel_residual,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        mlp_bias=True,
        tied=hf.tie_word_embeddings,
    )
