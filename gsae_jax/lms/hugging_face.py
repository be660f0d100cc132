"""What the families of Hugging Face checkpoints share: reading `config.json`, and rotary frequencies."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError

from gsae_jax.errors import known_names
from gsae_jax.lms.transformer import ACTIVATIONS, check_size

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
UNQUANTISED = "quantised weights are not supported: load the unquantised checkpoint"


def read(settings: Mapping[str, Any], required: Iterable[str] = SIZES, **lacking: Any) -> Any:
    """`config.json` as transformers' own config object, which knows every older spelling.

    Args:
        settings: the JSON.
        required: fields that must be there (transformers would fill them in with another model's).
        **lacking: a field and the one value of it that we have.

    Raises:
        ValueError: fields are missing, contradict each other or ask for a feature that we lack.
    """
    missing = sorted(set(required) - settings.keys())
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for name in required:
        check_size(name, settings[name])
    quantised = settings.get("quantization_config") or settings.get("quantization")  # the second is MLX's
    if quantised:
        method = quantised.get("quant_method") or ("MLX" if "quantization" in settings else "no named method")
        raise ValueError(f"describes weights quantised with {method!r}; {UNQUANTISED}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of rotary settings that `frequencies` refuses
    try:
        config = transformers_config(settings)
    except (StrictDataclassError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"is not valid: {' '.join(str(error).split())}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    for name in required:
        check_size(name, getattr(config, name))  # it may have another spelling too, which wins
    for field, ours in ({"is_causal": True} | lacking).items():
        value = getattr(config, field, None)
        if value is not None and value != ours:
            raise ValueError(f"has {field} = {value!r}, which is not supported (only {ours!r} is)")
    return config


def transformers_config(settings: Mapping[str, Any]) -> Any:
    """transformers' own config object, without the labels of classifiers, of which a number would make a list."""
    try:
        kind: Any = transformers.CONFIG_MAPPING[settings["model_type"]]
    except KeyError:
        kind = transformers.PretrainedConfig
    return kind.from_dict({k: v for k, v in settings.items() if k not in ("num_labels", "id2label", "label2id")})


def activation(name: str) -> str:
    """Raises `ValueError` for an activation function we lack."""
    if name not in ACTIVATIONS:
        raise ValueError(f"has the activation {name!r}, which is not supported; {known_names(name, ACTIVATIONS)}")
    return name


def window(config: Any, layer_type: str) -> int:
    """The tokens that a layer sees, 0 = all.

    Raises:
        ValueError: a kind of attention we lack.
    """
    if layer_type not in ("full_attention", "sliding_attention"):
        raise ValueError(f"has layer type {layer_type!r}, which is not supported (full_ and sliding_attention are)")
    return config.sliding_window or 0 if layer_type == "sliding_attention" else 0


def frequencies(rope: Mapping[str, Any], head_dim: int, part: float = 1.0) -> tuple[float, ...]:
    """Rotary frequencies in radians per position, for transformers' `rope_parameters` of a layer.

    Linear scaling divides all of them by `factor`; `llama3` divides those whose wavelength exceeds the original
    context / low_freq_factor, keeps those below the original context / high_freq_factor, and blends between.

    Args:
        rope: the parameters.
        head_dim: dimensions of a head.
        part: the share of them that is turned.

    Raises:
        ValueError: a kind of scaling we lack.
    """
    if rope.get("partial_rotary_factor", part) != part:
        raise ValueError(f"has partial_rotary_factor = {rope['partial_rotary_factor']}, which is not supported here")
    check_size("head_dim", head_dim)
    for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
        if name in rope and not (rope[name] and rope[name] > 0):
            raise ValueError(f"has {name} = {rope[name]}; it must be positive")
    kind = rope.get("rope_type", "default")
    rotary_dim = int(head_dim * part)
    inverse = 1.0 / np.float32(rope["rope_theta"]) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim)
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "llama3":
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)  # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        inverse = (1 - kept) * inverse / rope["factor"] + kept * inverse
    elif kind != "default":
        raise ValueError(f"has rope scaling {kind!r}, which is not supported; known: default, linear, llama3")
    return tuple(float(x) for x in inverse)
