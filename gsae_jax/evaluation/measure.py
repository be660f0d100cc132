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
from gsae_jax.lms.loading import LM, check_tokens
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.saes import trained


def measure(
    lm: LM,
    saes: Sequence[trained.SAE],
    batches: Iterable[np.ndarray],
    special_tokens: tuple[int, ...] = (),
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, metrics.Sums]:
    """On the LM's mesh, sums over `batches` [R, T] of tokens, by SAE name; `metrics.combine` turns them into metrics.

    What an SAE was not trained on (`special_tokens`, and activations beyond its norm limit) is not measured, and keeps
    the language model's own activation under every intervention.
    """
    groups: dict[tuple[Any, ...], list[trained.SAE]] = {}
    for sae in saes:
        sites.check(sae.site, lm.sites, f"site of {sae.name}")
        groups.setdefault((sae.site, sae.norm_limit, sae.architecture, sae.config), []).append(sae)
    mesh = lm.module.mesh
    stacked = {key: _stacked(mesh, members) for key, members in groups.items()}
    zeroed = tuple(sorted({(site, norm_limit) for site, norm_limit, _, _ in groups}))
    totals: dict[str, metrics.Sums] = {sae.name: {} for sae in saes}
    for tokens in batches:
        check_tokens(tokens, lm.config.d_vocab, "data: the tokens of the text")
        R = len(tokens)
        tokens_RxT = mesh_lib.place_rows(mesh, tokens[mesh_lib.local_rows(mesh, R)], R) if mesh else jnp.asarray(tokens)
        references = mesh_lib.fetch(_references(lm.module, zeroed, special_tokens, lm.params, tokens_RxT))
        for key, members in groups.items():
            sums = mesh_lib.fetch(_sae_sums(lm.module, *key, special_tokens, lm.params, stacked[key], tokens_RxT))
            shared = {"ce_clean": references["clean"], "ce_zero": references["zero"][zeroed.index(key[:2])]}
            for index, sae in enumerate(members):
                metrics.add(totals[sae.name], {name: value[index] for name, value in sums.items()} | shared)
        progress()
    return totals


def _stacked(mesh: jax.sharding.Mesh | None, members: list[trained.SAE]) -> dict[str, jax.Array]:
    """The parameters [N, ...] of SAEs of one shape, features spread over the mesh."""
    axes = trained.module_of(members[0].architecture).FEATURE_AXES

    def stack(name: str) -> jax.Array:
        value = jnp.stack([sae.params[name] for sae in members])
        axis = None if axes[name] is None else 1 + axes[name]
        return value if mesh is None else jax.device_put(value, mesh_lib.spread(mesh, value.shape, axis))

    return {name: stack(name) for name in members[0].params}


def _valid(x_RxTxD: jax.Array, tokens_RxT: jax.Array, special_tokens: tuple[int, ...], norm_limit: float) -> jax.Array:
    """Which activations are measured and replaced."""
    norms = jnp.linalg.norm(x_RxTxD.astype(jnp.float32), axis=-1)
    return ~jnp.isin(tokens_RxT, jnp.array(special_tokens, jnp.int32)) & (norms <= norm_limit)


def _losses(module: Any, lm_params: Any, tokens_RxT: jax.Array, tap: sites.Tap) -> jax.Array:
    """Cross-entropy [R] of each row in nats, summed over its predictions."""
    hidden = module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")
    return cross_entropy(module, lm_params, hidden, tokens_RxT).sum(-1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _references(
    module: Any,
    zeroed: tuple[tuple[str, float], ...],
    special_tokens: tuple[int, ...],
    lm_params: Any,
    tokens_RxT: jax.Array,
) -> dict[str, Any]:
    """Losses [R]: `clean`, and `zero` for each (site, norm limit)."""

    def zero(site: str, norm_limit: float) -> jax.Array:
        def edit(x: jax.Array) -> jax.Array:
            return jnp.where(_valid(x, tokens_RxT, special_tokens, norm_limit)[..., None], 0, x)

        return _losses(module, lm_params, tokens_RxT, sites.splice({site: edit}))

    clean = _losses(module, lm_params, tokens_RxT, sites.no_tap)
    return {"clean": clean, "zero": [zero(site, norm_limit) for site, norm_limit in zeroed]}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _sae_sums(
    module: Any,
    site: str,
    norm_limit: float,
    architecture: str,
    sae: Any,
    special_tokens: tuple[int, ...],
    lm_params: Any,
    params_N: dict[str, jax.Array],
    tokens_RxT: jax.Array,
) -> metrics.Sums:
    """Sums [N, R, ...] of SAEs of one shape; under `vmap` the part of the model before the site runs once for all."""
    functions = trained.module_of(architecture)
    if module.mesh:
        # Gathered along `data`, as the rows lie there, when these SAEs' turn comes.
        axes = functions.FEATURE_AXES if sae.width % module.mesh.shape["latent"] == 0 else {}
        params_N = {
            name: value
            if axes.get(name) is None
            else jax.lax.with_sharding_constraint(
                value, mesh_lib.sharding(module.mesh, *[None] * (1 + axes[name]), "latent")
            )
            for name, value in params_N.items()
        }

    def one(params: dict[str, jax.Array]) -> metrics.Sums:
        sums: metrics.Sums = {}

        def edit(x_RxTxD: jax.Array) -> jax.Array:
            valid = _valid(x_RxTxD, tokens_RxT, special_tokens, norm_limit)
            f_BxF = functions.encode(params, x_RxTxD.reshape(-1, sae.d_in).astype(jnp.float32), sae)
            x_hat = functions.decode(params, f_BxF).reshape(x_RxTxD.shape)
            sums.update(metrics.reconstruction_sums(x_RxTxD, x_hat, f_BxF.reshape(*valid.shape, -1), valid))
            return jnp.where(valid[..., None], x_hat, x_RxTxD).astype(x_RxTxD.dtype)

        sums["ce_sae"] = _losses(module, lm_params, tokens_RxT, sites.splice({site: edit}))
        sums["predictions"] = jnp.full(len(tokens_RxT), tokens_RxT.shape[1] - 1)
        return sums

    return jax.vmap(one)(params_N)
