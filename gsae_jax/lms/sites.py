"""Sites and taps: where activations are read from a language model, and put back.

A site is a TransformerLens hook name, such as `blocks.3.hook_resid_post`. In a run with several language models, a site
of another model than the first is HOOK@NAME, such as `blocks.3.hook_resid_post@finetuned`.

A tap is called by the model with every site's name and activations [B, T, D], and what it returns takes their place
(None: they stay as they were): reading, splicing, ablating and steering are all taps.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError, known_names

Tap = Callable[[str, jax.Array], Any]


@runtime_checkable
class Edit(Protocol):
    """A function of the activations of a site that it names, such as a trained SAE.

    It may have `sites` and `targets`, as a transcoder has, if it reads another site than it writes, or several.
    """

    @property
    def site(self) -> Any:
        """The site that it reads."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """What takes the place of the activations [B, T, D]."""


def no_tap(site: str, x: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    return x


def capture(sites: Iterable[str], into: dict[str, jax.Array]) -> Tap:
    """A tap that also stores what it sees at `sites`."""
    wanted = set(sites)

    def tap(site: str, x: jax.Array) -> jax.Array:
        if site in wanted:
            into[site] = x
        return x

    return tap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Edits:
    """A tap that applies `edits[site]` to the activations of each of its sites. It is a pytree."""

    edits: Mapping[str, Callable[[jax.Array], jax.Array]]

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        """The edited activations, or those of another site as they are."""
        return self.edits[site](x) if site in self.edits else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A tap that calls others in turn, each with the activations that the one before it leaves. It is a pytree."""

    taps: tuple[Tap, ...]

    @property
    def edits(self) -> set[str]:
        """The sites that they are known to use."""
        return {site for tap in self.taps for site in getattr(tap, "edits", ())}

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        """The activations after all of them."""
        for tap in self.taps:
            x = checked(tap)(site, x)
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """A tap that replaces the activations of one site by a function of those of sites before it, such as a transcoder.

    Attributes:
        sites: that are read.
        target: whose activations are replaced.
        function: of the activations [B, T, D] of the site, or of a tuple of them.
    """

    sites: tuple[str, ...]
    target: str
    function: Callable[[Any], jax.Array]
    _seen: dict[str, jax.Array] = dataclasses.field(default_factory=dict, init=False)

    @property
    def edits(self) -> set[str]:
        """The sites that it uses."""
        return {*self.sites, self.target}

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        """The prediction at the target, and other activations as they are.

        Raises:
            UserError: the model has not computed what is read before the target.
        """
        if site in self.sites:
            self._seen[site] = x
        if site != self.target:
            return x
        if later := [name for name in self.sites if name not in self._seen]:
            raise UserError(f"reads {', '.join(later)}, which the model computes after {site}", "tap")
        inputs = tuple(self._seen.pop(name) for name in self.sites)
        return self.function(inputs if len(inputs) > 1 else inputs[0])


def splice(edits: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Edits:
    """A tap that applies `edits[site]` to the activations of each of its sites."""
    return Edits(dict(edits))


def as_tap(tap: Tap | Edit, sites: Iterable[str]) -> Tap:
    """The tap itself, or for an edit the tap that applies it at its site.

    Raises:
        UserError: it is neither a tap nor an edit, or a site that it edits is none of `sites`.
    """
    if isinstance(tap, tuple | list):
        raise UserError("is several; give `taps.chain(a, b)`", "tap")
    if not callable(tap):
        raise UserError(f"is of type {type(tap).__name__}; give a function of (site, activations), or an SAE", "tap")
    if not isinstance(tap, Edit):
        for site in getattr(tap, "edits", ()):
            check(site, sites, "tap")
        return tap
    reads, writes = getattr(tap, "sites", (tap.site,)), getattr(tap, "targets", (tap.site,))
    if not all(reads):
        raise UserError("does not say its site; give `lambda site, x: sae(x) if site == '...' else x`", "tap")
    if not all(writes):
        raise UserError("does not say its target; give `dataclasses.replace(sae, target='...')`", "tap")
    if len(writes) > 1:
        why = f"writes {len(writes)} sites, {', '.join(writes)}"
        raise UserError(f"{why}; give an SAE that writes one site, or a function of (site, activations)", "tap")
    for site in (*reads, *writes):
        check(site, sites, "tap")
    return splice({tap.site: tap}) if reads == writes else Prediction(reads, writes[0], tap)


def checked(tap: Tap) -> Tap:
    """The tap, checked: where it returns None, the activations stay; its arrays get the activations' dtype.

    Without the check a smaller array would be broadcast, and the model would compute wrong numbers.

    Raises:
        UserError: when called, if the tap does not return an array of real numbers of the activations' shape.
    """

    def apply(site: str, x: jax.Array) -> jax.Array:
        value = tap(site, x)
        if value is None:
            return x
        try:
            dtype, shape = jnp.result_type(value), jnp.shape(value)
        except (TypeError, ValueError):
            what = f"a {type(value).__name__}"
        else:
            if shape == x.shape and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
                return jnp.asarray(value, x.dtype)
            what = f"{dtype}{list(shape)}"
        raise UserError(
            f"returned {what} at {site}, where activations are {x.dtype}{list(x.shape)}; return an array of their "
            "shape, or None to leave them as they are",
            "tap",
        )

    return apply


def parts(site: str) -> tuple[str, str]:
    """(The hook name, the name of the language model) of a site; the first model of a run has the name ""."""
    hook, _, model = site.partition("@")
    return hook, model


def at(hook: str, model: str) -> str:
    """The site with this hook name of a language model: the inverse of `parts`."""
    return f"{hook}@{model}" if model else hook


def layer_of(site: str) -> int:
    """The block a site belongs to.

    Raises:
        UserError: it is not written as one.
    """
    match = re.match(r"blocks\.(\d+)\.", site)
    if not match:
        raise UserError(f"{site!r} is not a site; write one like 'blocks.0.hook_mlp_out'", "site")
    return int(match[1])


def stream_before(site: str) -> str:
    """The site of the residual stream that enters the block of a site."""
    return at(f"blocks.{layer_of(site)}.hook_resid_pre", parts(site)[1])


MLP_INPUT, NEURONS = "ln2.hook_normalized", "mlp.hook_post"
# Modules of a Hugging Face block and hooks of TransformerLens 3, by their names after the block's number, and the sites
# that their outputs are.
OUTPUTS = {
    "": "hook_resid_post",
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "mlp.act": NEURONS,
    "mlp.hook_in": MLP_INPUT,
}
# The same for blocks without norms after attention and MLP. In other blocks, those of Gemma 2, 3 and 4 and of OLMo,
# the norms' outputs are the sites.
UNNORMED = {
    **dict.fromkeys(("mlp", "mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.hook_out"), "hook_mlp_out"),
    "block_sparse_moe": "hook_mlp_out",
    **dict.fromkeys(("attn", "attn.c_proj", "attn.hook_out", "attention", "attention.dense"), "hook_attn_out"),
    **dict.fromkeys(("self_attn", "self_attn.o_proj"), "hook_attn_out"),
}
NORMED = {"post_attention_layernorm": "hook_attn_out", "post_feedforward_layernorm": "hook_mlp_out"}
BLOCK = r"(?:(?:model|transformer|gpt_neox|language_model|base_model)\.)*(?P<list>layers|h|blocks)\.(?P<number>\d+)"


def hook_name(name: str, norm_after: bool | None = None) -> str | None:
    """The site that a name of another library means.

    Args:
        name: of a module of a Hugging Face model, whose output is meant, such as `model.layers.1` or
            `transformer.h.0.mlp`; of a hook of another library, such as `resid_post_layer_8`; or of a site.
        norm_after: whether norms follow attention and MLP in that model's blocks; None if that is not known.

    Returns:
        The site; None where the name is not known, or its meaning depends on `norm_after` and that is None.
    """
    name = re.sub(r"(\.hook_sae_\w+|\.output(\.0|\[0\])?)$", "", name.strip())
    if short := re.fullmatch(r"(resid_pre|resid_mid|resid_post|mlp_out|attn_out)(?:_layer_|[._])(\d+)", name, re.ASCII):
        return f"blocks.{_number(short[2])}.hook_{short[1]}"
    block = re.fullmatch(BLOCK + r"(?:\.(?P<module>.+))?", name, re.ASCII)
    if not block:
        return None
    module = block["module"] or ""
    if block["list"] == "h" or "gpt_neox" in name:  # which have no such norms
        norm_after = False
    known = OUTPUTS | {None: {}, False: UNNORMED, True: NORMED}[norm_after]
    hook = known.get(module, module if block["list"] == "blocks" and "hook_" in module else None)
    return f"blocks.{_number(block['number'])}.{hook}" if hook else None


def _number(digits: str) -> str:
    return digits.lstrip("0") or "0"


def check(site: str, sites: Iterable[str], field: str) -> None:
    """Raises `UserError`, listing the sites of the same language model, where `site` is none of them."""
    sites, (hook, model) = list(sites), parts(site)
    if site in sites:
        return
    out = at(hook.removesuffix(NEURONS) + "hook_mlp_out", model)
    if hook.endswith(NEURONS) and out in sites:
        why = "its layer has experts, whose neurons are not one array"
        raise UserError(f"{site!r} is not a site of this language model: {why}; write {out!r}", field)
    known = [name for name in sites if parts(name)[1] == model]
    ours = at(hook_name(hook) or hook_name(hook, norm_after=False) or hook, model)
    if model and not known:
        hint = f"give the model {model!r} of its run, and the SAE with the site {hook!r} (`dataclasses.replace`)"
    else:
        hint = f"did you mean {ours!r}? known: {', '.join(known)}" if ours in known else known_names(site, known)
    raise UserError(f"{site!r} is not a site of this language model; {hint}", field)
