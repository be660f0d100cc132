"""A trained SAE as a small frozen object, in the language model's own units."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import plugins
from gsae_jax.config import ConfigError, known_names


def module_of(architecture: str) -> Any:
    """The file of `saes/` with the architecture's pure functions."""
    return plugins.load("saes", architecture, having="FEATURE_AXES", field="architecture")


def build_config(
    architecture: str, d_in: int, width: int, dtype: str, options: dict[str, Any], field: str
) -> tuple[Any, Any]:
    """The module and the Config of an architecture that is trained here.

    Raises:
        ConfigError: an architecture or option that does not exist; the message starts with `field`.
    """
    trainable = plugins.known("saes", having="loss")
    if architecture in set(plugins.known("saes", having="FEATURE_AXES")) - set(trainable):
        message = f"{architecture!r} is for evaluation and cannot be trained; write one of {', '.join(trainable)}"
        raise ConfigError(f"{field}.architecture", message)
    module = plugins.load("saes", architecture, having="loss", field=f"{field}.architecture")
    own = ("d_in", "width", "dtype")  # set from elsewhere in the experiment
    fields = [setting.name for setting in dataclasses.fields(module.Config) if setting.name not in own]
    for name in options:
        if name not in fields:
            raise ConfigError(
                f"{field}.options.{name}", f"is not an option of {architecture!r}; {known_names(name, fields)}"
            )
    return module, module.Config(d_in=d_in, width=width, dtype=dtype, **options)


def variant(architecture: str, config: Any) -> str:
    """The architecture and its options that are not the default: "gated" or "gated tie_encoder=False"."""
    fields = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    options = {field.name: getattr(config, field.name) for field in fields if field.name != "dtype"}
    changed = [
        f"{field.name}={options[field.name]}"
        for field in fields
        if options.get(field.name, field.default) != field.default
    ]
    return " ".join([architecture, *changed])


def converter(source: str, target: str) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None:
    """What turns parameters of one architecture into those of the same function in another, if anything does."""
    if source == target:
        return dict
    return getattr(module_of(target), f"from_{source}", None)


def not_finite(params: Mapping[str, jax.typing.ArrayLike]) -> list[str]:
    """The names of parameters with numbers that are not finite. The exponential of r_mag must be finite as well.

    Every process calls it, as features may lie over all devices.
    """

    def is_finite(name: str, value: jax.typing.ArrayLike) -> bool:
        with np.errstate(over="ignore"):  # float64 that float32 does not hold
            value = jnp.asarray(value, jnp.float32)
        return bool(jnp.isfinite(jnp.exp(value) if name == "r_mag" else value).all())

    return [name for name, value in params.items() if not is_finite(name, value)]


def with_unit_rows(architecture: str, params: dict[str, jax.Array], field: str) -> dict[str, jax.Array]:
    """The same reconstructions from unit decoder rows, as training has them: activations take the rows' norms.

    Raises:
        ConfigError: a row of zeros, which has no direction, or numbers that are not finite; the message starts with
            `field`.
    """
    if names := not_finite(params):
        raise ConfigError(
            field, f"has numbers in {', '.join(names)} that are not finite; write SAEs without such numbers"
        )
    norms_F = jnp.linalg.norm(params["W_dec"], axis=-1)
    if not norms_F.all():
        dead = int((norms_F == 0).sum())
        raise ConfigError(field, f"has {dead} features whose row of the decoder is zero; write SAEs without such")
    if jnp.abs(norms_F - 1).max() < 1e-5:
        return params
    axes = module_of(architecture).FEATURE_AXES
    scales = {0: norms_F, 1: norms_F[None]}
    activations = {
        name: value * scales[axes[name]]
        for name, value in params.items()
        if axes[name] is not None and name not in ("W_dec", "r_mag")
    }
    return params | activations | {"W_dec": params["W_dec"] / norms_F[:, None]}


@dataclasses.dataclass(frozen=True, eq=False)
class SAE:
    """One trained SAE; activations are in the language model's own units, of any leading shape.

    Attributes:
        name: the stack it was trained in, and its place there.
        architecture: "gated", "relu" or "jumprelu".
        config: the architecture's Config.
        site: where in the language model it reads; "" where an imported one does not say.
        params: the architecture's parameters, with the site's mean and scale folded in.
        l1_coefficient, learning_rate, seed: how it was trained; NaN and None where an imported one does not say.
        scale: what activations, less their mean if they were centred, were multiplied by in training.
        norm_limit: activations of a larger norm were kept from it.
        metadata: what is known of its model and text, under SAELens' names; of an imported SAE, all that its file said.
    """

    name: str
    architecture: str
    config: Any
    site: str
    params: dict[str, jax.Array]
    l1_coefficient: float = math.nan
    learning_rate: float = math.nan
    seed: int | None = None
    scale: float = math.nan
    norm_limit: float = math.inf
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, x: jax.typing.ArrayLike) -> jax.Array:
        """Feature activations [..., F] of activations [..., D], which may also be a torch tensor.

        Raises:
            ConfigError: the last axis is not D, or `x` is not an array of real numbers.
        """
        x = self._checked(x, self.config.d_in, "x")
        f_BxF = _encode(self.architecture, self.config, self.params, x.reshape(-1, self.config.d_in))
        return f_BxF.reshape(*x.shape[:-1], self.config.width)

    def decode(self, f: jax.typing.ArrayLike) -> jax.Array:
        """Reconstructions [..., D] of feature activations [..., F]."""
        f = self._checked(f, self.config.width, "f")
        x_BxD = module_of(self.architecture).decode(self.params, f.reshape(-1, self.config.width))
        return x_BxD.reshape(*f.shape[:-1], self.config.d_in)

    def __call__(self, x: jax.typing.ArrayLike) -> jax.Array:
        """The reconstruction [..., D] of activations [..., D], in their dtype; `lm.run(tokens, sae)` splices it in."""
        x = as_floats(x, "x")
        return self.decode(self.encode(x)).astype(x.dtype)

    def save(self, path: str | os.PathLike[str], format: str = "saelens") -> None:
        """Write it as a new folder that another library reads, and `gsae_jax.load` too.

        Args:
            path: the folder.
            format: a file of `gsae_jax/exchange/`: saelens, dictionary_learning, gemma_scope or jumprelu.

        Raises:
            ConfigError: an unknown format or one that cannot hold this SAE, or a path that exists; nothing was written.
        """
        plugins.load("exchange", format, having="write", field="format").write(self, path)

    def _checked(self, value: Any, size: int, name: str) -> jax.Array:
        value = as_floats(value, name)
        if value.ndim == 0 or value.shape[-1] != size:
            raise ConfigError(name, f"has shape {list(value.shape)}; the last axis of this SAE's {name} is {size}")
        return value


def as_floats(value: Any, name: str) -> jax.Array:
    """An array of floating-point numbers, of the same type if it has one; integers become float32.

    Raises:
        ConfigError: it is not an array of real numbers, such as a ragged list; the message begins with `name`.
    """
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        tensor = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds each of its numbers exactly.
        half = str(tensor.dtype) == "torch.bfloat16"
        value = tensor.float().numpy().astype(jnp.bfloat16) if half else tensor.numpy()
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:  # NumPy refuses ragged lists, JAX text
        why = str(error).partition("\n")[0]
        raise ConfigError(name, f"is no array of numbers ({why}); give one whose rows have equal lengths") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ConfigError(name, f"is of type {array.dtype}; give real numbers")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(architecture: str, config: Any, params: dict[str, jax.Array], x_BxD: jax.Array) -> jax.Array:
    return module_of(architecture).encode(params, x_BxD, config)


def fingerprint(params: Mapping[str, jax.typing.ArrayLike]) -> str:
    """A name for parameters: equal names, shapes and numbers have equal fingerprints."""
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        array = np.asarray(value, np.float32, order="C")
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def fold(params: dict[str, jax.Array], scale: float, mean_D: jax.typing.ArrayLike = 0.0) -> dict[str, jax.Array]:
    """The parameters for activations x of an SAE that was trained on (x - mean) * scale.

    Every architecture here maps s * x to s * f when its biases are multiplied by s, so the biases take the factor, and
    unit decoder rows stay unit. Where inputs enter as x - b_dec (`CENTRED`), b_dec takes the mean; elsewhere it is 0.
    """
    folded = {name: value / scale if name.startswith("b_") else value for name, value in params.items()}
    return folded | ({"b_dec": folded["b_dec"] + mean_D} if "b_dec" in folded else {})


def unfold(params: dict[str, jax.Array], scale: float, mean_D: jax.typing.ArrayLike = 0.0) -> dict[str, jax.Array]:
    """The inverse of `fold`."""
    params = params | ({"b_dec": params["b_dec"] - mean_D} if "b_dec" in params else {})
    return {name: value * scale if name.startswith("b_") else value for name, value in params.items()}
