"""What the families of Hugging Face checkpoints share: reading `config.json`, and rotary positions."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epy
from huggingface_hub.errors import StrictDataclassError

from gsae_jax.errors import known_names
from gsae_jax.lms.transformer import ACTIVATIONS, check_size

with epy.lazy_imports():  # slow to import
    import transformers

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
QUANTISATION = ("quantization_config", "quantization")  # the second is MLX's
# What makes a checkpoint that we read of quantised weights, where a library can.
DEQUANTISED = {
    "bitsandbytes": "load it in transformers, call model.dequantize(), and save that with save_pretrained",
    "mlx": "convert it with `python -m mlx_lm.convert --dequantize`",
    "fp8": "load it in transformers with quantization_config=FineGrainedFP8Config(dequantize=True), and save that with "
    "save_pretrained",
    "compressed-tensors": "load it in transformers with quantization_config=CompressedTensorsConfig(dequantize=True), "
    "and save that with save_pretrained",
}


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
    if quantised := next((settings[name] for name in QUANTISATION if settings.get(name)), None):
        method = quantised.get("quant_method") or ("MLX" if "quantization" in settings else "no named method")
        raise ValueError(f"describes weights quantised with {method!r}; {instead_of(method)}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of rotary settings that `rotary` refuses
    try:
        config = transformers_config(settings)
    except (StrictDataclassError, ValueError, KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"is not valid: {' '.join(str(error).split())}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    for name in required:
        if not (name == "head_dim" and config.is_heterogeneous):  # Gemma 4 has it by layer
            check_size(name, getattr(config, name))  # it may have another spelling too, which wins
    for field, ours in ({"is_causal": True} | lacking).items():
        value = getattr(config, field, None)
        if value is not None and value != ours:
            raise ValueError(f"has {field} = {value!r}, which is not supported (only {ours!r} is)")
    return config


def instead_of(method: str) -> str:
    """What to do with weights that were quantised with a method, or with one of several: "GPTQ or AWQ"."""
    ways = [DEQUANTISED[each] for each in method.lower().split(" or ") if each in DEQUANTISED]
    return ", or ".join(["quantised weights are not supported: write the checkpoint that they were made from", *ways])


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


def rotary(config: Any, head_dim: int, part: float = 1.0, layer_type: str | None = None) -> dict[str, Any]:
    """The rotary settings of a `Layer`, for transformers' `rope_parameters`.

    - `linear` divides all frequencies by `factor`.
    - `llama3` divides those whose wavelength exceeds the original context / low_freq_factor, keeps those below the
      original context / high_freq_factor, and blends between.
    - `yarn` divides those of low dimensions, keeps those of high ones, and blends between where they turn `beta_fast`
      to `beta_slow` times in the original context. It multiplies turned queries and keys by a factor.
    - `longrope` divides each frequency by its own factor, of which there is one for texts within the original context
      and one for longer texts. It multiplies as well.
    - `proportional` turns the first `partial_rotary_factor` of all pairs, and keeps the others (Gemma 4).
    - `dynamic` changes frequencies of texts longer than `max_position_embeddings` only, which a model here refuses.

    Args:
        config: transformers' object.
        head_dim: dimensions of a head.
        part: the share of them that is turned.
        layer_type: whose parameters, where `rope_parameters` has them by type.

    Raises:
        ValueError: a kind of scaling we lack, or numbers that it cannot have.
    """
    rope = dict(config.rope_parameters[layer_type] if layer_type else config.rope_parameters)
    kind: str = rope.get("rope_type", "default")
    if kind != "proportional" and rope.get("partial_rotary_factor", part) != part:
        raise ValueError(f"has partial_rotary_factor = {rope['partial_rotary_factor']}, which is not supported here")
    check_size("head_dim", head_dim)
    context: Any = rope.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = config.max_position_embeddings / context
    for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if name in rope and not (rope[name] and rope[name] > 0):
            raise ValueError(f"has {name} = {rope[name]}; it must be positive")
    rotary_dim = int(head_dim * part)
    base = np.float32(rope["rope_theta"]) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim)
    inverse, more = 1.0 / base, dict[str, Any]()
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "llama3":
        turns = context * inverse / (2 * math.pi)  # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        inverse = (1 - kept) * inverse / rope["factor"] + kept * inverse
    elif kind == "yarn":
        # transformers reads `truncate` beside the types, where it has parameters by type.
        low, high = _yarn_range(rope, rotary_dim, context, config.rope_parameters.get("truncate", True))
        kept = 1 - np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        inverse = (1 - kept) * inverse / rope["factor"] + kept * inverse
        more["rotary_scale"] = _attention_factor(rope, _yarn_factor(rope))
    elif kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(rope[name]) != len(base) or not min(rope[name]) > 0:
                raise ValueError(f"has {name} = {rope[name]}; it must be {len(base)} positive numbers")
        inverse, long = (1.0 / (np.array(rope[name], np.float32) * base) for name in ("short_factor", "long_factor"))
        more = {"long_frequencies": tuple(map(float, long)), "long_after": context}
        scale = math.sqrt(1 + math.log(rope["factor"]) / math.log(context)) if rope["factor"] > 1 else 1.0
        more["rotary_scale"] = _attention_factor(rope, scale)
    elif kind == "proportional":
        turned = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
        inverse = np.where(np.arange(len(base)) < turned, inverse, 0) / rope.get("factor", 1.0)
    elif kind not in ("default", "dynamic"):
        known = "default, linear, llama3, yarn, longrope, dynamic, proportional"
        raise ValueError(f"has rope scaling {kind!r}, which is not supported; known: {known}")
    return {"frequencies": tuple(map(float, inverse)), **more}


def _attention_factor(rope: Mapping[str, Any], recommended: float) -> float:
    factor = rope.get("attention_factor")
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"has attention_factor = {factor}; it must be positive")
    return float(recommended if factor is None else factor)


def _yarn_factor(rope: Mapping[str, Any]) -> float:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    by, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(by) / scale(of_all) if by and of_all else scale(1)


def _yarn_range(rope: Mapping[str, Any], rotary_dim: int, context: int, whole: bool) -> tuple[float, float]:
    """The pairs of dimensions between which `yarn` blends: those that turn so often in the original context."""

    def pair(turns: float) -> float:
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high + 0.001 if low == high else high
