"""Taps for common interventions with SAEs: `lm.run(tokens, taps.steer(sae, 3, 5.0))`.

Each is a tap for `LM.run` and `LM.generate`. `chain` combines several into one. The taps of `steer` and `ablate` are
pytrees of their arrays: what is jitted with such a tap as an argument is not compiled again for another feature.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import errors
from gsae_jax.errors import UserError
from gsae_jax.lms import sites as sites_lib
from gsae_jax.saes.contract import Role
from gsae_jax.saes.trained import SAE


def steer(sae: SAE, feature: int, strength: float | jax.Array) -> sites_lib.Edits:
    """Adds `strength` times the decoder row of a feature to the activations of every token.

    Args:
        sae: an SAE that writes one site.
        feature: the feature's index.
        strength: in units of the feature's activation. A negative strength steers away from the feature. Compare it
            with the feature's maximum on text: the maximum is a strong intervention. At a few times the maximum, the
            model often repeats one token.

    Raises:
        UserError: the SAE writes several sites or has no site, or the feature does not exist.
    """
    if np.ndim(feature):
        raise UserError(f"is {feature}; give one number, and `chain` taps for several features", "feature")
    site, (row,) = _target(sae), _rows(sae, feature)
    errors.check_kind(strength, numbers.Real | jax.Array | np.ndarray, "strength", "a number")
    return sites_lib.splice({site: _Shift(strength * row)})


def ablate(sae: SAE, features: int | Sequence[int]) -> sites_lib.Edits:
    """Subtracts the contributions of some features from the activations of every token.

    x becomes x - sum_i f_i(x) W_dec_i over `features`. In contrast to a spliced reconstruction, the error of the SAE
    is kept.

    Args:
        sae: an SAE that reads one site and writes the same site.
        features: the index of one feature, or the indices of several.

    Raises:
        UserError: the SAE reads and writes different sites or has no site, or a feature does not exist.
    """
    site = _target(sae)
    if sae.sites != sae.targets:
        raise UserError(f"reads {', '.join(sae.sites)} and writes {site}; give one that reads what it writes", "sae")
    numbers_K = np.unique(features)
    return sites_lib.splice({site: _Ablation(sae, numbers_K, _rows(sae, numbers_K))})


def splice(*saes: SAE) -> sites_lib.Chain:
    """Replaces the activations at the target of each SAE with its reconstructions.

    A transcoder reads its site in the same forward pass, after the taps before it.

    In contrast to the report, this also replaces activations of special tokens and above `sae.norm_limit`, on which an
    SAE was not trained. Therefore a loss measured with this tap differs from the report's.

    Raises:
        UserError: an SAE writes several sites or has no site, or two SAEs have the same target.
    """
    taps: dict[str, sites_lib.Tap] = {}
    for sae in saes:
        site = _target(sae)
        if site in taps:
            raise UserError(f"has two of {site}; give one for each site", "saes")
        same = sae.sites == sae.targets
        taps[site] = sites_lib.splice({site: sae}) if same else sites_lib.Prediction(sae.sites, site, sae)
    return sites_lib.Chain(tuple(taps.values()))


class read:
    """Stores the activations of some sites and changes nothing.

        seen = taps.read("blocks.0.hook_mlp_out")
        lm.run(tokens, taps.chain(taps.steer(sae, 3, 5.0), seen))
        seen.activations["blocks.0.hook_mlp_out"]  # [B, T, D]

    Use it with `LM.run` only. In compiled code, such as `LM.generate`, it would store tracers, which have no values.

    Attributes:
        activations: the activations of the last run, by site.
    """

    def __init__(self, *sites: str):
        for site in sites:
            errors.check_kind(site, str, "sites", "names of sites")
        self.edits = dict.fromkeys(sites)
        self.activations: dict[str, jax.Array] = {}

    def __call__(self, site: str, x: jax.Array) -> None:
        """Stores the activations, if the site is one of those given."""
        if site in self.edits:
            self.activations[site] = x


def chain(*taps: sites_lib.Tap | SAE) -> sites_lib.Chain:
    """Combines taps into one. Each gets the activations that the tap before it returns. An SAE means `splice(sae)`."""
    for tap in taps:
        errors.check_kind(tap, SAE | Callable, "taps", "taps and SAEs")
    return sites_lib.Chain(tuple(splice(tap) if isinstance(tap, SAE) else tap for tap in taps))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Shift:
    """Adds a vector [D] to activations [B, T, D]."""

    vector: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.vector[None, None].astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Ablation:
    """Subtracts the contributions of features `numbers` [K] with decoder rows [K, D] from activations [B, T, D]."""

    sae: SAE
    numbers: np.ndarray
    rows_KxD: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x - (self.sae.encode(x)[..., self.numbers] @ self.rows_KxD).astype(x.dtype)


def _target(sae: SAE) -> str:
    """The site that an SAE writes."""
    errors.check_kind(sae, SAE, "sae", "an SAE")
    sites = sae.targets
    if len(sites) != 1:
        raise UserError(f"writes {len(sites)} sites; give an SAE of one", "sae")
    if not sites[0]:
        field = "site" if sae.sites == sites else "target"
        raise UserError(f"does not say its {field}; give `dataclasses.replace(sae, {field}='...')`", "sae")
    return sites[0]


def _rows(sae: SAE, features: int | Sequence[int] | np.ndarray) -> jax.Array:
    """Decoder rows [K, D] of features."""
    rows = np.atleast_1d(features)
    if not np.issubdtype(rows.dtype, np.integer) or not ((rows >= 0) & (rows < sae.width)).all():
        raise UserError(f"is {features}; this SAE has features 0 to {sae.width - 1}", "feature")
    [name] = [name for name, each in sae.functions.PARAMETERS.items() if each.role is Role.DECODER]
    return jnp.asarray(sae.params[name])[rows]
