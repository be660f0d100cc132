"""A SAELens folder with the JumpReLU form of an SAE, for tools that take no gated ones; it is read as SAELens'."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from gsae_jax import errors
from gsae_jax.errors import UserError
from gsae_jax.formats import records, saelens
from gsae_jax.saes import contract, jumprelu, parameters, trained


def form(sae: trained.SAE) -> trained.SAE:
    """The same function as a JumpReLU SAE, with thresholds that have a logarithm.

    Raises:
        UserError: an architecture without this form, or a gated SAE whose encoder is not tied.
        DivergedError: numbers that are not finite, or overflow in this form.
    """
    convert = contract.converter(sae.architecture, "jumprelu")
    if convert is None:
        what = f"is of architecture {sae.architecture!r}, which has no JumpReLU form"
        raise UserError(f"{what}; write another format", sae.name)
    arrays = records.arrays(sae)
    with errors.within(sae.name):
        params: dict[str, Any] = convert(arrays, sae.config)
    if names := parameters.not_finite(contract.module_of("jumprelu"), params):
        raise records.DivergedError(sae.name, names)
    # Nothing lies between 0 and the smallest normal number.
    params["threshold"] = jnp.maximum(params["threshold"], np.finfo(np.float32).tiny)
    is_one = sae.architecture == "jumprelu"  # whose options stay
    config = sae.config if is_one else jumprelu.Config(sae.config.d_in, sae.config.width, sae.config.dtype)
    return dataclasses.replace(sae, architecture="jumprelu", config=config, params=params)


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    saelens.write(form(sae), path)
