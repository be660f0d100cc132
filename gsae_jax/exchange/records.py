"""What an export says of an SAE besides its function, so that importing it gives the same SAE; and how one is built."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gsae_jax.config import FLOAT32, INT32, ConfigError
from gsae_jax.exchange import files
from gsae_jax.lms import sites
from gsae_jax.saes import linalg, trained

KEY = "gsae_jax"  # of the record, in files of other projects
KINDS: dict[str, tuple[Any, ...]] = {
    "name": (str,),
    "options": (dict,),
    "dtype": ("float32", "bfloat16"),
    "l1_coefficient": (float, int, None),
    "learning_rate": (float, int, None),
    "seed": (int, None),
    "scale": (float, int, None),
    "norm_limit": (float, int, None),
}
ARCHITECTURES = ("gated", "relu", "jumprelu")  # that every format can hold
# Of these the least and the most, as in a run.
RANGES = {
    "l1_coefficient": (0, FLOAT32),
    "learning_rate": (0, FLOAT32),
    "seed": (0, INT32),
    "scale": (1e-30, FLOAT32),
    "norm_limit": (0, FLOAT32),
}
# Of a folder, and of a line in a table or a figure.
NAME = r"[\w=+-][\w .=+-]{0,119}"
# SAELens' names, of what other formats have a place for too.
METADATA: dict[str, tuple[Any, ...]] = {
    "model_name": (str, None, ...),
    "context_size": (int, None, ...),
    "dataset_path": (str, None, ...),
    "prepend_bos": (bool, None, ...),
}


class DivergedError(ConfigError):
    """An SAE has numbers that are not finite, which no reader would take."""

    def __init__(self, name: str, parameters: Iterable[str]):
        """`name`: of the SAE; `parameters`: the names of those that have such numbers."""
        why = "training diverged; train it again with a lower learning rate"
        super().__init__(name, f"has numbers in {', '.join(parameters)} that are not finite or overflow: {why}")


def record(sae: trained.SAE) -> dict[str, Any]:
    """What no other format has a place for; null is unknown, or no limit of norms."""
    numbers = {name: getattr(sae, name) for name in ("l1_coefficient", "learning_rate", "scale", "norm_limit")}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()} | {
        "name": sae.name,
        "seed": sae.seed,
        "dtype": sae.config.dtype,
        "options": {name: getattr(sae.config, name) for name in _options(type(sae.config))},
    }


def parameters(sae: trained.SAE) -> dict[str, np.ndarray]:
    """The parameters on the host, float32, as every format has them.

    Raises:
        ConfigError: an architecture of your own, or a gated SAE whose encoder is not tied: no format can hold them.
        DivergedError: numbers that are not finite, or overflow where they are used.
    """
    if sae.architecture not in ARCHITECTURES:
        message = f"is of architecture {sae.architecture!r}, which no format can hold"
        raise ConfigError(sae.name, f"{message}; export one of {', '.join(ARCHITECTURES)}")
    params = {name: np.asarray(value, np.float32, order="C") for name, value in sae.params.items()}
    if sae.architecture == "gated":
        if not sae.config.tie_encoder:
            message = "is a gated SAE with tie_encoder=False, which no format can hold; export one with a tied encoder"
            raise ConfigError(sae.name, message)
        if not sae.config.use_r_mag:
            params["r_mag"] = np.zeros_like(params["r_mag"])
    if names := trained.not_finite(params):
        raise DivergedError(sae.name, names)
    return params


def shapes(names: Iterable[str], D: int, F: int) -> dict[str, files.Shape]:
    """Of parameters, by our names."""
    known: dict[str, files.Shape] = {"W_gate": (D, F), "W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    return {name: known.get(name, (F,)) for name in names}


def recentred(architecture: str, params: dict[str, Any]) -> dict[str, Any]:
    """Encoders' biases for inputs that are centred by b_dec, of an SAE whose are not; of a JumpReLU one the reverse."""
    b_dec = params["b_dec"]
    if architecture == "gated":
        with np.errstate(over="ignore", invalid="ignore"):  # which `build` refuses
            W_mag = params["W_gate"] * np.exp(params["r_mag"])[None]
        return {
            "b_gate": linalg.shifted(params["b_gate"], b_dec, params["W_gate"]),
            "b_mag": linalg.shifted(params["b_mag"], b_dec, W_mag),
        }
    b_dec = -b_dec if architecture == "jumprelu" else b_dec
    return {"b_enc": linalg.shifted(params["b_enc"], b_dec, params["W_enc"])}


def misfits(told: dict[str, Any] | None, architecture: str, where: str = "") -> list[str]:
    """What is wrong with a record; None, of a file that is not ours, has nothing wrong."""
    if told is None:
        return []
    faults = files.misfits(told, KINDS, where)
    if not faults:
        if not re.fullmatch(NAME, told["name"]):
            known_as = "up to 120 letters, digits, spaces and _.=+-, not beginning with a dot or a space"
            faults.append(f"{where}name is {told['name'][:60]!r}; it has {known_as}")
        faults += [
            f"{where}{name} is {json.dumps(told[name])[:60]}, not from {low:g} to {high:g}"
            for name, (low, high) in RANGES.items()
            if told[name] is not None and not low <= told[name] <= high
        ]
        switches = _options(trained.module_of(architecture).Config)
        # No format holds an untied encoder.
        known: dict[str, tuple[Any, ...]] = {name: (True,) if name == "tie_encoder" else (bool,) for name in switches}
        faults += files.misfits(told["options"], known, f"{where}options.")
        extra = sorted(set(told) - set(KINDS)) + [
            f"options.{name}" for name in sorted(set(told["options"]) - set(known))
        ]
        faults += [f"{where}{name} is not known" for name in extra]
    return faults


def build(
    path: Path,
    architecture: str,
    params: dict[str, Any],
    site: str | None,
    told: dict[str, Any] | None,
    metadata: dict[str, Any],
) -> trained.SAE:
    """The SAE of a file, with its record; one that is not ours has the name of its folder, or file.

    Raises:
        ConfigError: parameters that do not fit the record, or overflow.
    """
    # A name ends in a number, as in a stack.
    path = path.absolute()
    stem = path.name if path.is_dir() else path.parent.name if path.stem == "params" else path.stem
    stem = re.sub(r"^[. ]|[^\w .=+-]", "_", stem)[:100]
    name = stem if re.search(r"._\d+$", stem) else f"{stem}_0"
    ours, told = told is not None, told or {"name": name, "options": {}, "dtype": "float32"}
    if told["options"].get("use_r_mag") is False and np.any(params["r_mag"]):
        files.refuse(path, ["its options say use_r_mag false, but the tensor r_mag is not zero"])
    names = trained.not_finite(params)
    files.refuse(path, [f"the parameter {name} has numbers that are not finite or overflow" for name in names])
    width, d_in = params["W_dec"].shape
    numbers = {name: told.get(name) for name in ("l1_coefficient", "learning_rate", "scale")}
    limit = told.get("norm_limit")
    return trained.SAE(
        name=told["name"],
        architecture=architecture,
        config=trained.module_of(architecture).Config(d_in, width, dtype=told["dtype"], **told["options"]),
        site=site if ours and site else sites.hook_name(site or "") or site or "",
        params={name: jnp.asarray(value) for name, value in params.items()},
        seed=told.get("seed"),
        norm_limit=math.inf if limit is None else limit,
        metadata=metadata,
        **{name: math.nan if value is None else value for name, value in numbers.items()},
    )


def _options(config: Any) -> list[str]:
    """The names of an architecture's switches."""
    own = ("d_in", "width", "dtype")
    return [field.name for field in dataclasses.fields(config) if field.name not in own]
