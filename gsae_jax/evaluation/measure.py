"""Measuring SAEs on held-out text: the language model runs with their reconstructions in place of its activations."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import metrics
from gsae_jax.lms import sites
from gsae_jax.lms.loading import LM
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.saes import trained


def measure(
    lm: LM,
    saes: Sequence[trained.SAE],
    batches: Iterable[np.ndarray],
    mesh: jax.sharding.Mesh,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, metrics.Sums]:
    """Sums over `batches` [R, T] of tokens, by SAE name; `metrics.combine` turns them into metrics.

    Special tokens keep the language model's own activation under every intervention, as the SAEs were not trained on
    them.
    """
    groups: dict[tuple[Any, ...], list[trained.SAE]] = {}
    for sae in saes:
        sites.check(sae.site, lm.sites, f"site of {sae.name}")
        groups.setdefault((sae.site, sae.architecture, sae.config), []).append(sae)
    replicated, rows = mesh_lib.sharding(mesh), mesh_lib.sharding(mesh, "data")
    lm_params = jax.device_put(lm.params, replicated)
    stacked = {
        key: jax.device_put(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(sae.params for sae in members)), replicated
        )
        for key, members in groups.items()
    }
    totals: dict[str, metrics.Sums] = {sae.name: {} for sae in saes}
    for tokens in batches:
        tokens_RxT = jax.device_put(tokens, rows)
        references = _references(
            lm.module, tuple({site for site, _, _ in groups}), lm.special_tokens, lm_params, tokens_RxT
        )
        for key, members in groups.items():
            sums = jax.device_get(_sae_sums(lm.module, *key, lm.special_tokens, lm_params, stacked[key], tokens_RxT))
            for index, sae in enumerate(members):
                own = {name: value[index] for name, value in sums.items()}
                metrics.add(
                    totals[sae.name],
                    own | jax.device_get({"ce_clean": references[""], "ce_zero": references[sae.site]}),
                )
        progress()
    return totals


def _valid(tokens_RxT: jax.Array, special_tokens: tuple[int, ...]) -> jax.Array:
    return ~jnp.isin(tokens_RxT, jnp.array(special_tokens, jnp.int32))


def _losses(module: Any, lm_params: Any, tokens_RxT: jax.Array, tap: sites.Tap) -> jax.Array:
    """Cross-entropy [R] of each row in nats, summed over its predictions."""
    hidden = module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")
    return cross_entropy(module, lm_params, hidden, tokens_RxT).sum(-1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _references(
    module: Any, at: tuple[str, ...], special_tokens: tuple[int, ...], lm_params: Any, tokens_RxT: jax.Array
) -> dict[str, jax.Array]:
    """Losses [R] untouched (under "") and with each site zeroed."""
    keep = ~_valid(tokens_RxT, special_tokens)[..., None]
    zeroed = {site: _losses(module, lm_params, tokens_RxT, sites.splice({site: lambda x: x * keep})) for site in at}
    return {"": _losses(module, lm_params, tokens_RxT, sites.no_tap)} | zeroed


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sae_sums(
    module: Any,
    site: str,
    architecture: str,
    sae: Any,
    special_tokens: tuple[int, ...],
    lm_params: Any,
    params_N: dict[str, jax.Array],
    tokens_RxT: jax.Array,
) -> metrics.Sums:
    """Sums [N, R, ...] of SAEs of one shape; under `vmap` the part of the model before the site runs once for all."""
    functions, valid = trained.module_of(architecture), _valid(tokens_RxT, special_tokens)

    def one(params: dict[str, jax.Array]) -> metrics.Sums:
        sums: metrics.Sums = {}

        def edit(x_RxTxD: jax.Array) -> jax.Array:
            f_BxF = functions.encode(params, x_RxTxD.reshape(-1, sae.d_in).astype(jnp.float32), sae)
            x_hat = functions.decode(params, f_BxF).reshape(x_RxTxD.shape)
            sums.update(metrics.reconstruction_sums(x_RxTxD, x_hat, f_BxF.reshape(*valid.shape, -1), valid))
            return jnp.where(valid[..., None], x_hat, x_RxTxD).astype(x_RxTxD.dtype)

        sums["ce_sae"] = _losses(module, lm_params, tokens_RxT, sites.splice({site: edit}))
        sums["predictions"] = jnp.full(len(tokens_RxT), tokens_RxT.shape[1] - 1)
        return sums

    return jax.vmap(one)(params_N)
