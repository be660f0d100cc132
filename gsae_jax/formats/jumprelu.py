"""A SAELens folder with the JumpReLU form of an SAE, for tools that take no gated ones; it is read as SAELens'."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.formats import records, saelens
from gsae_jax.saes import contract, trained

FORMS = ("jumprelu", "jumprelu_transcoder")


def form(sae: trained.SAE) -> trained.SAE:
    """The same function as a JumpReLU SAE, with thresholds that have a logarithm.

    Raises:
        UserError: an architecture without this form, or a gated SAE whose encoder is not tied.
        DivergedError: numbers that are not finite, or overflow in this form.
    """
    target = next((name for name in FORMS if contract.converter(sae.architecture, name)), None)
    if target is None:
        what = f"is of architecture {sae.architecture!r}, which has no JumpReLU form"
        raise UserError(f"{what}; write another format", sae.name)
    sae = records.converted(sae, target)
    # Nothing lies between 0 and the smallest normal number.
    threshold = jnp.maximum(sae.params["threshold"], np.finfo(np.float32).tiny)
    return dataclasses.replace(sae, params=sae.params | {"threshold": threshold})


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    saelens.write(form(sae), path)
