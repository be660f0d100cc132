"""Measuring SAEs on held-out text: the language model runs with their reconstructions in place of its activations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking
from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics
from gsae_jax.lms import loading, sites
from gsae_jax.lms.loading import LM, check_tokens
from gsae_jax.lms.loss import cross_entropy_and_divergence
from gsae_jax.saes import contract, linalg, parameters, pursuit, trained

AT_ONCE = 12  # interventions whose activations are held at once
MEDIAN_TOKENS = 4096  # how many tokens a site's median norm is taken over
# A site, the norm above which its activations are left alone, and what else SAEs read that write there.
Place = tuple[str, float, tuple[str, ...]]


def measure(
    lm: LM,
    saes: Sequence[trained.SAE],
    batches: Sequence[np.ndarray],
    special_tokens: tuple[int, ...] = (),
    progress: Callable[[], Any] = lambda: None,
    ito: Sequence[int] = (),
) -> dict[str, metrics.Sums]:
    """On the LM's mesh, sums over `batches` [R, T] of tokens, by SAE name; `metrics.combine` turns them into metrics.

    Rows of padding make their number a multiple of the number of devices; these are not measured.

    What an SAE was not trained on (`special_tokens`, and activations beyond its norm limit) is not measured, and keeps
    the language model's own activation under every intervention.

    Args:
        progress: called once a batch, of two passes: the first finds the sites' means.
        ito: numbers of features; for each, every SAE's dictionary is measured with as many chosen by gradient pursuit
            instead of its encoder (Appendix A), under its name by `name_of`.
    """
    mesh = lm.module.mesh
    splits = mesh.shape["data"] if mesh else 1
    runs = []  # (name, SAE, its parameters, features to choose by pursuit)
    for sae in saes:
        check_sites(sae, lm.sites)
        params = spread(mesh, sae)
        runs += [(name_of(sae.name, k), sae, params, k) for k in (0, *ito)]
    others: dict[tuple[str, float], set[str]] = {}
    for sae in saes:
        others.setdefault((sae.targets[0], sae.norm_limit), set()).update({*sae.sites} - {*sae.targets})
    places = tuple((*place, tuple(sorted(read))) for place, read in sorted(others.items()))

    def placed(tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Tokens, and which are neither special nor padding; both [R, T] with rows for every device."""
        check_tokens(tokens, lm.config.d_vocab, "data")
        padding = ((0, -len(tokens) % splits), (0, 0))
        arrays = [np.pad(array, padding) for array in (tokens, ~np.isin(tokens, special_tokens))]
        if not mesh:
            tokens_RxT, allowed_RxT = map(jnp.asarray, arrays)
        else:
            rows = len(arrays[0])
            mine = mesh_lib.local_rows(mesh, rows)
            tokens_RxT, allowed_RxT = (mesh_lib.place_rows(mesh, array[mine], rows) for array in arrays)
        return tokens_RxT, allowed_RxT

    looked_at = batches[: -(-MEDIAN_TOKENS // batches[0].size)]
    norms = [mesh_lib.fetch(_norms(lm.module, places, lm.params, *placed(tokens))) for tokens in looked_at]
    limits = [_extreme(np.concatenate([part.ravel() for part in parts])) for parts in zip(*norms, strict=True)]
    site_sums = []
    for tokens in batches:
        site_sums.append(mesh_lib.fetch(_site_sums(lm.module, places, lm.params, limits, *placed(tokens))))
        progress()
    means = []
    for place, *parts in zip(places, *site_sums, strict=True):
        numbers = [sum(part[which][1] for part in parts) for which in (0, 1)]
        if not all(numbers):
            name = next(sae.name for sae in saes if (sae.targets[0], sae.norm_limit) == place[:2])
            why = f"their norms are above its norm_limit, {place[1]:g}, or they are not finite or of special tokens"
            raise UserError(f"has no activation to be measured on: {why}; write its own model and text", name)
        means.append(
            [
                np.asarray(sum(np.float64(part[which][0]) for part in parts) / numbers[which], np.float32)
                for which in (0, 1)
            ]
        )

    totals: dict[str, metrics.Sums] = {name: {} for name, *_ in runs}
    for tokens in batches:
        tokens_RxT, allowed_RxT = placed(tokens)
        means_of = [mean_D for mean_D, _ in means]
        hidden_RxTxD, contexts = _clean(lm.module, places, lm.params, means_of, limits, tokens_RxT, allowed_RxT)
        sums: dict[str, metrics.Sums] = {}
        for place, means_here, context in zip(places, means, contexts, strict=True):
            mine = [run for run in runs if (run[1].targets[0], run[1].norm_limit) == place[:2]]
            of_place = dict(zip(("mean", "typical_mean"), means_here, strict=True)) | {
                name: context[name] for name in ("valid", "typical")
            }
            losses: dict[str, tuple[jax.Array, jax.Array]] = {}
            waiting = {kind: context[kind] for kind in ("x", "zero", "mean")}
            for number, (name, sae, params, k) in enumerate(mine):
                reads = tuple(context["others"].get(site, context["x"]) for site in sae.sites)
                inputs = reads if isinstance(sae.config.d_in, tuple) else reads[0]
                waiting[name], sums[name] = _reconstruct(
                    mesh, sae.architecture, sae.config, k, params, inputs, context["x"], of_place
                )
                if len(waiting) >= AT_ONCE or number == len(mine) - 1:
                    found_here = _losses(
                        lm.module, place[0], lm.params, context["before"], hidden_RxTxD, tokens_RxT, [*waiting.values()]
                    )
                    losses |= dict(zip(waiting, found_here, strict=True))
                    waiting = {}
            shared = {f"ce_{kind}": losses[of][0] for kind, of in (("clean", "x"), ("zero", "zero"), ("mean", "mean"))}
            for name, *_ in mine:
                sums[name] |= shared | dict(zip(("ce_sae", "kl"), losses[name], strict=True))
        for name, batch in mesh_lib.fetch(sums).items():
            batch = {key: value if key == "fired" else value[: len(tokens)] for key, value in batch.items()}
            predictions = {"predictions": np.full(len(tokens), tokens.shape[1] - 1)}
            metrics.add(totals[name], batch | predictions)
        progress()
    return totals


def name_of(sae: str, k: int) -> str:
    """What an SAE is called of whose dictionary `k` features are chosen by gradient pursuit; 0: the encoder chooses."""
    return f"{sae}_ito_{k}" if k else sae


def spread(mesh: jax.sharding.Mesh | None, sae: trained.SAE) -> dict[str, jax.Array]:
    """An SAE's parameters, features spread over the mesh if there is one."""
    if mesh is None:
        return sae.params
    table = sae.functions.PARAMETERS
    return {
        name: jax.device_put(value, mesh_lib.spread(mesh, value.shape, table[name].axis))
        for name, value in sae.params.items()
    }


def check_sites(sae: trained.SAE, widths: Mapping[str, int]) -> None:
    """Raises `UserError` for an SAE that does not fit a language model's sites, or writes several.

    Args:
        sae: the SAE.
        widths: of the language model's sites.
    """
    if len(sae.targets) != 1:
        raise UserError(
            f"writes {len(sae.targets)} sites; only SAEs that write one are measured, so leave it out", sae.name
        )
    for field, names, sizes in (
        ("reads", sae.sites, sae.config.d_in),
        ("writes", sae.targets, getattr(sae.config, "d_out", sae.config.d_in)),
    ):
        for site, size in zip(names, sizes if isinstance(sizes, tuple) else (sizes,), strict=True):
            sites.check(site, widths, f"site of {sae.name}")
            if widths[site] != size:
                site_width = f"{site} has width {widths[site]} in this language model"
                raise UserError(f"{field} activations of width {size}, but {site_width}; write its own model", sae.name)


def _valid(site: str, x_RxTxD: jax.Array, allowed_RxT: jax.Array, norm_limit: jax.typing.ArrayLike) -> jax.Array:
    """Which activations of a site are measured and replaced."""
    return masking.valid(allowed_RxT, {site: x_RxTxD}, {site: norm_limit})


def _extreme(norms: np.ndarray) -> np.float32:
    """The norm above which a token is extreme, from the norms of many tokens; tokens not to be measured have NaN."""
    measured = norms[np.isfinite(norms)]
    median = np.median(measured) if measured.size else 0.0
    return np.float32(metrics.EXTREME * median if median > 0 else np.inf)


@partial(jax.jit, static_argnums=(0, 1))
def _norms(
    module: Any, places: tuple[Place, ...], lm_params: Any, tokens_RxT: jax.Array, allowed_RxT: jax.Array
) -> list[jax.Array]:
    """The norms [R, T] of the valid activations at each place, NaN for the others."""
    activations = loading.capture(module, lm_params, tokens_RxT, {site for site, _, _ in places})
    return [
        jnp.where(_valid(site, activations[site], allowed_RxT, norm_limit), masking.norms(activations[site]), jnp.nan)
        for site, norm_limit, _ in places
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _site_sums(
    module: Any,
    places: tuple[Place, ...],
    lm_params: Any,
    limits: list[jax.Array],
    tokens_RxT: jax.Array,
    allowed_RxT: jax.Array,
) -> list[list[tuple[jax.Array, jax.Array]]]:
    """(sum [D], number) of the activations at each place: of all valid ones, and of those without an extreme norm."""
    activations = loading.capture(module, lm_params, tokens_RxT, {site for site, _, _ in places})

    def sums(site: str, norm_limit: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        x = activations[site]
        valid = _valid(site, x, allowed_RxT, norm_limit)
        return jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum((0, 1)), valid.sum()

    return [
        [sums(site, norm_limit), sums(site, jnp.minimum(norm_limit, limit))]
        for (site, norm_limit, _), limit in zip(places, limits, strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _clean(
    module: Any,
    places: tuple[Place, ...],
    lm_params: Any,
    means: list[jax.Array],
    limits: list[jax.Array],
    tokens_RxT: jax.Array,
    allowed_RxT: jax.Array,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """The untouched forward pass: the last residual stream [R, T, D], and of each place what interventions need.

    That is the activations `x`, which of them are `valid` and which `typical` [R, T], and `x` with the valid ones
    `zero` or at their `mean`; the residual stream `before` the block they are in; and the activations at `others`.
    """
    replaced, read = {site for site, _, _ in places}, {site for _, _, others in places for site in others}
    activations: dict[str, jax.Array] = {}
    tap = sites.capture(replaced | read | {_before(site) for site in replaced}, activations)
    hidden_RxTxD = module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")

    def context(
        site: str, norm_limit: float, others: tuple[str, ...], mean_D: jax.Array, limit: jax.Array
    ) -> dict[str, Any]:
        x = activations[site]
        valid = _valid(site, x, allowed_RxT, norm_limit)
        mean = jnp.where(valid[..., None], mean_D[None, None].astype(x.dtype), x)
        zero = jnp.where(valid[..., None], jnp.zeros_like(x), x)
        masks = {"valid": valid, "typical": valid & (masking.norms(x) <= limit)}
        interventions = {"x": x, "zero": zero, "mean": mean}
        beside = {"before": activations[_before(site)], "others": {other: activations[other] for other in others}}
        return masks | interventions | beside

    each = zip(places, means, limits, strict=True)
    return hidden_RxTxD, [context(*place, mean, limit) for place, mean, limit in each]


def _before(site: str) -> str:
    return f"blocks.{sites.layer_of(site)}.hook_resid_pre"


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    module: Any,
    site: str,
    lm_params: Any,
    before_RxTxD: jax.Array,
    hidden_RxTxD: jax.Array,
    tokens_RxT: jax.Array,
    replacements: list[jax.Array],
) -> list[tuple[jax.Array, jax.Array]]:
    """For each replacement [R, T, D] of a site's activations: summed cross-entropies [R], and summed KL [R] of the
    clean predictions to those with it.

    One program for every intervention at a site, so that equal activations have equal losses to the last bit. Blocks
    before the site's are not computed: the stream that they gave is put back in.
    """

    def hidden(replacement_RxTxD: jax.Array) -> jax.Array:
        tap = sites.splice({_before(site): lambda _: before_RxTxD, site: lambda _: replacement_RxTxD})
        return module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")

    streams_NxRxTxD = jax.lax.map(hidden, jnp.stack(replacements))
    losses = cross_entropy_and_divergence(module, lm_params, streams_NxRxTxD, hidden_RxTxD, tokens_RxT)
    return list(zip(*(value.sum(-1) for value in losses), strict=True))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _reconstruct(
    mesh: jax.sharding.Mesh | None,
    architecture: str,
    config: Any,
    k: int,
    params: dict[str, jax.Array],
    inputs: Any,
    x_RxTxD: jax.Array,
    place: dict[str, jax.Array],
) -> tuple[jax.Array, metrics.Sums]:
    """Activations with the valid ones reconstructed, and the sums of `metrics.reconstruction_sums`.

    `k` features are chosen by gradient pursuit; 0: the encoder chooses, from the `inputs` of the sites that it reads.
    Of the `place` there are the masks `valid` and `typical` [R, T], and the means over them, `mean` and `typical_mean`.
    """
    functions = contract.module_of(architecture)
    if mesh and config.width % mesh.shape["latent"] == 0:
        # Gathered along `data`, as the rows lie there, when this SAE's turn comes.
        axes = {name: functions.PARAMETERS[name].axis for name in params}
        params = {
            name: value
            if (axis := axes[name]) is None
            else jax.lax.with_sharding_constraint(value, mesh_lib.sharding(mesh, *[None] * axis, "latent"))
            for name, value in params.items()
        }
    x_BxD = x_RxTxD.reshape(-1, x_RxTxD.shape[-1]).astype(jnp.float32)
    if k:
        # Atoms are unit; an imported dictionary may not be.
        decoder, bias = parameters.decoder(functions), parameters.output_bias(functions)
        params = params | {decoder: linalg.unit(params[decoder])}
        index_BxK, alpha_BxK = pursuit.pursue(params[decoder], x_BxD - params[bias][None] if bias else x_BxD, k)
        rows = jnp.arange(len(x_BxD))[:, None]
        f_BxF = jnp.zeros((len(x_BxD), config.width)).at[rows, index_BxK].add(alpha_BxK)
        gate_BxF = f_BxF != 0
    else:
        inputs = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]).astype(jnp.float32), inputs)
        f_BxF = functions.encode(params, inputs, config)
        gate_BxF = contract.gate(functions, params, inputs, config)
    x_hat_RxTxD = functions.decode(params, f_BxF).reshape(x_RxTxD.shape)
    f, gate = (value.reshape(*x_RxTxD.shape[:2], -1) for value in (f_BxF, gate_BxF))
    about = [place[name] for name in ("mean", "typical_mean", "valid", "typical")]
    sums = metrics.reconstruction_sums(x_RxTxD, x_hat_RxTxD, f, gate, *about)
    return jnp.where(place["valid"][..., None], x_hat_RxTxD, x_RxTxD).astype(x_RxTxD.dtype), sums
