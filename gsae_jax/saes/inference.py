"""Features and reconstructions of trained SAEs: in parts of bounded memory, and by active features where they pay.

All functions are for use inside `jit`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsae_jax import batching
from gsae_jax.kernels import active
from gsae_jax.saes import contract, features, parameters


def floats_at_once(platform: str) -> int:
    """Of one array [tokens, features] on a device. More are no faster, and do not fit a CPU's caches."""
    return 2**22 if platform == "cpu" else 2**26


class SparseFeatures(NamedTuple):
    """The active features of each token.

    Attributes:
        indices: [..., K], their numbers, ascending; the SAE's width in slots that a token does not need.
        values: [..., K], their activations; 0 in those slots.
    """

    indices: jax.Array
    values: jax.Array


def tokens_at_once(width: int, splits: int = 1) -> int:
    """How many tokens `batching.in_chunks` should give a function that makes arrays [tokens, features].

    Args:
        width: features on one device.
        splits: how many devices the tokens lie on.
    """
    return splits * max(1, floats_at_once(jax.default_backend()) // width)


def encode(
    architecture: contract.Architecture, config: Any, params: contract.Params, inputs: contract.Activations
) -> jax.Array:
    """Feature activations [R, T, F] of inputs [R, T, D]."""

    def part(inputs: contract.Activations) -> tuple[jax.Array, tuple[()]]:
        return _rows_of(inputs, architecture.encode(params, flat(inputs), config)), ()

    return batching.in_chunks(part, inputs, tokens_at_once(config.width))[0]


def encode_sparse(
    architecture: contract.Architecture, config: Any, params: contract.Params, inputs: contract.Activations, K: int
) -> tuple[SparseFeatures, jax.Array]:
    """(At most K active features of each token, how many [R, T] it has)."""

    def part(inputs: contract.Activations) -> tuple[tuple[SparseFeatures, jax.Array], tuple[()]]:
        f_BxF = architecture.encode(params, flat(inputs), config)
        mask = active.pack(f_BxF != 0)  # also where it is not a number
        slots = active.Slots.of(mask, K, config.width)
        indices, values = jax.lax.sort((slots.features, slots.take(f_BxF)), num_keys=1)
        features, count = (SparseFeatures(indices, values), mask.upto[:, -1])
        return jax.tree.map(lambda value: _rows_of(inputs, value), (features, count)), ()

    return batching.in_chunks(part, inputs, tokens_at_once(config.width))[0]


def reconstruct(
    architecture: contract.Architecture,
    config: Any,
    params: contract.Params,
    inputs: contract.Activations,
    by_active: bool = False,
) -> contract.Activations:
    """Reconstructions of inputs [R, T, D]; `by_active` takes this file's `decode`, else it is the architecture's."""

    def part(inputs: contract.Activations) -> tuple[contract.Activations, tuple[()]]:
        x = flat(inputs)
        f_BxF = architecture.encode(params, x, config)
        x_hats = decode(architecture, config, params, f_BxF) if by_active else architecture.decode(params, f_BxF)
        x_hats = contract.with_skip(architecture, params, x, x_hats)
        return jax.tree.map(lambda x_hat: _rows_of(inputs, x_hat), x_hats), ()

    return batching.in_chunks(part, inputs, tokens_at_once(config.width))[0]


def flat(inputs: contract.Activations) -> contract.Activations:
    """Activations [R, T, D] as [B, D]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]), inputs)


def _rows_of(inputs: contract.Activations, value: jax.Array) -> jax.Array:
    """A value [B, ...] as [R, T, ...] like the inputs."""
    return value.reshape(*jax.tree.leaves(inputs)[0].shape[:2], *value.shape[1:])


def decode_sparse(
    architecture: contract.Architecture, config: Any, params: contract.Params, f: SparseFeatures
) -> contract.Activations:
    """Reconstructions [R, T, D] of features [R, T, K]: what `decode` gives of them as an array [B, F]."""

    def part(f: SparseFeatures) -> tuple[contract.Activations, tuple[()]]:
        indices, values = flat(f)
        rows_Bx1 = jnp.arange(len(indices))[:, None]
        dense_BxF = jnp.zeros((len(indices), config.width), values.dtype)
        # Negative indices would count from the end.
        indices = jnp.where(indices < 0, config.width, indices)
        dense_BxF = dense_BxF.at[rows_Bx1, indices].add(values, mode="drop")
        x_hats = architecture.decode(params, dense_BxF)
        return jax.tree.map(lambda x_hat: _rows_of(f, x_hat), x_hats), ()

    if not _decodes_by_rows(architecture, config):
        return batching.in_chunks(part, f, tokens_at_once(config.width))[0]
    indices, values = flat(f)
    values = jnp.where((indices >= 0) & (indices < config.width), values, 0)
    slots = active.Slots(indices, jnp.arange(len(indices)), jnp.array([len(indices)]))
    return _rows_of(f, _decode_slots(architecture, params, slots, values))


def decode(
    architecture: contract.Architecture, config: Any, params: contract.Params, f_BxF: jax.Array
) -> contract.Activations:
    """The architecture's `decode`, by active features if all tokens have few. For one device, without gradients."""
    Ks = features.capacities(config.width, features.DECODED_PER_SLOT) if jax.default_backend() == "cpu" else ()
    if not Ks or not _decodes_by_rows(architecture, config):
        return architecture.decode(params, f_BxF)
    mask = active.pack(f_BxF != 0)

    def by_active(K: int) -> jax.Array:
        slots = active.Slots.of(mask, K, config.width)
        return _decode_slots(architecture, params, slots, slots.take(f_BxF))

    def by_all() -> Any:
        return architecture.decode(params, f_BxF)

    branches: list[Any] = [*(partial(by_active, K) for K in Ks), by_all]
    # A row of the decoder that is not finite shows in the dense product only.
    finite = jnp.isfinite(params[parameters.decoder(architecture)]).all()
    which = sum((mask.most > K).astype(jnp.int32) for K in Ks)
    return jax.lax.switch(jnp.where(finite, which, len(Ks)), branches)


def _decodes_by_rows(architecture: contract.Architecture, config: Any) -> bool:
    """Whether `_decode_slots` is its `decode`: of this package's architectures, where they write one site."""
    name: str = getattr(architecture, "__name__", "")
    return name.startswith("gsae_jax.") and not isinstance(getattr(config, "d_out", config.d_in), tuple)


def _decode_slots(
    architecture: contract.Architecture, params: contract.Params, slots: active.Slots, values_BxK: jax.Array
) -> jax.Array:
    """f @ decoder + bias, as all architectures of this package decode, of values of active features."""
    W, bias = params[parameters.decoder(architecture)], parameters.output_bias(architecture)
    dtype = jnp.result_type(values_BxK, W)
    block = features.block(jax.default_backend())
    (x_hat_BxD,) = active.decode(values_BxK[None], slots, W, (True,), dtype.name, block)
    x_hat_BxD = x_hat_BxD.astype(dtype)
    return x_hat_BxD if bias is None else x_hat_BxD + params[bias][None]
