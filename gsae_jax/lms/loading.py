"""A language model with its parameters and tokenizer, and what is asked of it."""

import dataclasses
import os
from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import errors
from gsae_jax.errors import UserError
from gsae_jax.lms import partition
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms.checkpoints import Checkpoint


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LM:
    """A language model: its Linen module, parameters and tokenizer.

    Attributes:
        path: the checkpoint directory.
        module: the Linen module; `module.apply({"params": params}, tokens_BxT, tap, mask_BxT)` gives logits.
        params: a nested dict of arrays.
        tokenizer: a `transformers` tokenizer.
    """

    path: str
    module: Any
    params: dict[str, Any]
    tokenizer: Any

    def __repr__(self) -> str:
        c, weights = self.config, jax.tree.leaves(self.params)
        blocks = f"{c.n_layers} block{'s' if c.n_layers > 1 else ''} of width {c.d_model}"
        sizes = f"{blocks}, {c.d_vocab} tokens, context {c.n_ctx}, {sum(x.size for x in weights):,} parameters"
        return f"<LM {os.path.basename(self.path)}: {sizes}, {weights[0].dtype}>"

    def __dir__(self) -> list[str]:
        """The public names."""
        return [name for name in super().__dir__() if not name.startswith("_")]

    @property
    def config(self) -> Any:
        """The family's Config."""
        return self.module.config

    @cached_property
    def sites(self) -> dict[str, int]:
        """The width of every site."""
        return site_widths(self.module)

    @cached_property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of BOS, EOS, padding and the tokenizer's other special tokens."""
        return special_tokens(self.tokenizer)

    def on(self, mesh: jax.sharding.Mesh) -> "LM":
        """The same model with its parameters in shards on a mesh."""
        flat = flax.traverse_util.flatten_dict(self.params)
        params = jax.device_put(flat, partition.shardings(flat, mesh))
        module = dataclasses.replace(self.module, mesh=mesh)
        return dataclasses.replace(self, module=module, params=flax.traverse_util.unflatten_dict(params))

    def logits(self, tokens_BxT: jax.typing.ArrayLike, mask_BxT: jax.typing.ArrayLike | None = None) -> jax.Array:
        """Logits [B, T, V], float32; `mask_BxT` is False (or 0) at padding, on whichever side."""
        self._check_head()
        tokens = self._tokens(tokens_BxT)
        return _logits(self.module, self.params, tokens, _mask(mask_BxT, tokens))

    def activations(
        self,
        tokens_BxT: jax.typing.ArrayLike,
        sites: Iterable[str],
        mask_BxT: jax.typing.ArrayLike | None = None,
    ) -> dict[str, jax.Array]:
        """Activations [B, T, D] at each of `sites`; `mask_BxT` is False (or 0) at padding."""
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        for site in sites:
            sites_lib.check(site, self.sites, "sites")
        tokens = self._tokens(tokens_BxT)
        return _activations(self.module, sites, self.params, tokens, _mask(mask_BxT, tokens))

    def run(
        self,
        tokens_BxT: jax.typing.ArrayLike,
        tap: sites_lib.Tap | sites_lib.Edit,
        mask_BxT: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] of a forward pass in which `tap(site, x_BxTxD)` may replace the activations of any site.

        Not compiled, so that a tap may look at values and keep them; wrap the call in `jax.jit` where it is repeated.

        Args:
            tokens_BxT: token ids.
            tap: returns an array of the same shape, or None to leave the activations as they are; or a trained SAE,
                whose reconstructions take the place of the activations at its own site.
            mask_BxT: False (or 0) at padding.

        Raises:
            UserError: tokens or a mask that do not fit, an SAE of another site, or a tap that returns another shape.
        """
        self._check_head()
        tokens = self._tokens(tokens_BxT)
        tap = sites_lib.as_tap(tap, self.sites)
        return self.module.apply({"params": self.params}, tokens, tap, _mask(mask_BxT, tokens))

    def _check_head(self) -> None:
        if not self.module.head:
            raise UserError("was given to load_lm, so there is no unembedding; load the whole model", "num_layers")

    def _tokens(self, tokens_BxT: jax.typing.ArrayLike) -> jax.Array:
        """Tokens [B, T], int32. Under `jax.jit` their shape is checked; their values are not known yet."""
        traced = isinstance(tokens_BxT, jax.core.Tracer)
        try:
            tokens: Any = tokens_BxT if traced else np.asarray(tokens_BxT)
        except ValueError as error:
            raise UserError("are rows of several lengths; pad them, and give the mask", "tokens") from error
        if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"are {tokens.dtype}{list(tokens.shape)}; give integers of shape [batch, tokens]", "tokens")
        if tokens.shape[1] > self.config.n_ctx:
            raise UserError(f"have {tokens.shape[1]} positions; this language model has {self.config.n_ctx}", "tokens")
        if not traced:
            check_tokens(tokens, self.config.d_vocab, "tokens")
        return jnp.asarray(tokens, jnp.int32)


def _mask(mask_BxT: jax.typing.ArrayLike | None, tokens_BxT: jax.Array) -> jax.Array | None:
    if mask_BxT is None:
        return None
    if jnp.shape(mask_BxT) != tokens_BxT.shape:
        raise UserError(
            f"has shape {list(jnp.shape(mask_BxT))}; write that of tokens, {list(tokens_BxT.shape)}", "mask"
        )
    return jnp.asarray(mask_BxT, bool)


@partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Any, tokens_BxT: jax.Array, mask_BxT: jax.Array | None) -> jax.Array:
    return module.apply({"params": params}, tokens_BxT, sites_lib.no_tap, mask_BxT)


@partial(jax.jit, static_argnums=(0, 1))
def _activations(
    module: Any, sites: tuple[str, ...], params: Any, tokens_BxT: jax.Array, mask_BxT: jax.Array | None
) -> dict[str, jax.Array]:
    return capture(module, params, tokens_BxT, sites, mask_BxT)


def capture(
    module: Any, params: Any, tokens_BxT: jax.Array, sites: Iterable[str], mask_BxT: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Activations [B, T, D] at `sites`, one forward pass for all; under jit, what they do not need is not computed."""
    activations: dict[str, jax.Array] = {}
    module.apply({"params": params}, tokens_BxT, sites_lib.capture(sites, activations), mask_BxT, method="hidden")
    return activations


def site_widths(module: Any) -> dict[str, int]:
    """The width of every site of a module, in the order they are computed."""
    widths: dict[str, int] = {}

    def tap(site: str, x: jax.Array) -> jax.Array:
        widths[site] = x.shape[-1]
        return x

    bare = dataclasses.replace(module, mesh=None)
    jax.eval_shape(lambda: bare.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), tap, method="hidden"))
    return widths


def load_lm(
    path: str | os.PathLike[str] = "",
    *,
    revision: str = "",
    dtype: str = "float32",
    num_layers: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    allow_nan: bool = False,
) -> LM:
    """A language model from a Hugging Face checkpoint; the embedded one by default.

    Args:
        path: a directory with `config.json`, safetensors weights (one file, or several with an index) and a tokenizer,
            or a hub name such as "EleutherAI/pythia-70m"; "" is the embedded model.
        revision: a hub name's branch, tag or commit.
        dtype: of parameters and activations, "float32" or "bfloat16".
        num_layers: load only so many blocks and no unembedding, for `activations` only.
        mesh: spread the parameters over its devices; by default they lie on the first device.
        allow_nan: load weights that are not all finite.

    Raises:
        UserError: not a checkpoint, an unsupported model, or weights that do not fit it (all of them listed).
    """
    with errors.about("path"):
        checkpoint = Checkpoint.open(path, revision)
        module = checkpoint.module(num_layers, mesh)
        tokenizer = checkpoint.tokenizer()
        return LM(str(checkpoint.folder), module, checkpoint.params(module, dtype, allow_nan), tokenizer)


def check_context(module: Any, context_length: int) -> None:
    """Raises `UserError` for rows of more tokens than a language model has positions for."""
    if context_length > module.config.n_ctx:
        raise UserError(
            f"is {context_length}; this language model has positions for {module.config.n_ctx}",
            "data.context_length",
        )


def check_tokens(tokens: np.ndarray, d_vocab: int, field: str) -> None:
    """Raises `UserError` for ids that the model has no embedding for."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < d_vocab:
        raise UserError(
            f"the token ids go from {tokens.min()} to {tokens.max()}; this language model has 0 to {d_vocab - 1}", field
        )


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS, padding and the tokenizer's other special tokens, in order."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_ids)))
