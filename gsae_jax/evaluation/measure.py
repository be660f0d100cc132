"""Measuring SAEs on held-out text: the language model runs with their reconstructions in place of its activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import batching
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking
from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics
from gsae_jax.lms import loading, sites
from gsae_jax.lms.loading import LM, check_tokens
from gsae_jax.lms.loss import cross_entropy_and_divergence
from gsae_jax.saes import contract, inference, linalg, parameters, pursuit, trained

AT_ONCE = 12  # interventions whose losses are computed at once; beside them are those of one SAE by pursuit
MEDIAN_TOKENS = 4096  # how many tokens a site's median norm is taken over
# The norm above which a token is left alone, of each site that an SAE reads or writes (`trained.SAE.norm_limits`).
Limits = tuple[tuple[str, float], ...]
# A site that is written, the limits of SAEs that write there, and what else these read.
Place = tuple[str, Limits, tuple[str, ...]]
Modules = tuple[tuple[str, Any], ...]  # (name, module) of each language model


class Written(NamedTuple):
    """An SAE and one of the sites that it writes, which are measured one by one.

    Attributes:
        sae: the SAE.
        number: of the site among its `targets`.
    """

    sae: trained.SAE
    number: int

    @property
    def place(self) -> tuple[str, Limits]:
        """The site, and the limits of the SAE."""
        return self.sae.targets[self.number], tuple(sorted(self.sae.norm_limits.items()))

    def name(self, k: int = 0) -> str:
        """What it is called in reports; with `k`, where so many features are chosen by gradient pursuit."""
        site = f"@{self.place[0]}" if len(self.sae.targets) > 1 else ""
        return f"{self.sae.name}_ito_{k}{site}" if k else f"{self.sae.name}{site}"


def written(sae: trained.SAE) -> list[Written]:
    """Each of the sites that an SAE writes."""
    return [Written(sae, number) for number in range(len(sae.targets))]


def measure(
    lm: LM | None,
    saes: Sequence[trained.SAE],
    batches: Sequence[Any],
    special_tokens: tuple[int, ...] = (),
    progress: Callable[[], Any] = lambda: None,
    ito: Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
    others: Mapping[str, LM] = MappingProxyType({}),
) -> dict[str, metrics.Sums]:
    """Sums over `batches` [R, T] of rows of tokens, by `Written.name`, on the LM's mesh.

    `metrics.combine` makes metrics of them.

    If an SAE writes several sites, each of them is replaced and measured by itself, in its own language model.

    Rows of padding fill a batch up to a multiple of the number of devices. They are not measured.

    Tokens on which an SAE was not trained (`special_tokens`, those that the rows hide, and those with an activation
    above a norm limit at a site that the SAE reads or writes) are not measured. They keep the language model's own
    activations in every intervention.

    Args:
        lm: the language model. Without one, activations are those of the batches, and cross-entropies are left out.
        saes: the SAEs.
        batches: rows of tokens [R, T]; without a language model, rows of a store.
        special_tokens: ids of tokens that are not measured.
        progress: called once per batch in each of two passes. The first pass computes the sites' means.
        ito: numbers of features. For each, every SAE's dictionary is also measured with this number of features,
            chosen by gradient pursuit instead of the encoder (Appendix A).
        mesh: without a language model, over which batches are spread.
        others: the other language models of the run, on the same mesh, by the names after the @ of their sites.
    """
    lms = {} if lm is None else {"": lm, **others}
    modules = tuple((name, each.module) for name, each in lms.items())
    lm_params = {name: each.params for name, each in lms.items()}
    mesh = mesh if lm is None else lm.module.mesh
    splits = mesh.shape["data"] if mesh else 1
    widths = {sites.at(hook, name): width for name, each in lms.items() for hook, width in each.sites.items()}
    for sae in saes if lms else ():
        check_sites(sae, widths)
    params_of = {sae.name: spread(mesh, sae) for sae in saes}
    ks = tuple(sorted(set(ito)))
    each = [one for sae in saes for one in written(sae)]
    names = {one.name(): [one.name(k) for k in (0, *ks)] for one in each}
    also_read: dict[tuple[str, Limits], set[str]] = {}
    for one in each:
        also_read.setdefault(one.place, set()).update({*one.sae.sites} - {one.place[0]})
    places = tuple((*place, tuple(sorted(read))) for place, read in sorted(also_read.items()))

    def on_mesh(array: np.ndarray) -> jax.Array:
        array = np.pad(array, ((0, -len(array) % splits), *[(0, 0)] * (array.ndim - 1)))
        if not mesh:
            return jnp.asarray(array)
        return mesh_lib.place_rows(mesh, array[mesh_lib.local_rows(mesh, len(array))], len(array))

    def placed(batch: Any) -> tuple[Any, jax.Array]:
        """Tokens [R, T] or activations [R, T, D] by site, and which tokens are measured; rows for every device."""
        if lm is None:
            allowed = batch.mask if batch.tokens is None else batch.mask & ~np.isin(batch.tokens, special_tokens)
            return jax.tree.map(on_mesh, batch.activations), on_mesh(allowed)
        tokens = masking.tokens_of(batch)
        for each in lms.values():
            check_tokens(tokens, each.config.d_vocab, "data")
        return on_mesh(tokens), on_mesh(masking.allowed(batch, special_tokens))

    def shape(batch: Any) -> tuple[int, int]:
        return batch.shape if lm is not None else batch.mask.shape

    looked_at = batches[: -(-MEDIAN_TOKENS // math.prod(shape(batches[0])))]
    norms = [mesh_lib.fetch(_norms(modules, places, lm_params, *placed(batch))) for batch in looked_at]
    limits = [_extreme(np.concatenate([part.ravel() for part in parts])) for parts in zip(*norms, strict=True)]
    site_sums = []
    for batch in batches:
        site_sums.append(mesh_lib.fetch(_site_sums(modules, places, lm_params, limits, *placed(batch))))
        progress()
    means = []
    for place, *parts in zip(places, *site_sums, strict=True):
        numbers = [sum(part[which][1] for part in parts) for which in (0, 1)]
        if not all(numbers):
            name = next(one.sae.name for one in each if one.place == place[:2])
            largest = ", ".join(f"{limit:g}" for _, limit in place[1])
            why = f"has a norm above its norm_limit ({largest}), is not finite, or is of a special or hidden token"
            raise UserError(
                f"cannot be measured: every activation {why}; write the language model and the text of its training",
                name,
            )
        means.append(
            [
                np.asarray(sum(np.float64(part[which][0]) for part in parts) / numbers[which], np.float32)
                for which in (0, 1)
            ]
        )

    def sums_of(batch: Any) -> dict[str, metrics.Sums]:
        # Its arrays are freed when it returns, before the next batch makes others.
        tokens_RxT, allowed_RxT = placed(batch)
        means_of = [mean_D for mean_D, _ in means]
        hidden, contexts = _clean(modules, places, lm_params, means_of, limits, tokens_RxT, allowed_RxT)
        sums: dict[str, metrics.Sums] = {}
        for place, means_here, context in zip(places, means, contexts, strict=True):
            mine = [one for one in each if one.place == place[:2]]
            hook, model = sites.parts(place[0])
            of_place = dict(zip(("mean", "typical_mean"), means_here, strict=True)) | {
                name: context[name] for name in ("valid", "typical")
            }
            last = names[mine[-1].name()][-1]
            losses: dict[Any, tuple[jax.Array, jax.Array]] = {}
            # By the name of an SAE, or a tuple, which no SAE has as a name.
            waiting: dict[Any, Any] = {(kind,): context[kind] for kind in ("x", "zero", "mean")}
            for one in mine:
                sae = one.sae
                reads = tuple(context["others"].get(site, context["x"]) for site in sae.sites)
                inputs = reads if isinstance(sae.config.d_in, tuple) else reads[0]
                settings = mesh, sae.architecture, sae.config, one.number
                arrays = params_of[sae.name], (context["x"], inputs), of_place
                by_encoder = _reconstruct(*settings, *arrays)
                by_pursuit = _pursue(*settings, ks, *arrays) if ks else []
                interventions = [by_encoder, *by_pursuit]
                del by_encoder, by_pursuit
                for name in names[one.name()]:
                    waiting[name], sums[name] = interventions.pop(0)
                    if lm is None:
                        waiting = {}
                    elif len(waiting) >= AT_ONCE or name == last:
                        arrays_of_lm = lm_params[model], context["before"], hidden[model], tokens_RxT
                        some = _losses(lms[model].module, hook, *arrays_of_lm, [*waiting.values()])
                        losses |= dict(zip(waiting, some, strict=True))
                        waiting = {}
            kinds = (("clean", "x"), ("zero", "zero"), ("mean", "mean")) if losses else ()
            shared = {f"ce_{kind}": losses[of,][0] for kind, of in kinds}
            for name in (name for one in mine for name in names[one.name()] if losses):
                sums[name] |= shared | dict(zip(("ce_sae", "kl"), losses[name], strict=True))
        return sums

    totals: dict[str, metrics.Sums] = {name: {} for of_one in names.values() for name in of_one}
    for batch in batches:
        R, T = shape(batch)
        predictions = {} if lm is None else {"predictions": np.full(R, T - 1)}
        for name, of_one in mesh_lib.fetch(sums_of(batch)).items():
            of_one = {key: value if key == "fired" else value[:R] for key, value in of_one.items()}
            metrics.add(totals[name], of_one | predictions)
        progress()
    return totals


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
    """Raises `UserError` for an SAE that does not fit a language model's sites.

    Args:
        sae: the SAE.
        widths: of the language model's sites.
    """
    for field, names, sizes in (
        ("reads", sae.sites, sae.config.d_in),
        ("writes", sae.targets, getattr(sae.config, "d_out", sae.config.d_in)),
    ):
        for site, size in zip(names, sizes if isinstance(sizes, tuple) else (sizes,), strict=True):
            sites.check(site, widths, f"site of {sae.name}")
            if widths[site] != size:
                site_width = f"{site} has width {widths[site]} in this language model"
                what = f"{field} activations of width {size}, but {site_width}"
                raise UserError(f"{what}; write the language model that it was trained on", sae.name)


def _valid(activations: Mapping[str, jax.Array], allowed_RxT: jax.Array, limits: Limits) -> jax.Array:
    """Which tokens are measured, and have their activations replaced."""
    return masking.valid(allowed_RxT, {site: activations[site] for site, _ in limits}, dict(limits))


def _extreme(norms: np.ndarray) -> np.float32:
    """The norm above which a token is extreme, from the norms of many tokens; tokens not to be measured have NaN."""
    measured = norms[np.isfinite(norms)]
    median = np.median(measured) if measured.size else 0.0
    return np.float32(metrics.EXTREME * median if median > 0 else np.inf)


def _activations(modules: Modules, lm_params: Any, tokens: Any, places: tuple[Place, ...]) -> dict[str, jax.Array]:
    """The activations at the places; without a language model, `tokens` are the activations."""
    wanted = {site for _, limits, _ in places for site, _ in limits}
    return loading.capture_each(modules, lm_params, tokens, wanted) if modules else tokens


@partial(jax.jit, static_argnums=(0, 1))
def _norms(
    modules: Modules, places: tuple[Place, ...], lm_params: Any, tokens_RxT: Any, allowed_RxT: jax.Array
) -> list[jax.Array]:
    """The norms [R, T] of the valid activations at each place, NaN for the others."""
    activations = _activations(modules, lm_params, tokens_RxT, places)
    return [
        jnp.where(_valid(activations, allowed_RxT, norm_limits), masking.norms(activations[site]), jnp.nan)
        for site, norm_limits, _ in places
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _site_sums(
    modules: Modules,
    places: tuple[Place, ...],
    lm_params: Any,
    limits: list[jax.Array],
    tokens_RxT: Any,
    allowed_RxT: jax.Array,
) -> list[list[tuple[jax.Array, jax.Array]]]:
    """(sum [D], number) of the activations at each place: of all valid ones, and of those without an extreme norm."""
    activations = _activations(modules, lm_params, tokens_RxT, places)

    def sums(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum((0, 1)), valid.sum()

    def of_place(site: str, norm_limits: Limits, limit: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        x, valid = activations[site], _valid(activations, allowed_RxT, norm_limits)
        return [sums(x, valid), sums(x, valid & (masking.norms(x) <= limit))]

    each = zip(places, limits, strict=True)
    return [of_place(site, norm_limits, limit) for (site, norm_limits, _), limit in each]


@partial(jax.jit, static_argnums=(0, 1))
def _clean(
    modules: Modules,
    places: tuple[Place, ...],
    lm_params: Any,
    means: list[jax.Array],
    limits: list[jax.Array],
    tokens_RxT: Any,
    allowed_RxT: jax.Array,
) -> tuple[dict[str, jax.Array], list[dict[str, jax.Array]]]:
    """The untouched forward passes: each model's last residual stream [R, T, D], and what interventions at places need.

    For each place, that is the activations `x`, which of them are `valid` and which `typical` [R, T], and `x` with the
    valid ones `zero` or at their `mean`; the residual stream `before` the block they are in; and the activations at
    `others`.
    """
    replaced, read = {site for site, _, _ in places}, {site for _, limits, _ in places for site, _ in limits}
    wanted = read | {sites.stream_before(site) for site in (replaced if modules else ())}
    activations: dict[str, jax.Array] = {}
    hidden: dict[str, jax.Array] = {}
    if not modules:
        activations = tokens_RxT
    for name, module in modules:
        of_model: dict[str, jax.Array] = {}
        tap = sites.capture([hook for hook, of in map(sites.parts, wanted) if of == name], of_model)
        hidden[name] = module.apply({"params": lm_params[name]}, tokens_RxT, tap, method="hidden")
        activations |= {sites.at(hook, name): x for hook, x in of_model.items()}

    def context(
        site: str, norm_limits: Limits, others: tuple[str, ...], mean_D: jax.Array, limit: jax.Array
    ) -> dict[str, Any]:
        x = activations[site]
        valid = _valid(activations, allowed_RxT, norm_limits)
        mean = jnp.where(valid[..., None], mean_D[None, None].astype(x.dtype), x)
        zero = jnp.where(valid[..., None], jnp.zeros_like(x), x)
        masks = {"valid": valid, "typical": valid & (masking.norms(x) <= limit)}
        interventions = {"x": x, "zero": zero, "mean": mean}
        others_here = {other: activations[other] for other in others}
        before = {} if not modules else {"before": activations[sites.stream_before(site)]}
        beside = before | {"others": others_here}
        return masks | interventions | beside

    each = zip(places, means, limits, strict=True)
    return hidden, [context(*place, mean, limit) for place, mean, limit in each]


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
        tap = sites.splice({sites.stream_before(site): lambda _: before_RxTxD, site: lambda _: replacement_RxTxD})
        return module.apply({"params": lm_params}, tokens_RxT, tap, method="hidden")

    streams_NxRxTxD = jax.lax.map(hidden, jnp.stack(replacements))
    losses = cross_entropy_and_divergence(module, lm_params, streams_NxRxTxD, hidden_RxTxD, tokens_RxT)
    return list(zip(*(value.sum(-1) for value in losses), strict=True))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _reconstruct(
    mesh: jax.sharding.Mesh | None,
    architecture: str,
    config: Any,
    number: int,
    params: dict[str, jax.Array],
    activations: tuple[jax.Array, Any],
    place: dict[str, jax.Array],
) -> tuple[jax.Array, metrics.Sums]:
    """Activations with the valid ones reconstructed, and the sums that `metrics` need.

    Of the `place` there are the masks `valid` and `typical` [R, T], and the means over them, `mean` and `typical_mean`.
    The activations are at the site with this `number` of those that the SAE writes, and at those that it reads.
    """
    x_RxTxD, inputs = activations
    functions = contract.module_of(architecture)
    params, shards = _gathered(mesh, functions, config, params)

    def part(part: Any) -> tuple[Any, jax.Array]:
        inputs, valid_RxT = part
        inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inference.flat(inputs))
        f_BxF = functions.encode(params, inputs, config)
        gate_BxF = contract.gate(functions, params, inputs, config)
        if mesh is None or mesh.size == 1:
            x_hats = inference.decode(functions, config, params, f_BxF)
        else:
            x_hats = functions.decode(params, f_BxF)
        x_hat_BxD = jax.tree.leaves(contract.with_skip(functions, params, inputs, x_hats))[number]
        per_token = x_hat_BxD, metrics.feature_statistics(f_BxF, gate_BxF)
        fired_F = (metrics.fired(f_BxF) & valid_RxT.reshape(-1, 1)).sum(0)
        return jax.tree.map(lambda value: value.reshape(*valid_RxT.shape, *value.shape[1:]), per_token), fired_F

    at_once = inference.tokens_at_once(config.width // shards, mesh.shape["data"] if mesh else 1)
    (x_hat_RxTxD, features), fired_F = batching.in_chunks(part, (inputs, place["valid"]), at_once)
    return _measured(x_RxTxD, x_hat_RxTxD, features, fired_F, place)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _pursue(
    mesh: jax.sharding.Mesh | None,
    architecture: str,
    config: Any,
    number: int,
    ks: tuple[int, ...],
    params: dict[str, jax.Array],
    activations: tuple[jax.Array, Any],
    place: dict[str, jax.Array],
) -> list[tuple[jax.Array, metrics.Sums]]:
    """What `_reconstruct` gives, with each number of features in `ks`, which gradient pursuit chooses."""
    x_RxTxD, inputs = activations
    functions = contract.module_of(architecture)
    params, shards = _gathered(mesh, functions, config, params)
    bias = params.get(parameters.output_bias(functions, number) or "", jnp.zeros(x_RxTxD.shape[-1]))
    # Those of crosscoders are not unit, and those of imported SAEs need not be.
    W_dec_FxD = linalg.unit(params[parameters.decoder(functions, number)])

    def part(part: Any) -> tuple[Any, list[jax.Array]]:
        x_RxtxD, inputs, valid_RxT = part
        x_BxD, inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inference.flat((x_RxtxD, inputs)))
        skipped = contract.skip(functions, params, inputs)
        constant_BxD = bias[None] if skipped is None else bias[None] + jax.tree.leaves(skipped)[number]
        per_token, fired = [], []
        for codes in pursuit.pursue(W_dec_FxD, x_BxD - constant_BxD, ks, contract.is_signed(functions)):
            on_BxK = metrics.fired(codes.alpha)
            per_token.append((codes.x_hat + constant_BxD, metrics.feature_statistics(codes.alpha, on_BxK)))
            on_BxK &= valid_RxT.reshape(-1, 1)
            fired.append(jnp.zeros(config.width, jnp.int32).at[codes.indices].add(on_BxK))
        return jax.tree.map(lambda value: value.reshape(*valid_RxT.shape, *value.shape[1:]), per_token), fired

    D = x_RxTxD.shape[-1]
    at_once = pursuit.tokens_at_once(jax.default_backend(), config.width // shards, D, max(ks))
    at_once *= mesh.shape["data"] if mesh else 1
    per_token, fired = batching.in_chunks(part, (x_RxTxD, inputs, place["valid"]), at_once)
    return [
        _measured(x_RxTxD, x_hat_RxTxD, features, fired_F, place)
        for (x_hat_RxTxD, features), fired_F in zip(per_token, fired, strict=True)
    ]


def _gathered(
    mesh: jax.sharding.Mesh | None, functions: contract.Architecture, config: Any, params: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], int]:
    """(Parameters with features along `latent` alone, where they divide; the number of their shards).

    So they are gathered along `data`, as the rows lie there, when this SAE's turn comes.
    """
    if not mesh or config.width % mesh.shape["latent"]:
        return params, 1
    axes = {name: functions.PARAMETERS[name].axis for name in params}
    gathered = {
        name: value
        if (axis := axes[name]) is None
        else jax.lax.with_sharding_constraint(value, mesh_lib.sharding(mesh, *[None] * axis, "latent"))
        for name, value in params.items()
    }
    return gathered, mesh.shape["latent"]


def _measured(
    x_RxTxD: jax.Array,
    x_hat_RxTxD: jax.Array,
    features: dict[str, jax.Array],
    fired_F: jax.Array,
    place: dict[str, jax.Array],
) -> tuple[jax.Array, metrics.Sums]:
    about = [place[name] for name in ("mean", "typical_mean", "valid", "typical")]
    sums = metrics.reconstruction_sums(x_RxTxD, x_hat_RxTxD, features, *about) | {"fired": fired_F}
    return jnp.where(place["valid"][..., None], x_hat_RxTxD, x_RxTxD).astype(x_RxTxD.dtype), sums
