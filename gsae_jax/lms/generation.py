"""Text that a language model writes: keys and values are kept, so that each new token costs one token's computation."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import NamedSharding, PartitionSpec

from gsae_jax.errors import UserError
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms.transformer import Cache

EVERY = 16  # tokens between two reports to the bar, which leave the device
_bars: list[Any] = []  # those of the calls that are running


def compiled(
    module: Any, tap: sites_lib.Tap | sites_lib.Edit, sites: tuple[str, ...], count: int, with_bar: bool
) -> Callable[..., Any]:
    """`new_tokens` for one tap. A tap that is a pytree is compiled once for all values of its arrays.

    Raises:
        UserError: it is no tap, or a part of it that is not an array is not hashable.
    """
    sites_lib.as_tap(tap, sites)
    leaves, structure = jax.tree.flatten(tap)
    arrays = {number: leaf for number, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    others = tuple((number, leaf) for number, leaf in enumerate(leaves) if number not in arrays)
    for _, leaf in others:
        if not isinstance(leaf, Hashable):
            raise UserError(f"is a {type(leaf).__name__}, which is not hashable; give a function", "tap")
    if module.mesh is not None:  # arrays of one device go to those of the language model
        everywhere = NamedSharding(module.mesh, PartitionSpec())
        arrays = {
            number: array
            if isinstance(array, jax.Array) and array.sharding.device_set == everywhere.device_set
            else jax.device_put(array, everywhere)
            for number, array in arrays.items()
        }
    return partial(_compiled(module, structure, others, sites, count, with_bar), arrays)


@lru_cache(maxsize=8)
def _compiled(
    module: Any, structure: Any, others: tuple[tuple[int, Any], ...], sites: tuple[str, ...], count: int, with_bar: bool
) -> Callable[..., Any]:
    """`new_tokens`, jitted, for taps that differ in their arrays, which come first. The newest few are kept."""

    def function(arrays: dict[int, Any], *inputs: Any) -> jax.Array:
        leaves = [leaf for _, leaf in sorted([*arrays.items(), *others], key=lambda pair: pair[0])]
        tap = sites_lib.as_tap(jax.tree.unflatten(structure, leaves), sites)
        return new_tokens(module, tap, count, with_bar, *inputs)

    return jax.jit(function)


@contextlib.contextmanager
def bar(count: int, shown: bool) -> Iterator[None]:
    """A bar that shows how many of `count` tokens are written inside, if it takes longer than a second."""
    with tqdm.tqdm(total=count, desc="generate", unit="token", delay=1, leave=False, disable=not shown) as shown_bar:
        _bars.append(shown_bar)
        try:
            yield
        finally:
            jax.effects_barrier()  # reports may come later than the result
            _bars.remove(shown_bar)


def _report(step: jax.Array) -> None:
    for shown_bar in _bars:
        shown_bar.update(max(0, int(step) - shown_bar.n))


def new_tokens(
    module: Any,
    tap: sites_lib.Tap,
    count: int,
    with_bar: bool,
    params: Any,
    prompts: tuple[jax.Array, jax.Array],
    sampling: tuple[jax.Array, jax.Array],
    stop: jax.Array,
) -> jax.Array:
    """The tokens [B, count] that follow prompts.

    Args:
        module: the language model.
        tap: it sees the prompts [B, P, D] first, and then one new token [B, 1, D] at a time.
        count: how many tokens.
        with_bar: whether it reports to `bar` how many are written.
        params: of the language model.
        prompts: token ids [B, P], padded on the left, and a mask [B, P] that is False at padding.
        sampling: the temperature, where 0 takes the most likely token, and a random key.
        stop: a token after which all others of a row are this token; -1 for none.
    """
    (tokens_BxP, mask_BxP), (temperature, key) = prompts, sampling
    P = tokens_BxP.shape[1]
    mask_BxS = jnp.pad(mask_BxP, ((0, 0), (0, count)), constant_values=True)

    def following(variables: Any, tokens_BxT: jax.Array, first: Any, step: Any) -> tuple[jax.Array, Any]:
        """The token [B] after the last one, and the keys and values of all."""
        hidden, kept = module.apply(
            variables, tokens_BxT, tap, None, Cache(first, mask_BxS), method="hidden", mutable=["cache"]
        )
        logits_BxV = module.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]
        divisor = jnp.where(temperature > 0, temperature, 1)
        sampled_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BxV / divisor)
        chosen_B = jnp.where(temperature > 0, sampled_B, logits_BxV.argmax(-1))
        return chosen_B.astype(jnp.int32), kept["cache"]

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        step, written_BxN, _ = carry
        return (step < count) & ~(written_BxN == stop).any(1).all()

    def write(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, written_BxN, cache = carry
        if with_bar:
            jax.lax.cond(step % EVERY == 0, partial(jax.debug.callback, _report), lambda step: None, step)
        last_Bx1 = jax.lax.dynamic_slice_in_dim(written_BxN, step - 1, 1, axis=1)
        token_B, cache = following({"params": params, "cache": cache}, last_Bx1, P + step - 1, step)
        token_B = jnp.where(last_Bx1[:, 0] == stop, stop, token_B)
        return step + 1, jax.lax.dynamic_update_slice_in_dim(written_BxN, token_B[:, None], step, axis=1), cache

    token_B, cache = following({"params": params}, tokens_BxP, 0, 0)
    unwritten = jnp.full((len(tokens_BxP), count), -2, jnp.int32).at[:, 0].set(token_B)
    _, written_BxN, _ = jax.lax.while_loop(unfinished, write, (jnp.int32(1), unwritten, cache))
    return jnp.where(written_BxN == -2, stop, written_BxN)
