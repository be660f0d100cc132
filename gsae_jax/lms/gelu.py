"""TransformerLens' small pre-LayerNorm transformers: GELU-1L to 4L, the first models of the paper (section 4.1).

GELU MLP, learned positions, untied embeddings. Settings and tensors have TransformerLens' names; the published
weights are pickles, which `python -m gsae_jax.convert_lm` turns into this layout.
"""

from collections.abc import Mapping
from typing import Any

from gsae_jax.lms.transformer import Config, Layer, check_size

SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")
TENSORS: dict[str, tuple[str, str]] = {}  # a checkpoint's names and layouts are ours
IGNORED = r"\.attn\.(mask|IGNORE)$"  # constants
MODEL_TYPES = {"gelu": TENSORS}


def config(settings: Mapping[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    missing = sorted(set(SIZES) - settings.keys())
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for field, ours in (
        ("act_fn", "gelu"),
        ("normalization", "LN"),
        ("normalization_type", "LN"),
        ("attn_only", False),
        ("shortformer_pos", False),
        ("positional_embedding_type", "standard"),
        ("attention_dir", "causal"),
        ("use_local_attn", False),
        ("use_attn_scale", True),
        ("final_rms", False),
        ("parallel_attn_mlp", False),
    ):
        if settings.get(field) not in (None, ours):
            raise ValueError(f"has {field} = {settings[field]!r}, which is not supported (only {ours!r} is)")
    for name in SIZES:
        check_size(name, settings[name])
    epsilons = [settings[name] for name in ("layer_norm_eps", "ln_eps", "eps") if name in settings]
    return Config(
        layers=(Layer(attention_scale=settings["d_head"] ** -0.5),) * settings["n_layers"],
        n_key_value_heads=settings["n_heads"],
        activation="gelu",
        norm_eps=epsilons[0] if epsilons else 1e-5,
        normalization="LN",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        unembed_bias=True,
        learned_positions=True,
        **{name: settings[name] for name in SIZES if name != "n_layers"},
    )


def settings(config: Config) -> dict[str, Any]:
    """The `config.json` of a model."""
    sizes = {name: getattr(config, name) for name in SIZES}
    return {"model_type": "gelu", **sizes, "layer_norm_eps": config.norm_eps}
