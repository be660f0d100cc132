"""What crosscoders share (Lindsey et al. 2024): features that several sites have in common.

With x_s the activations of site s, of width D_s, and c_s = x_s - b_dec_s:
    f       = as of the SAE with the same activation, of sum_s c_s @ W_enc_s     (gated: W_gate_s)
    x_hat_s = f @ W_dec_s + b_dec_s
    loss    = sum_s ||x_s - x_hat_s||^2 / D_s + that SAE's penalty of n_i f_i    (gated: of n_i ReLU(pi_gate_i))
    n_i     = sum_s ||W_dec_s,i||                                                the norms of a feature's rows

Rows are free, not unit: a feature has larger rows at the sites where it matters. n_i f_i does not change if f_i is
scaled up and its rows are scaled down. So a penalty weighs n_i f_i, BatchTopK compares it with that of other features,
and AuxK chooses dead features by it. At one site, this is an SAE with free rows and a penalty weighted by their norms.

The norms of a ReLU crosscoder's penalty press on rows, and set those of many sites to nearly zero. In gated ones the
auxiliary reconstruction presses back, as it is by n_i ReLU(pi_gate_i) and the frozen rows W_dec_s,i / n_i. BatchTopK
has no such penalty.

So a crosscoder is an SAE of one long vector: y = (a_s x_s for each s) with a_s = sqrt(sum_t D_t / D_s), which turns the
sum of the sites' errors over D_s into one error over the length, with features f_i n_i. This file writes its parameters
as those of that SAE, and the SAE's own functions do the rest.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.saes import contract
from gsae_jax.saes.contract import Batch, Parameter, Params, Role, Shards, Statistics

SITES = 64  # at most
Table = Mapping[str, Parameter]


def table(of_sae: Table) -> dict[str, Parameter]:
    """`PARAMETERS` of the crosscoder with the activation of an SAE: `W_dec_0` is the decoder of the first site."""
    entries: dict[str, Parameter] = {}
    for name, parameter in of_sae.items():
        if "d_in" in parameter.shape:
            entries |= {f"{name}_{site}": replace(parameter, site=site, unit_rows=False) for site in range(SITES)}
        else:
            entries[name] = parameter
    return entries


def split(of_sae: Table, params: Params, d_in: tuple[int, ...]) -> Params:
    """A crosscoder's parameters, from those of an SAE of its sites in one long vector."""
    ends = list(itertools.accumulate(d_in))[:-1]
    parts: Params = {}
    for name, value in params.items():
        shape = of_sae[name].shape
        of_sites = jnp.split(value, ends, shape.index("d_in")) if "d_in" in shape else None
        parts |= {name: value} if of_sites is None else {f"{name}_{n}": part for n, part in enumerate(of_sites)}
    return parts


def joined(of_sae: Table, params: Params) -> Params:
    """The inverse of `split`."""
    whole = {}
    for name, parameter in of_sae.items():
        if name in params:
            whole[name] = params[name]
        elif parts := _of_sites(name, params):
            whole[name] = jnp.concatenate(parts, parameter.shape.index("d_in"))
    return whole


def joined_inputs(inputs: tuple[jax.Array, ...]) -> jax.Array:
    """The activations of all sites in one long vector [B, D]."""
    return jnp.concatenate(inputs, 1)


def decode(params: Params, f_BxF: jax.Array) -> tuple[jax.Array, ...]:
    """Reconstructions of each site."""
    pairs = zip(_of_sites("W_dec", params), _of_sites("b_dec", params), strict=True)
    return tuple(f_BxF @ W_dec + b_dec[None] for W_dec, b_dec in pairs)


def norms(params: Params) -> jax.Array:
    """n [F], the sum over sites of the norms of each feature's rows; 1 for a feature without any."""
    squares = [jnp.square(W_FxD).sum(-1) for W_FxD in _of_sites("W_dec", params)]
    # The root has no derivative at 0.
    n_F = jnp.stack([jnp.where(sq > 0, jnp.sqrt(jnp.where(sq > 0, sq, 1)), 0) for sq in squares]).sum(0)
    return jnp.where(n_F > 0, n_F, 1)


def loss_as(
    sae: contract.Trainable,
    params: Params,
    state: Params,
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Any,
    shards: Shards,
) -> tuple[jax.Array, Statistics]:
    """The loss of the SAE that has the crosscoder's function (`contract.Trainable.loss`).

    `mse` is the sum of the sites' squared errors over D_s.

    Args:
        sae: the file of the SAE with the same activation; the others are as of its own `loss`.
    """
    D = sum(config.d_in)
    # [D], a_s of each coordinate.
    scale_D = jnp.asarray(np.repeat([math.sqrt(D / width) for width in config.d_in], config.d_in))
    n_F = norms(params)

    def units(parameter: Parameter) -> jax.Array | float:
        """What an array is multiplied by."""
        match parameter.role:
            case Role.ENCODER:
                return n_F[None] / scale_D[:, None]
            case Role.DECODER:
                return scale_D[None] / n_F[:, None]
            case Role.FEATURE:
                return n_F
            case Role.CENTER:
                return scale_D
        return 1

    def of_sae(params: Params) -> Params:
        whole = joined(sae.PARAMETERS, params)
        return {name: value * units(sae.PARAMETERS[name]) for name, value in whole.items()}

    y_BxD = joined_inputs(batch.inputs) * scale_D[None]
    batch = batch._replace(inputs=y_BxD, targets=y_BxD)
    value, statistics = sae.loss(of_sae(params), of_sae(state), batch, coefficients, config, shards)
    after = {name: value / units(sae.PARAMETERS[name]) for name, value in statistics.state.items()}
    return value, statistics._replace(state=after)


def _of_sites(name: str, params: Params) -> list[jax.Array]:
    """An array of each site, in their order; empty if there is none of this name."""
    names = itertools.takewhile(params.__contains__, (f"{name}_{site}" for site in itertools.count()))
    return [params[name] for name in names]
