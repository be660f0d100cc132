"""OLMo 2 and 3: as Llama, but with norms after attention and MLP and none before, and one norm of all queries of a
token and one of its keys; 3 adds windows and rotary positions by layer type."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face, llama
from gsae_jax.lms.transformer import Config, Layer

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED
TENSORS = llama.TENSORS | {
    "blocks.{}.ln1_post.w": ("layers.{}.post_attention_layernorm.weight", "d -> d"),
    "blocks.{}.ln2_post.w": ("layers.{}.post_feedforward_layernorm.weight", "d -> d"),
}
MODEL_TYPES = dict.fromkeys(("olmo2", "olmo3"), TENSORS)


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    hf = hugging_face.read(settings)
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    by_type = hf.model_type == "olmo3"
    types = hf.layer_types if by_type else ["full_attention"] * hf.num_hidden_layers
    rotary = {kind: hugging_face.rotary(hf, d_head, layer_type=kind if by_type else None) for kind in set(types)}
    return Config(
        layers=tuple(Layer(d_head**-0.5, hugging_face.window(hf, kind), **rotary[kind]) for kind in types),
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_head=d_head,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hugging_face.activation(hf.hidden_act),
        norm_eps=hf.rms_norm_eps,
        norm_before=False,
        norm_after=True,
        gated_mlp=True,
        qk_norm=True,
        qk_norm_whole=True,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        tied=hf.tie_word_embeddings,
    )
