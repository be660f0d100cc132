"""Sites and taps: where activations are read from a language model, and put back.

A site is a TransformerLens hook name, such as `blocks.3.hook_resid_post`. A tap is called by the model with every
site's name and activations [B, T, D], and what it returns takes their place: reading, splicing, ablating and steering
are all taps.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import jax

from gsae_jax.config import ConfigError, known_names

Tap = Callable[[str, jax.Array], jax.Array]


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


def splice(edits: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Tap:
    """A tap that applies `edits[site]` to the activations of each of its sites."""
    return lambda site, x: edits[site](x) if site in edits else x


def layer_of(site: str) -> int:
    """The block a site belongs to.

    Raises:
        ConfigError: it is not written as one.
    """
    match = re.match(r"blocks\.(\d+)\.", site)
    if not match:
        raise ConfigError("site", f"{site!r} is not a site; write one like 'blocks.0.hook_mlp_out'")
    return int(match[1])


def check(site: str, sites: Iterable[str], field: str) -> None:
    """Raises `ConfigError`, listing the sites, where `site` is none of them."""
    sites = list(sites)
    if site not in sites:
        raise ConfigError(field, f"{site!r} is not a site of this language model; {known_names(site, sites)}")
