"""Which features of a dictionary are alike: by their decoder rows, and by the tokens on which they are active."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from gsae_jax.saes import linalg, parameters, trained

FLOATS = 2**24  # of one array [features, features]


class Alike(NamedTuple):
    """The features that are most like a feature, best first.

    Attributes:
        feature: the feature.
        others: [k].
        scores: [k].
        counts: [k], the number of tokens on which both are active; None of decoder rows.
    """

    feature: int
    others: np.ndarray
    scores: np.ndarray
    counts: np.ndarray | None = None


def unit_rows(sae: trained.SAE) -> jax.Array:
    """[F, D], the decoder rows as unit vectors; those of several sites in one vector. Zero rows stay zero."""
    functions = sae.functions
    W_FxD = [sae.params[parameters.decoder(functions, site)] for site in range(len(sae.targets))]
    return linalg.unit(jnp.concatenate(W_FxD, 1))


def nearest(rows_FxD: jax.Array, others_GxD: jax.Array, count: int, same: bool) -> Iterator[Alike]:
    """For each row the `count` of the others with the largest cosine; without itself if they are the `same`.

    Both are unit rows, or zero.
    """
    F, G = len(rows_FxD), len(others_GxD)
    at_once = min(F, max(1, FLOATS // G))
    count = min(count, G - same)
    for start in range(0, F, at_once):
        begin = min(start, F - at_once)  # so that all parts have one shape
        cosines, indices = map(np.asarray, _nearest(count, same, rows_FxD[begin : begin + at_once], others_GxD, begin))
        for feature in range(start, min(start + at_once, F)):
            yield Alike(feature, indices[feature - begin], cosines[feature - begin])


@partial(jax.jit, static_argnums=(0, 1))
def _nearest(
    count: int, same: bool, rows_fxD: jax.Array, others_GxD: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cosines [f, count], indices [f, count])."""
    cosines_fxG = jnp.matmul(rows_fxD, others_GxD.T, precision="highest")
    if same:
        itself = first + jnp.arange(len(rows_fxD))[:, None] == jnp.arange(len(others_GxD))[None]
        cosines_fxG = jnp.where(itself, -jnp.inf, cosines_fxG)
    return jax.lax.top_k(cosines_fxG, count)


def cofiring(tokens: np.ndarray, features: np.ndarray, width: int, count: int) -> Iterator[Alike]:
    """For each feature the `count` others with the largest Jaccard index of the tokens on which they are active.

    That is the number of tokens on which both are active, divided by the number on which either is. Features that are
    never active together with the feature are left out.

    Args:
        tokens: [A], the numbers of tokens.
        features: [A], the features that are active there; no pair stands twice.
        width: F.
        count: how many.
    """
    _, tokens = np.unique(tokens, return_inverse=True)
    shape = (int(tokens.max(initial=-1)) + 1, width)
    active = scipy.sparse.csc_matrix((np.ones(len(tokens), np.int32), (tokens, features)), shape)
    fired_F = np.diff(active.indptr)
    by_token = active.tocsr()
    # So that a part has about as many numbers as `FLOATS` says, also if all features fire together.
    at_once = max(1, FLOATS // width)
    for start in range(0, width, at_once):
        together: Any = (active[:, start : start + at_once].T @ by_token).tocsr()
        for feature in range(start, min(start + at_once, width)):
            part = slice(*together.indptr[feature - start : feature - start + 2])
            others, both = together.indices[part], together.data[part]
            others, both = others[others != feature], both[others != feature]
            jaccard = (both / (fired_F[feature] + fired_F[others] - both)).astype(np.float32)
            order = np.lexsort((others, -jaccard))[:count]
            yield Alike(feature, others[order], jaccard[order], both[order])
