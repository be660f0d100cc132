"""What features do to the language model's predictions: by their directions, and by ablation on their own contexts."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gsae_jax import batching
from gsae_jax import mesh as mesh_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import sites
from gsae_jax.lms.loading import LM
from gsae_jax.saes import parameters, trained

TOKENS = 10  # that a feature promotes most, and as many that it suppresses most
CONTEXTS = 4  # of the strongest, on which a feature is ablated
FLOATS = 2**24  # of one array [features, vocabulary]
TOKENS_PER_FORWARD = 2**12  # on each device


class Effects(NamedTuple):
    """What a feature does to tokens' logits or log probabilities.

    Attributes:
        feature: the feature.
        tokens: [2 * TOKENS], those that it promotes most, best first, and then those that it suppresses, most first.
        effects: [2 * TOKENS].
        divergence: the KL divergence of the predictions without the feature from those with it; NaN of `direct`.
    """

    feature: int
    tokens: np.ndarray
    effects: np.ndarray
    divergence: float = float("nan")


def place(sae: trained.SAE) -> tuple[str, jax.Array]:
    """(The site where the effects of an SAE are measured, its decoder rows [F, D] there): of several sites the last."""
    last = len(sae.targets) - 1
    return sae.targets[last], sae.params[parameters.decoder(sae.functions, last)]


def direct(lm: LM, sae: trained.SAE) -> Iterator[Effects]:
    """`LM.logit_effects` of each feature's decoder row; nothing if no linear map leads from the site to the stream.

    `lm`: of which `place(sae)` is a site.
    """
    site, W_FxD = place(sae)
    at_once = max(1, FLOATS // lm.config.d_vocab)
    count = min(TOKENS, lm.config.d_vocab)
    for start in range(0, len(W_FxD), at_once):
        rows = batching.pad(W_FxD[start : start + at_once], max(0, min(at_once, len(W_FxD)) - (len(W_FxD) - start)))
        try:
            logits = lm.logit_effects(rows, sites.parts(site)[0])
        except UserError:
            return
        values, tokens = map(np.asarray, _extremes(logits, count))
        for row in range(min(at_once, len(W_FxD) - start)):
            yield Effects(start + row, tokens[row], values[row])


class Context(NamedTuple):
    """A place of a text on which a feature is active.

    Attributes:
        tokens: [T], the row.
        position: of the token.
        active: (position, activation) of all tokens of the row where the feature is active.
    """

    tokens: np.ndarray
    position: int
    active: Sequence[tuple[int, float]]


def groups(lengths: Sequence[tuple[int, int]], longest: int, devices: int) -> Iterator[tuple[int, list[int]]]:
    """(T, features) for `ablated`: later tokens change no earlier prediction, so rows end at the first T tokens.

    Args:
        lengths: (feature, tokens of its longest context), by ascending length.
        longest: tokens of a row.
        devices: along `data`.
    """
    start = 0
    while start < len(lengths):
        T = min(longest, max(16, batching.padded_size(lengths[start][1])))
        end = start
        while end < min(len(lengths), start + _at_once(T, devices)) and lengths[end][1] <= T:
            end += 1
        yield T, [feature for feature, _ in lengths[start:end]]
        start = end


def _at_once(T: int, devices: int) -> int:
    """Features of one forward pass."""
    return devices * max(1, TOKENS_PER_FORWARD // (CONTEXTS * T))


def ablated(
    lm: LM, mesh: Mesh, sae: trained.SAE, T: int, group: Sequence[tuple[int, np.ndarray, Sequence[Context]]]
) -> Iterator[Effects]:
    """Effects of features on the token that follows their contexts.

    A feature's contribution, its activation times its decoder row, is subtracted from the site's activations at all
    tokens of the row. An effect is the mean over contexts of log p(token) with the feature, minus log p(token) without
    it.

    Args:
        lm: the language model of which `place(sae)` is a site, on the mesh.
        mesh: over whose `data` axis features are split.
        sae: the SAE.
        T: tokens of the rows.
        group: (feature, its decoder row [D], 1 to CONTEXTS contexts).
    """
    site, W_FxD = place(sae)
    G = _at_once(T, int(mesh.shape["data"]))
    batch = _Batch(
        tokens=np.zeros((G, CONTEXTS, T), np.int32),
        last=np.zeros((G, CONTEXTS), np.int32),
        activations=np.zeros((G, CONTEXTS, T), np.float32),
        weights=np.zeros((G, CONTEXTS), np.float32),
        directions=np.zeros((G, W_FxD.shape[-1]), np.float32),
    )
    for g, (_, direction, contexts) in enumerate(group):
        batch.directions[g] = direction
        for c, context in enumerate(contexts):
            batch.tokens[g, c], batch.last[g, c] = context.tokens[:T], context.position
            batch.weights[g, c] = 1 / len(contexts)
            for position, activation in context.active:
                batch.activations[g, c, position : position + 1] = activation  # nothing beyond T
    placed = _Batch(*(mesh_lib.place_rows(mesh, x, G) for x in batch))
    count = min(TOKENS, lm.config.d_vocab)
    values, found, divergences = map(np.asarray, _ablate(lm.module, sites.parts(site)[0], count, lm.params, placed))
    for g, (feature, _, _) in enumerate(group):
        yield Effects(feature, found[g], values[g], float(divergences[g]))


class _Batch(NamedTuple):
    """Features that are ablated together, each on C contexts.

    Attributes:
        tokens: [G, C, T].
        last: [G, C], the positions whose predictions are compared.
        activations: [G, C, T], of the feature.
        weights: [G, C], of a context in the mean; 0 where there is none.
        directions: [G, D], the decoder rows.
    """

    tokens: Any
    last: Any
    activations: Any
    weights: Any
    directions: Any


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ablate(
    module: Any, site: str, count: int, lm_params: Any, batch: _Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(effects [G, 2 * count], their tokens, divergences [G])."""
    G, C, T = batch.tokens.shape
    removed_GxCxTxD = batch.activations[..., None] * batch.directions[:, None, None]

    def log_probabilities(tap: sites.Tap) -> jax.Array:
        hidden = module.apply({"params": lm_params}, batch.tokens.reshape(G * C, T), tap, method="hidden")
        at_last = jnp.take_along_axis(hidden, batch.last.reshape(-1, 1, 1), 1)
        logits = module.apply({"params": lm_params}, at_last, method="logits")[:, 0]
        return jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(G, C, -1)

    def edit(x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) - removed_GxCxTxD.reshape(x.shape)).astype(x.dtype)

    clean = log_probabilities(sites.no_tap)
    differences = clean - log_probabilities(sites.splice({site: edit}))
    divergences = (batch.weights * (jnp.exp(clean) * differences).sum(-1)).sum(-1)
    return *_extremes((batch.weights[..., None] * differences).sum(1), count), divergences


@partial(jax.jit, static_argnums=1)
def _extremes(values_GxV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(values [G, 2 * count], indices): the largest, best first, and then the smallest, smallest first."""
    largest, smallest = jax.lax.top_k(values_GxV, count), jax.lax.top_k(-values_GxV, count)
    return jnp.concatenate([largest[0], -smallest[0]], 1), jnp.concatenate([largest[1], smallest[1]], 1)
