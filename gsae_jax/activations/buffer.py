"""The exchange buffer: a device-resident store that serves activations in an order unlike that of the text.

B strata of S slots. Each step picks one random slot in every stratum, serves what the B slots hold as the batch, and
writes the B fresh activations into them. Slots are distinct by construction, no permutation is needed, and the age of
a served activation is geometric with mean S steps, so that neighbours in a sequence are served at independent times.
A fresh activation that the token mask rejects leaves its slot as it was.

Functions here see the strata of one device only; several sites share the slots, so that a batch holds the same tokens
at each.
"""

import jax
import jax.numpy as jnp

Store = dict[str, jax.Array]  # site -> [strata, slots, D]


def arrange(x: jax.Array, updates: int, shift: jax.Array) -> jax.Array:
    """Fresh values [rows, T, ...] as [updates, strata, ...]: rows to fixed strata, neighbours to different updates.

    `shift` turns every row by so many positions: drawn anew each time, it keeps a position of the row (BOS is always
    masked) from being bound to a stratum, which would then never be written.
    """
    x = jnp.roll(x, shift, axis=1)
    strata = x.shape[0] * x.shape[1] // updates
    return jnp.swapaxes(x.reshape(strata, updates, *x.shape[2:]), 0, 1)


def exchange(
    store: Store, slots_B: jax.Array, fresh: dict[str, jax.Array], valid_B: jax.Array
) -> tuple[Store, dict[str, jax.Array]]:
    """Serve one slot per stratum, {site: [B, D]}, and put the fresh activations {site: [B, D]} there where valid."""
    rows = jnp.arange(len(slots_B))
    served = {site: slots[rows, slots_B] for site, slots in store.items()}
    store = {
        site: slots.at[rows, slots_B].set(jnp.where(valid_B[:, None], fresh[site], served[site]))
        for site, slots in store.items()
    }
    return store, served


def fill(store: Store, count_B: jax.Array, fresh: dict[str, jax.Array], valid: jax.Array) -> tuple[Store, jax.Array]:
    """Append fresh activations {site: [updates, B, D]} where valid [updates, B]; `count_B` slots are filled so far."""
    slots = next(iter(store.values())).shape[1]
    position = count_B[None] + jnp.cumsum(valid, axis=0) - 1
    position = jnp.where(valid & (position < slots), position, slots)  # out of bounds: dropped
    rows = jnp.broadcast_to(jnp.arange(len(count_B)), position.shape)
    store = {site: old.at[rows, position].set(fresh[site], mode="drop") for site, old in store.items()}
    return store, jnp.minimum(count_B + valid.sum(0), slots)
