"""One pass over text, on the mesh: what is kept of every feature, in arrays whose size does not depend on the text.

A token's row and position are numbers of the held-out text, which do not depend on batches or devices. Every choice is
made by them alone, so that the result is the same on any number of devices.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsae_jax import batching
from gsae_jax.activations import masking
from gsae_jax.lms import loading
from gsae_jax.saes import contract, inference, trained

TOP = 20  # strongest contexts of a feature, from as many rows
SAMPLE = 100  # random contexts of a feature, from as many rows
# Four bins in each octave of |f|, from 2**FIRST; the first and the last also have what is below and above.
FIRST, BINS = -16, 128
EMPTY = np.float32(np.inf)  # the priority of no token


Array = Any  # of JAX, of NumPy, or the placement of one


class State(NamedTuple):
    """What is known of the features of one SAE. `top_*` and `sample_*` have at most one token of a row.

    Attributes:
        tokens: [], how many were looked at.
        fired: [F], on how many of them each feature was active.
        histogram: [F, BINS], the same by |f|.
        top_value: [F, TOP], the largest |f| in descending order. Of equal ones, the first in the text is first. 0 where
            there are no more.
        top_row, top_position: [F, TOP], where they are.
        sample_priority: [F, SAMPLE], the smallest `priorities` of tokens on which the feature is active, in ascending
            order. EMPTY where there are no more.
        sample_row, sample_position: [F, SAMPLE], where they are.
        sample_value: [F, SAMPLE], |f| there.
    """

    tokens: Array
    fired: Array
    histogram: Array
    top_value: Array
    top_row: Array
    top_position: Array
    sample_priority: Array
    sample_row: Array
    sample_position: Array
    sample_value: Array


def empty(width: int) -> State:
    """The state before any text, as NumPy arrays."""
    places = {
        f"{name}_{kind}": np.zeros((width, size), np.int32)
        for name, size in (("top", TOP), ("sample", SAMPLE))
        for kind in ("row", "position")
    }
    return State(
        tokens=np.zeros((), np.int32),
        fired=np.zeros(width, np.int32),
        histogram=np.zeros((width, BINS), np.int32),
        top_value=np.zeros((width, TOP), np.float32),
        sample_priority=np.full((width, SAMPLE), EMPTY),
        sample_value=np.zeros((width, SAMPLE), np.float32),
        **places,
    )


def edges() -> np.ndarray:
    """The lower edges [BINS] of the bins of |f|; that of the first is 0."""
    codes = np.arange(BINS, dtype=np.int32) + ((127 + FIRST) << 2)
    lower = (codes << 21).view(np.float32)
    return np.concatenate([np.zeros(1, np.float32), lower[1:]])


def _bins(magnitude: jax.Array) -> jax.Array:
    """The bin of each |f|: its exponent and the first two bits of its mantissa."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    return jnp.clip((bits >> 21) - ((127 + FIRST) << 2), 0, BINS - 1)


def priorities(row: Any, position: Any, length: int) -> Any:
    """A random float32 of each token: by the finaliser of MurmurHash3, of the token's number in the text."""
    x = (row.astype(np.uint32) * np.uint32(length) + position.astype(np.uint32)) + np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    # As a float32 that is normal and finite: XLA finds the smallest floats faster than the smallest integers.
    bits = np.uint32(1 << 23) + x % np.uint32(254 << 23)
    return bits.view(np.float32)


class Dictionary(NamedTuple):
    """An SAE without its parameters, on a mesh.

    Attributes:
        mesh: the mesh.
        architecture, config: the SAE's.
    """

    mesh: Mesh
    architecture: str
    config: Any

    @classmethod
    def of(cls, mesh: Mesh, sae: trained.SAE) -> "Dictionary":
        """That of an SAE."""
        return cls(mesh, sae.architecture, sae.config)

    @property
    def along(self) -> str | None:
        """The axis of the mesh along which features lie, if it divides them."""
        return "latent" if self.config.width % self.mesh.shape["latent"] == 0 else None

    def specs(self, params: Mapping[str, Any]) -> tuple[dict[str, P], State]:
        """Where the parameters and the state lie."""
        table = contract.module_of(self.architecture).PARAMETERS
        of_params = {
            name: P() if (axis := table[name].axis) is None else P(*[None] * axis, self.along) for name in params
        }
        return of_params, State(P(), *[P(self.along)] * (len(State._fields) - 1))


def params_on(mesh: Mesh, sae: trained.SAE) -> dict[str, jax.Array]:
    """The SAE's parameters on the mesh, as `update`, `along_rows` and `active` take them."""
    specs, _ = Dictionary.of(mesh, sae).specs(sae.params)
    return {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in sae.params.items()}


def state_on(mesh: Mesh, sae: trained.SAE, state: State) -> State:
    """A state on the mesh, as `update` takes it."""
    _, specs = Dictionary.of(mesh, sae).specs(sae.params)
    return State(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(state, specs, strict=True)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def read(
    modules: tuple[tuple[str, Any], ...],
    sites: tuple[str, ...],
    limits: tuple[tuple[tuple[str, float], ...], ...],
    lm_params: Any,
    tokens_RxT: jax.Array,
    allowed_RxT: jax.Array,
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """The activations [R, T, D] of sites, and for each SAE which tokens [R, T] it sees.

    `modules`, `lm_params`: of each language model, as for `loading.capture_each`; `limits`: for each SAE, its
    `norm_limits`.
    """
    activations = loading.capture_each(modules, lm_params, tokens_RxT, sites)
    valid = [masking.valid(allowed_RxT, {s: activations[s] for s, _ in each}, dict(each)) for each in limits]
    return activations, valid


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    dictionary: Dictionary,
    state: State,
    params: Mapping[str, jax.Array],
    inputs: contract.Activations,
    valid_RxT: jax.Array,
    first_row: jax.Array,
) -> State:
    """The state after some more rows; `first_row` is the number of the first."""
    R, T = valid_RxT.shape

    def per_device(state: State, params: Any, inputs: Any, valid_RxT: jax.Array, first_row: jax.Array) -> State:
        width, local = state.fired.shape[0], valid_RxT.shape[0]
        first_here = first_row + local * jax.lax.axis_index("data")
        row_R = first_here + jnp.arange(local)
        priority_RxT = priorities(row_R[:, None], jnp.arange(T)[None], T)

        def part(carry: dict[str, jax.Array], chunk: Any) -> tuple[dict[str, jax.Array], None]:
            f_RxtxF, priority_Rxt, start = chunk
            # Two reductions are ten times as fast as `argmax` on a CPU.
            t, strongest = jnp.arange(f_RxtxF.shape[1])[None, :, None], f_RxtxF.max(1)
            at = jnp.where(f_RxtxF == strongest[:, None], t, T).min(1)
            stronger = strongest > carry["top_value"]
            first = jnp.where(f_RxtxF > 0, priority_Rxt[..., None], EMPTY).min(1)
            is_first = priority_Rxt[..., None] == first[:, None]
            where, value = jnp.where(is_first, t, 0).max(1), jnp.where(is_first, f_RxtxF, 0).max(1)
            earlier = first < carry["sample_priority"]
            flat_BxF = f_RxtxF.reshape(-1, width)
            bins = jnp.where(flat_BxF > 0, _bins(flat_BxF), BINS)
            histogram = carry["histogram"].at[jnp.arange(width)[None], bins].add(1, mode="drop")
            return {
                "histogram": histogram,
                "top_value": jnp.maximum(strongest, carry["top_value"]),
                "top_position": jnp.where(stronger, start + at, carry["top_position"]),
                "sample_priority": jnp.minimum(first, carry["sample_priority"]),
                "sample_position": jnp.where(earlier, start + where, carry["sample_position"]),
                "sample_value": jnp.where(earlier, value, carry["sample_value"]),
            }, None

        shape = (local, width)
        carry = {
            "histogram": jnp.zeros((width, BINS), jnp.int32),
            "top_value": jnp.zeros(shape, jnp.float32),
            "top_position": jnp.zeros(shape, jnp.int32),
            "sample_priority": jnp.full(shape, EMPTY),
            "sample_position": jnp.zeros(shape, jnp.int32),
            "sample_value": jnp.zeros(shape, jnp.float32),
        }
        carry, _ = _scan(dictionary, params, inputs, valid_RxT, priority_RxT, part, carry)
        new = jax.lax.psum(carry.pop("histogram"), "data")
        # [F, R] of the rows of all devices, in their order.
        rows = {name: jax.lax.all_gather(value, "data", tiled=True).T for name, value in carry.items()}
        row_FxR = jnp.broadcast_to(first_row + jnp.arange(R)[None], (width, R))
        merged = _best(state, rows | {"top_row": row_FxR, "sample_row": row_FxR})
        return State(
            tokens=state.tokens + jax.lax.psum(valid_RxT.sum(), "data"),
            fired=state.fired + new.sum(1),
            histogram=state.histogram + new,
            **merged,
        )

    of_params, of_state = dictionary.specs(params)
    # Nothing is differentiated, and what is gathered along `data` is the same on all of its devices.
    mapped = jax.shard_map(
        per_device,
        mesh=dictionary.mesh,
        in_specs=(of_state, of_params, P("data"), P("data"), P()),
        out_specs=of_state,
        check_vma=False,
    )
    return mapped(state, params, inputs, valid_RxT, first_row)


def _best(state: State, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The `top_*` and `sample_*` of the state and of new rows together. Of equal ones the first in the text is kept."""
    merged: dict[str, jax.Array] = {}
    for kind, size, key in (("top", TOP, "top_value"), ("sample", SAMPLE, "sample_priority")):
        names = [name for name in State._fields if name.startswith(kind)]
        whole = {name: jnp.concatenate([getattr(state, name), rows[name]], 1) for name in names}
        order = jax.lax.top_k(whole[key] if kind == "top" else -whole[key], size)[1]
        merged |= {name: jnp.take_along_axis(value, order, 1) for name, value in whole.items()}
    return merged


@partial(jax.jit, static_argnums=0)
def along_rows(
    dictionary: Dictionary,
    params: Mapping[str, jax.Array],
    inputs: contract.Activations,
    valid_RxT: jax.Array,
    row_SxP: jax.Array,
    feature_SxP: jax.Array,
) -> jax.Array:
    """The activations [S, P, T] of pairs of a row and a feature, for each of the S parts of the rows along `data`.

    `row_SxP`: numbers of rows within a part.
    """

    def per_device(params: Any, inputs: Any, valid_RxT: jax.Array, row_1xP: jax.Array, feature_1xP: jax.Array) -> Any:
        def part(carry: tuple[()], chunk: Any) -> tuple[tuple[()], jax.Array]:
            f_RxtxF, _, _ = chunk
            width = f_RxtxF.shape[2]
            first = width * jax.lax.axis_index("latent") if dictionary.along else 0
            here = feature_1xP[0] - first
            picked_Pxt = f_RxtxF[row_1xP[0], :, jnp.clip(here, 0, width - 1)]
            picked_Pxt = jnp.where(((here >= 0) & (here < width))[:, None], picked_Pxt, 0)
            return carry, jax.lax.psum(picked_Pxt, "latent") if dictionary.along else picked_Pxt

        zeros = jnp.zeros(valid_RxT.shape)
        _, parts = _scan(dictionary, params, inputs, valid_RxT, zeros, part, (), signed=True)
        return parts.swapaxes(0, 1).reshape(parts.shape[1], -1)[None, :, : valid_RxT.shape[1]]

    over_data = P("data")
    mapped = jax.shard_map(
        per_device,
        mesh=dictionary.mesh,
        in_specs=(dictionary.specs(params)[0], *[over_data] * 4),
        out_specs=over_data,
        check_vma=False,
    )
    return mapped(params, inputs, valid_RxT, row_SxP, feature_SxP)


def active(
    dictionary: Dictionary, params: Mapping[str, jax.Array], inputs: contract.Activations, valid_RxT: jax.Array
) -> np.ndarray:
    """Which features are active, as a NumPy array [R, T, F]."""
    bits = np.asarray(_packed(dictionary, params, inputs, valid_RxT))
    F, shards = dictionary.config.width, dictionary.mesh.shape["latent"] if dictionary.along else 1
    on = np.unpackbits(bits.reshape(*valid_RxT.shape, shards, -1), axis=-1, count=F // shards)
    return on.reshape(*valid_RxT.shape, F).astype(bool)


@partial(jax.jit, static_argnums=0)
def _packed(dictionary: Dictionary, params: Any, inputs: contract.Activations, valid_RxT: jax.Array) -> jax.Array:
    """The bits of `active`, those of each shard of the dictionary in bytes of their own."""

    def per_device(params: Any, inputs: Any, valid_RxT: jax.Array) -> jax.Array:
        def part(carry: tuple[()], chunk: Any) -> tuple[tuple[()], jax.Array]:
            return carry, jnp.packbits(chunk[0] != 0, axis=-1)

        zeros = jnp.zeros(valid_RxT.shape)
        _, parts = _scan(dictionary, params, inputs, valid_RxT, zeros, part, ())
        return parts.swapaxes(0, 1).reshape(parts.shape[1], -1, parts.shape[3])[:, : valid_RxT.shape[1]]

    mapped = jax.shard_map(
        per_device,
        mesh=dictionary.mesh,
        in_specs=(dictionary.specs(params)[0], P("data"), P("data")),
        out_specs=P("data", None, dictionary.along),
        check_vma=False,
    )
    return mapped(params, inputs, valid_RxT)


def _scan(
    dictionary: Dictionary,
    params: Any,
    inputs: Any,
    valid_RxT: jax.Array,
    priority_RxT: jax.Array,
    part: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    signed: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `part` on one device, over chunks of each row whose arrays [tokens, features] are bounded.

    `part` gets (|f| [R, t, F] or f, 0 at tokens that are not valid; `priority_RxT` of the chunk; the first position).
    """
    functions, config = contract.module_of(dictionary.architecture), dictionary.config
    latent = dictionary.mesh.shape["latent"]
    shards = contract.Shards(dictionary.along if latent > 1 else None)
    width = config.width // (latent if dictionary.along else 1)
    R, T = valid_RxT.shape
    parts = min(T, -(-R * T // inference.tokens_at_once(width)))
    size = -(-T // parts)

    def split(x: jax.Array) -> jax.Array:
        return batching.pad(x, 0, parts * size - T).reshape(R, parts, size, *x.shape[2:]).swapaxes(0, 1)

    def step(carry: Any, chunk: Any) -> tuple[Any, Any]:
        (inputs, valid_Rxt, priority_Rxt), start = chunk
        flat = jax.tree.map(lambda x: x.astype(jnp.float32), inference.flat(inputs))
        f_BxF = contract.encode_shard(functions, params, flat, config, shards).astype(jnp.float32)
        f_RxtxF = f_BxF.reshape(*valid_Rxt.shape, width)
        f_RxtxF = jnp.where(valid_Rxt[..., None] & ~jnp.isnan(f_RxtxF), f_RxtxF, 0)
        return part(carry, (f_RxtxF if signed else jnp.abs(f_RxtxF), priority_Rxt, start))

    chunks = jax.tree.map(split, (inputs, valid_RxT, priority_RxT)), size * jnp.arange(parts)
    return jax.lax.scan(step, carry, chunks)
