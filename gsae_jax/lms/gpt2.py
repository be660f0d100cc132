"""GPT-2 and its finetunes: learned positions, LayerNorm, GELU MLP, Conv1D weights (input dimension first)."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face
from gsae_jax.lms.transformer import Config, Layer

PREFIX = "transformer."  # which the original checkpoints lack
INPUT_FIRST = True  # Conv1D
IGNORED = r"\.attn\.(masked_)?bias$"  # the causal mask
TENSORS = {
    "embed.W_E": ("wte.weight", "v d -> v d"),
    "pos_embed.W_pos": ("wpe.weight", "t d -> t d"),
    "blocks.{}.ln1.w": ("h.{}.ln_1.weight", "d -> d"),
    "blocks.{}.ln1.b": ("h.{}.ln_1.bias", "d -> d"),
    "blocks.{}.attn.W_Q": ("h.{}.attn.c_attn.weight", "d (qkv h k) -> qkv h d k", 0),
    "blocks.{}.attn.W_K": ("h.{}.attn.c_attn.weight", "d (qkv h k) -> qkv h d k", 1),
    "blocks.{}.attn.W_V": ("h.{}.attn.c_attn.weight", "d (qkv h k) -> qkv h d k", 2),
    "blocks.{}.attn.b_Q": ("h.{}.attn.c_attn.bias", "(qkv h k) -> qkv h k", 0),
    "blocks.{}.attn.b_K": ("h.{}.attn.c_attn.bias", "(qkv h k) -> qkv h k", 1),
    "blocks.{}.attn.b_V": ("h.{}.attn.c_attn.bias", "(qkv h k) -> qkv h k", 2),
    "blocks.{}.attn.W_O": ("h.{}.attn.c_proj.weight", "(h k) d -> h k d"),
    "blocks.{}.attn.b_O": ("h.{}.attn.c_proj.bias", "d -> d"),
    "blocks.{}.ln2.w": ("h.{}.ln_2.weight", "d -> d"),
    "blocks.{}.ln2.b": ("h.{}.ln_2.bias", "d -> d"),
    "blocks.{}.mlp.W_in": ("h.{}.mlp.c_fc.weight", "d m -> d m"),
    "blocks.{}.mlp.b_in": ("h.{}.mlp.c_fc.bias", "m -> m"),
    "blocks.{}.mlp.W_out": ("h.{}.mlp.c_proj.weight", "m d -> m d"),
    "blocks.{}.mlp.b_out": ("h.{}.mlp.c_proj.bias", "d -> d"),
    "ln_final.w": ("ln_f.weight", "d -> d"),
    "ln_final.b": ("ln_f.bias", "d -> d"),
    "unembed.W_U": ("lm_head.weight", "v d -> d v"),
}
MODEL_TYPES = {"gpt2": TENSORS}


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    required = ("vocab_size", "n_embd", "n_layer", "n_head")
    hf = hugging_face.read(settings, required, add_cross_attention=False)
    d_head = hf.n_embd // hf.n_head
    scale = d_head**-0.5 if hf.scale_attn_weights else 1.0
    by_layer = hf.scale_attn_by_inverse_layer_idx
    return Config(
        layers=tuple(Layer(scale / (layer + 1) if by_layer else scale) for layer in range(hf.n_layer)),
        d_model=hf.n_embd,
        n_heads=hf.n_head,
        n_key_value_heads=hf.n_head,
        d_head=d_head,
        d_mlp=hf.n_inner or 4 * hf.n_embd,
        d_vocab=hf.vocab_size,
        n_ctx=hf.n_positions,
        activation=hugging_face.activation(hf.activation_function),
        norm_eps=hf.layer_norm_epsilon,
        normalization="LN",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tied=hf.tie_word_embeddings,
    )
