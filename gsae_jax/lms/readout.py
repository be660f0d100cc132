"""What directions of the residual stream do to the logits of a language model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.lms import sites


def to_stream(module: Any, params: Any, directions: jax.Array, site: str) -> jax.Array:
    """What directions [..., width of the site] add to the residual stream [..., D] after the last block.

    Raises:
        UserError: a norm or an MLP lies between the site and the stream, so that there is no such linear map.
    """
    layer, _, hook = site.removeprefix("blocks.").partition(".")
    if hook == sites.MLP_INPUT:
        raise UserError(f"is {site}, which only the MLP reads, so that no linear map leads to the stream", "site")
    into = {"attn.hook_z": ("attn", "W_O"), "mlp.hook_post": ("mlp", "W_out")}.get(hook)
    if into is not None:
        if module.config.norm_after:
            raise UserError(f"is {site}, which this language model normalises before it adds it to the stream", "site")
        W = params[f"blocks.{layer}"][into[0]][into[1]].astype(jnp.float32)
        directions = directions @ W.reshape(-1, W.shape[-1])
    if site and module.config.block_scale:
        for number in range(int(layer) + (hook == "hook_resid_post"), module.config.n_layers):
            directions *= params[f"blocks.{number}"]["scale"].astype(jnp.float32)[0]
    return directions


def direct_effects(module: Any, params: Any, directions: jax.Array) -> jax.Array:
    """Directions [..., D] through the final norm's gain and the unembedding, to [..., V] (see `LM.logit_effects`)."""
    c, w = module.config, params["ln_final"]["w"].astype(jnp.float32) + module.config.norm_offset
    if c.normalization == "LN":
        directions -= directions.mean(-1, keepdims=True)
    W_U = params["embed.W_E"].T if c.tied else params["unembed.W_U"]
    return jnp.matmul(directions * jnp.expand_dims(w, tuple(range(directions.ndim - 1))), W_U.astype(jnp.float32))


def derivatives(module: Any, params: Any, directions: jax.Array, stream_D: jax.Array) -> jax.Array:
    """Derivatives [..., V] of the logits along directions [..., D], where the residual stream is `stream_D`."""
    bare = dataclasses.replace(module, mesh=None)

    def logits(x_D: jax.Array) -> jax.Array:
        return bare.apply({"params": params}, x_D[None, None], method="logits")[0, 0]

    _, along = jax.linearize(logits, stream_D)
    flat = directions.reshape(-1, directions.shape[-1])
    return jax.vmap(along)(flat).reshape(*directions.shape[:-1], -1)


def checked(directions: Any, width: int, what: str) -> jax.Array:
    """An array of floating-point numbers [..., width].

    Raises:
        UserError: another shape.
    """
    directions = jnp.asarray(directions, jnp.float32)
    if not directions.ndim or directions.shape[-1] != width:
        raise UserError(f"has shape {list(directions.shape)}; the last axis must be {width}", what)
    return directions
