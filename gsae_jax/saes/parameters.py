"""What follows from an architecture's table of parameters: their names by role, units, unit rows, finite numbers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.saes import contract, linalg
from gsae_jax.saes.contract import Architecture, Parameter, Params, Role


class Units(NamedTuple):
    """A site's mean and scale: inputs and targets are (x - mean) * scale of activations x."""

    scale: float = 1.0
    mean: Any = 0.0  # [D]


def named(architecture: Architecture, *roles: Role, site: int = 0) -> str | None:
    """The name of the parameter with one of these roles at a site, if there is one."""
    table = architecture.PARAMETERS.items()
    return next((name for name, parameter in table if parameter.role in roles and parameter.site == site), None)


def decoder(architecture: Architecture, site: int = 0) -> str:
    """The name of the decoder of a site that is written."""
    name = named(architecture, Role.DECODER, site=site)
    assert name is not None, "every architecture has a decoder"
    return name


def output_bias(architecture: Architecture, site: int = 0) -> str | None:
    """The name of what is added to the reconstructions of a site."""
    return named(architecture, Role.OUTPUT_BIAS, Role.CENTER, site=site)


def input_bias(architecture: Architecture, site: int = 0) -> str | None:
    """The name of what is subtracted from the inputs of a site."""
    return named(architecture, Role.INPUT_BIAS, Role.CENTER, site=site)


def can_center(architecture: Architecture) -> bool:
    """Whether `fold` can give the mean of the inputs to parameters."""
    if named(architecture, Role.SKIP) and not named(architecture, Role.OUTPUT_BIAS):
        return False
    return contract.can_shift(architecture) or input_bias(architecture) is not None


def split(architecture: Architecture, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What gradients train, and state."""
    table = architecture.PARAMETERS
    trained = {name: value for name, value in params.items() if table[name].trained}
    return trained, {name: value for name, value in params.items() if name not in trained}


def fold(architecture: Architecture, params: Params, inputs: Sequence[Units], targets: Sequence[Units]) -> Params:
    """The parameters for activations x of an SAE that was trained on (x - mean) * scale.

    Features get the units of the first target, so that rows of its decoder stay unit. What is subtracted from inputs or
    added to reconstructions takes the mean.

    Args:
        architecture: of the parameters.
        params: [...] of one SAE.
        inputs: the units of each site that is read.
        targets: the units of each site that is written.
    """
    folded = dict(params)
    for name, value in params.items():
        times, divided = _factor(architecture.PARAMETERS[name], inputs, targets)
        if times != divided:
            folded[name] = value * times / divided
    return _with_means(architecture, folded, inputs, targets, 1)


def unfold(architecture: Architecture, params: Params, inputs: Sequence[Units], targets: Sequence[Units]) -> Params:
    """The inverse of `fold`."""
    unfolded = _with_means(architecture, params, inputs, targets, -1)
    for name, value in unfolded.items():
        times, divided = _factor(architecture.PARAMETERS[name], inputs, targets)
        if times != divided:
            unfolded[name] = value * divided / times
    return unfolded


def _with_means(
    architecture: Architecture, params: Params, inputs: Sequence[Units], targets: Sequence[Units], sign: int
) -> Params:
    """Parameters that take the means of inputs and targets (sign 1) or give them back (-1)."""
    moved = dict(params)
    for site, units in enumerate(inputs):
        center = input_bias(architecture, site)
        if center is not None:
            moved[center] = moved[center] + sign * units.mean
        elif np.any(units.mean):
            moved = contract.shifted(architecture, moved, -sign * units.mean)
    for site, units in enumerate(targets):
        if (bias := named(architecture, Role.OUTPUT_BIAS, site=site)) is not None:
            moved[bias] = moved[bias] + sign * units.mean
    skip, bias = named(architecture, Role.SKIP), named(architecture, Role.OUTPUT_BIAS)
    if skip in params and np.any(inputs[0].mean):
        assert skip is not None
        assert bias is not None, "`can_center` says so"
        moved[bias] = linalg.shifted(moved[bias], -sign * inputs[0].mean, moved[skip])
    return moved


def _factor(parameter: Parameter, inputs: Sequence[Units], targets: Sequence[Units]) -> tuple[float, float]:
    """What a parameter is multiplied by and divided by when features and activations change their units."""
    features = targets[0].scale
    match parameter.role:
        case Role.ENCODER:
            return inputs[parameter.site].scale, features
        case Role.SKIP:
            return inputs[parameter.site].scale, targets[parameter.site].scale
        case Role.DECODER:
            return features, targets[parameter.site].scale
        case Role.FEATURE:
            return 1, features
        case Role.INPUT_BIAS | Role.CENTER:
            return 1, inputs[parameter.site].scale
        case Role.OUTPUT_BIAS:
            return 1, targets[parameter.site].scale
    return 1, 1


def with_unit_rows(architecture: Architecture, params: Params) -> Params:
    """The same reconstructions from unit rows of the decoder, if training has them: features take the rows' norms.

    Raises:
        UserError: a row of zeros, which has no direction, numbers that are not finite, or rows that are not unit of an
            architecture that compares features, and would choose others in other units.
    """
    if names := not_finite(architecture, params):
        raise UserError(f"has numbers in {', '.join(names)} that are not finite; write SAEs without such numbers")
    if not architecture.PARAMETERS[decoder(architecture)].unit_rows:
        return params
    norms_F = jnp.linalg.norm(params[decoder(architecture)], axis=-1)
    if not norms_F.all():
        dead = int((norms_F == 0).sum())
        raise UserError(f"has {dead} features whose decoder row is zero; write SAEs without such features")
    if jnp.abs(norms_F - 1).max() < 1e-5:
        return params
    if contract.compares_features(architecture):
        raise UserError(
            "has decoder rows that are not unit. Its features are compared with each other, and would be chosen "
            "differently with unit rows; write SAEs with unit rows"
        )
    scaled = dict(params)
    for name, value in params.items():
        parameter = architecture.PARAMETERS[name]
        if parameter.role in (Role.ENCODER, Role.FEATURE, Role.DECODER) and parameter.axis is not None:
            others = [axis for axis in range(len(parameter.shape)) if axis != parameter.axis]
            norms = jnp.expand_dims(norms_F, others)
            scaled[name] = value / norms if parameter.role is Role.DECODER else value * norms
    return scaled


def not_finite(architecture: Architecture, params: Mapping[str, jax.typing.ArrayLike]) -> list[str]:
    """The names of parameters with numbers that are not finite; of a logarithm, the factor must be finite as well.

    Every process calls it, as features may lie over all devices.
    """

    def is_finite(name: str, value: jax.typing.ArrayLike) -> bool:
        with np.errstate(over="ignore"):  # float64 that float32 does not hold
            value = jnp.asarray(value, jnp.float32)
        is_logarithm = architecture.PARAMETERS[name].role is Role.LOGARITHM
        return bool(jnp.isfinite(jnp.exp(value) if is_logarithm else value).all())

    return [name for name, value in params.items() if not is_finite(name, value)]


def fingerprint(params: Mapping[str, jax.typing.ArrayLike]) -> str:
    """A name for parameters: equal names, shapes and numbers have equal fingerprints."""
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        array = np.asarray(value, np.float32, order="C")
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]
