"""The gated transcoder: `transcoder` says what it computes, and `gated` how it is gated and trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.saes import gated, transcoder

PARAMETERS = transcoder.table(gated.PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, gated.Options):
    """As of `transcoder` and `gated`."""


encode, gate, decode, skip, loss = gated.encode, gated.gate, gated.decode, transcoder.skip, gated.loss
encoder, shifted, normal_form, feature_facts = gated.encoder, gated.shifted, gated.normal_form, gated.feature_facts
idle = gated.idle


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(gated.init(key, config), key, config)


def from_jumprelu_transcoder(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a JumpReLU transcoder's, with b_in = 0."""
    kept = {name: params[name] for name in ("W_dec", "b_dec", "W_skip") if name in params}
    b_enc = params["b_enc"]
    gates = {"W_gate": params["W_enc"], "b_gate": b_enc - jax.nn.relu(params["threshold"])}
    magnitudes = {"b_mag": b_enc, "r_mag": jnp.zeros_like(b_enc)}
    return kept | gates | magnitudes | {"b_in": jnp.zeros(params["W_enc"].shape[0])}
