"""Measuring SAEs on held-out text: the language model runs with their reconstructions in place of its activations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import metrics
from gsae_jax.lms import loading, sites
from gsae_jax.lms.loading import LM, check_tokens
from gsae_jax.lms.loss import cross_entropy, cross_entropy_and_divergence
from gsae_jax.saes import pursuit, trained

Place = tuple[str, float]  # a site, and the norm above which its activations are left alone


def measure(
    lm: LM,
    saes: Sequence[trained.SAE],
    batches: Sequence[np.ndarray],
    special_tokens: tuple[int, ...] = (),
    progress: Callable[[], Any] = lambda: None,
    ito: Sequence[int] = (),
) -> dict[str, metrics.Sums]:
    """On the LM's mesh, sums over `batches` [R, T] of tokens, by SAE name; `metrics.combine` turns them into metrics.

    What an SAE was not trained on (`special_tokens`, and activations beyond its norm limit) is not measured, and keeps
    the language model's own activation under every intervention.

    Args:
        progress: called once a batch, of two passes: the first finds the sites' means.
        ito: numbers of features; for each, every SAE's dictionary is measured with as many chosen by gradient pursuit
            instead of its encoder (Appendix A), under the name `{SAE}_ito_{number}`.
    """
    groups: dict[tuple[Any, ...], list[trained.SAE]] = {}
    for sae in saes:
        sites.check(sae.site, lm.sites, f"site of {sae.name}")
        groups.setdefault((sae.site, sae.norm_limit, sae.architecture, sae.config), []).append(sae)
    mesh = lm.module.mesh
    runs = []  # (what is the same for all of its SAEs, their parameters, their names)
    for key, members in groups.items():
        params_N = _stacked(mesh, members)
        runs.append(((*key, 0), params_N, [sae.name for sae in members]))
        for k in ito:
            # One by one: what the pursuit holds of every token is large.
            for index, sae in enumerate(members):
                one = {name: value[index : index + 1] for name, value in params_N.items()}
                runs.append(((*key, k), one, [f"{sae.name}_ito_{k}"]))

    def placed(tokens: np.ndarray) -> jax.Array:
        check_tokens(tokens, lm.config.d_vocab, "data: the tokens of the text")
        if not mesh:
            return jnp.asarray(tokens)
        return mesh_lib.place_rows(mesh, tokens[mesh_lib.local_rows(mesh, len(tokens))], len(tokens))

    places = tuple(sorted({(site, norm_limit) for site, norm_limit, _, _ in groups}))
    sums = []
    for tokens in batches:
        sums.append(mesh_lib.fetch(_site_sums(lm.module, places, special_tokens, lm.params, placed(tokens))))
        progress()
    means = [
        np.asarray(sum(np.float64(s[i][0]) for s in sums) / sum(np.float64(s[i][1]) for s in sums), np.float32)
        for i in range(len(places))
    ]

    totals: dict[str, metrics.Sums] = {name: {} for _, _, names in runs for name in names}
    for tokens in batches:
        tokens_RxT = placed(tokens)
        clean_RxTxD, references = _references(lm.module, places, special_tokens, lm.params, means, tokens_RxT)
        references = mesh_lib.fetch(references)
        for key, params_N, names in runs:
            place = places.index(key[:2])
            found = mesh_lib.fetch(
                _sae_sums(lm.module, *key, special_tokens, lm.params, params_N, means[place], clean_RxTxD, tokens_RxT)
            )
            shared = {name: references[name][place] for name in ("ce_clean", "ce_zero", "ce_mean")}
            for index, name in enumerate(names):
                metrics.add(totals[name], {key: value[index] for key, value in found.items()} | shared)
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


def _hidden(module: Any, lm_params: Any, tokens_RxT: jax.Array, tap: sites.Tap = sites.no_tap) -> jax.Array:
    return module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _site_sums(
    module: Any, places: tuple[Place, ...], special_tokens: tuple[int, ...], lm_params: Any, tokens_RxT: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """(sum [D], number) of the valid activations at each place."""
    found = loading.capture(module, lm_params, tokens_RxT, {site for site, _ in places})

    def sums(site: str, norm_limit: float) -> tuple[jax.Array, jax.Array]:
        valid = _valid(found[site], tokens_RxT, special_tokens, norm_limit)
        return jnp.where(valid[..., None], found[site].astype(jnp.float32), 0).sum((0, 1)), valid.sum()

    return [sums(*place) for place in places]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _references(
    module: Any,
    places: tuple[Place, ...],
    special_tokens: tuple[int, ...],
    lm_params: Any,
    means: list[jax.Array],
    tokens_RxT: jax.Array,
) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
    """The last residual stream, and summed losses [R] at each place: untouched, with zeros there, with the mean."""

    def loss(hidden_RxTxD: jax.Array) -> jax.Array:
        return cross_entropy(module, lm_params, hidden_RxTxD, tokens_RxT).sum(-1)

    def with_(constant_D: jax.Array, site: str, norm_limit: float) -> jax.Array:
        def edit(x: jax.Array) -> jax.Array:
            valid = _valid(x, tokens_RxT, special_tokens, norm_limit)
            return jnp.where(valid[..., None], constant_D[None, None].astype(x.dtype), x)

        return loss(_hidden(module, lm_params, tokens_RxT, sites.splice({site: edit})))

    clean = _hidden(module, lm_params, tokens_RxT)
    return clean, {
        "ce_clean": [loss(clean)] * len(places),
        "ce_zero": [with_(jnp.zeros_like(mean), *place) for mean, place in zip(means, places, strict=True)],
        "ce_mean": [with_(mean, *place) for mean, place in zip(means, places, strict=True)],
    }


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _sae_sums(
    module: Any,
    site: str,
    norm_limit: float,
    architecture: str,
    sae: Any,
    k: int,
    special_tokens: tuple[int, ...],
    lm_params: Any,
    params_N: dict[str, jax.Array],
    mean_D: jax.Array,
    clean_RxTxD: jax.Array,
    tokens_RxT: jax.Array,
) -> metrics.Sums:
    """Sums [N, R, ...] of SAEs of one shape; under `vmap` the part of the model before the site runs once for all.

    `k` features are chosen by gradient pursuit; 0: the encoder chooses.
    """
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

    def encode(params: dict[str, jax.Array], x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features, and which gates are open, each [B, F]."""
        if k:
            index_BxK, alpha_BxK = pursuit.pursue(params["W_dec"], x_BxD - params["b_dec"][None], k)
            rows = jnp.arange(len(x_BxD))[:, None]
            f_BxF = jnp.zeros((len(x_BxD), sae.width)).at[rows, index_BxK].add(alpha_BxK)
            return f_BxF, f_BxF != 0
        f_BxF = functions.encode(params, x_BxD, sae)
        gated = hasattr(functions, "pre_activations")
        return f_BxF, functions.pre_activations(params, x_BxD, sae)[0] > 0 if gated else f_BxF != 0

    def one(params: dict[str, jax.Array]) -> metrics.Sums:
        sums: metrics.Sums = {}

        def edit(x_RxTxD: jax.Array) -> jax.Array:
            valid = _valid(x_RxTxD, tokens_RxT, special_tokens, norm_limit)
            f_BxF, gate_BxF = encode(params, x_RxTxD.reshape(-1, sae.d_in).astype(jnp.float32))
            x_hat = functions.decode(params, f_BxF).reshape(x_RxTxD.shape)
            f, gate = (value.reshape(*valid.shape, -1) for value in (f_BxF, gate_BxF))
            sums.update(metrics.reconstruction_sums(x_RxTxD, x_hat, f, gate, mean_D, valid))
            return jnp.where(valid[..., None], x_hat, x_RxTxD).astype(x_RxTxD.dtype)

        hidden = _hidden(module, lm_params, tokens_RxT, sites.splice({site: edit}))
        nats, divergence = cross_entropy_and_divergence(module, lm_params, hidden, clean_RxTxD, tokens_RxT)
        sums["ce_sae"], sums["kl"] = nats.sum(-1), divergence.sum(-1)
        sums["predictions"] = jnp.full(len(tokens_RxT), tokens_RxT.shape[1] - 1)
        return sums

    return jax.vmap(one)(params_N)
