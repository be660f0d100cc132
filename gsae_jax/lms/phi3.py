"""Phi-3, 3.5 and 4: as Llama, with one tensor for queries, keys and values, and one for W_gate and W_in; in some models
rotary positions on a part of each head, or longrope."""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms import hugging_face, llama
from gsae_jax.lms.transformer import Config, Layer

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED
QKV, GATE_UP = ("W_Q", "W_K", "W_V"), ("W_gate", "W_in")
MODEL_TYPES = {
    "phi3": llama.TENSORS
    | {f"blocks.{{}}.attn.{W}": ("layers.{}.self_attn.qkv_proj.weight", "(h k) d -> h d k", QKV) for W in QKV}
    | {f"blocks.{{}}.mlp.{W}": ("layers.{}.mlp.gate_up_proj.weight", "m d -> d m", GATE_UP) for W in GATE_UP}
}


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    hf = hugging_face.read(settings)
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    rotary = hugging_face.rotary(hf, d_head, hf.rope_parameters["partial_rotary_factor"])
    layer = Layer(d_head**-0.5, hugging_face.window(hf, "sliding_attention"), **rotary)
    return Config(
        layers=(layer,) * hf.num_hidden_layers,
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
        tied=hf.tie_word_embeddings,
    )
