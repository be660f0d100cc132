"""A language model with its parameters and tokenizer, and what is asked of it."""

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import batching, errors, processes
from gsae_jax import config as config_lib
from gsae_jax.config import INT32
from gsae_jax.errors import UserError
from gsae_jax.lms import generation, partition, readout
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.checkpoints import Checkpoint, about_other
from gsae_jax.lms.loss import cross_entropy

TOKENS_PER_FORWARD = 2**14  # rows of more tokens than this are computed in several batches
SHORTEST = 16  # shorter rows are padded to this length
Inputs = jax.typing.ArrayLike | str | Iterable[str] | tokenizer_lib.Tokens  # token ids, or texts, or as tokenized


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LM:
    """A language model: its Linen module, parameters and tokenizer.

    Methods that take tokens accept integers [B, T], one text, several texts, or the result of `tokenize`. They
    tokenize texts with `tokenize`.

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
        sizes = f"{blocks}, vocabulary {c.d_vocab}, context {c.n_ctx}, {sum(x.size for x in weights):,} parameters"
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
        """The same model with its parameters sharded over a mesh."""
        flat = flax.traverse_util.flatten_dict(self.params)
        params = jax.device_put(flat, partition.shardings(flat, mesh))
        module = dataclasses.replace(self.module, mesh=mesh)
        return dataclasses.replace(self, module=module, params=flax.traverse_util.unflatten_dict(params))

    def tokenize(self, texts: str | Iterable[str], *, prepend_bos: bool = True) -> tokenizer_lib.Tokens:
        """The tokens of texts, as `tokens_BxT` and `mask_BxT`. Every method that takes tokens calls this for texts.

        Shorter texts are padded on the right.

        Args:
            texts: one text or several.
            prepend_bos: whether each text gets a BOS token, if the tokenizer has one and the text does not begin with
                it. SAEs of a run with `data.prepend_bos=False` have seen no BOS.

        Raises:
            UserError: `texts` is not a string or several strings, or a text has no tokens.
        """
        strings = tokenizer_lib.as_texts(texts)
        if strings is None:
            raise UserError(f"are of type {type(texts).__name__}; give a string, or several in a list", "texts")
        return tokenizer_lib.padded(tokenizer_lib.tokenize(self.tokenizer, strings, prepend_bos))

    def logits(
        self,
        tokens_BxT: Inputs,
        mask_BxT: jax.typing.ArrayLike | None = None,
        *,
        rows_per_forward: int | None = None,
    ) -> jax.Array:
        """Logits [B, T, V], float32; 0 at padding.

        Args:
            tokens_BxT: token ids, texts, or the result of `tokenize`.
            mask_BxT: False (or 0) at padding, on either side. Texts and the result of `tokenize` need no mask.
            rows_per_forward: rows in one forward pass; the default gives about 16,000 tokens.
        """
        self._check_head()
        return self._forward(partial(_logits, self.module, self.params), tokens_BxT, mask_BxT, rows_per_forward)

    def activations(
        self,
        tokens_BxT: Inputs,
        sites: Iterable[str],
        mask_BxT: jax.typing.ArrayLike | None = None,
        *,
        rows_per_forward: int | None = None,
    ) -> dict[str, jax.Array]:
        """Activations [B, T, D] at each of `sites`; 0 at padding.

        The features of an SAE are not 0 for these zeros. `lm.tokenize(texts).mask_BxT` is False at padding.

        Args:
            tokens_BxT: token ids, texts, or the result of `tokenize`.
            sites: names of one or several of `lm.sites`.
            mask_BxT: False (or 0) at padding, on either side. Texts and the result of `tokenize` need no mask.
            rows_per_forward: rows in one forward pass; the default gives about 16,000 tokens.
        """
        errors.check_kind(sites, Iterable, "sites", "names of sites")
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        for site in sites:
            errors.check_kind(site, str, "sites", "names of sites")
            sites_lib.check(site, self.sites, "sites")
        return self._forward(
            partial(_activations, self.module, sites, self.params), tokens_BxT, mask_BxT, rows_per_forward
        )

    def run(
        self,
        tokens_BxT: Inputs,
        tap: sites_lib.Tap | sites_lib.Edit,
        mask_BxT: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] of a forward pass in which `tap(site, x_BxTxD)` may replace the activations of any site.

        Logits at padding are 0. The tap also gets activations at padding.

        The forward pass is not compiled, so that a tap may inspect values and store them. It computes all rows at once.
        For speed, compile a function of token ids: `jax.jit(lambda tokens: lm.run(tokens, tap))`.

        An SAE as the tap also replaces activations of special tokens and above `sae.norm_limit`, on which it was not
        trained. Therefore a loss from these logits differs from the report's.

        Args:
            tokens_BxT: token ids, texts, or the result of `tokenize`.
            tap: a function that returns an array of the same shape, or None to keep the activations; or a trained SAE,
                whose reconstructions replace the activations at its target, by default the site that it reads.
            mask_BxT: False (or 0) at padding.

        Raises:
            UserError: tokens or a mask that do not fit, an SAE of another site or of several targets, or a tap that
                returns another shape.
        """
        logits, _, mask = self._tapped("__call__", tokens_BxT, tap, mask_BxT)
        return _unless_padding(mask, logits)

    def loss(
        self,
        tokens_BxT: Inputs,
        tap: sites_lib.Tap | sites_lib.Edit | None = None,
        mask_BxT: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Cross-entropy [B, T-1] of each token given those before it, in nats; 0 where one of the two is padding.

        It is computed as `run` computes logits, but without the logits of all tokens in memory at once.

        Args:
            tokens_BxT: token ids, texts, or the result of `tokenize`; two tokens or more in a row.
            tap: as for `run`; by default the activations are kept.
            mask_BxT: False (or 0) at padding.

        Raises:
            UserError: as `run`, or rows of one token.
        """
        stream, tokens, mask = self._tapped("hidden", tokens_BxT, sites_lib.no_tap if tap is None else tap, mask_BxT)
        if tokens.shape[1] < 2:
            raise UserError("have one position, and the first token has no loss; give two or more", "tokens")
        nats = cross_entropy(self.module, self.params, stream, jnp.asarray(tokens))
        return nats if mask is None else jnp.where(mask[:, 1:] & mask[:, :-1], nats, 0)

    def _tapped(self, method: str, tokens: Any, tap: Any, mask: Any) -> tuple[jax.Array, Any, Any]:
        """(what a method of the module returns with a tap, the tokens, the mask)."""
        self._check_head()
        if callable(mask):
            raise UserError("is a function; give `taps.chain(a, b)` as the tap to combine two taps", "mask")
        tokens, mask = self._inputs(tokens, mask)
        tap = sites_lib.as_tap(tap, self.sites)
        needed = self._needed(mask, tokens.shape[1])
        return self.module.apply({"params": self.params}, jnp.asarray(tokens), tap, needed, method=method), tokens, mask

    def generate(
        self,
        texts: str | Iterable[str],
        tap: sites_lib.Tap | sites_lib.Edit = sites_lib.no_tap,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        prepend_bos: bool = True,
    ) -> str | list[str]:
        """Each text with its continuation, up to EOS. One string gives one string; a list gives a list.

        All texts are computed in one batch; give fewer texts if memory runs out.

        Args:
            texts: prompts. `tokenize` converts them to tokens.
            tap: as for `run`. It first gets the activations of whole prompts, padded on the left, and then those of one
                token at a time. It is compiled: it cannot inspect or store values. Use the same function for several
                calls: a new one is compiled again, as are a new `max_new_tokens` and some prompt lengths. Taps that are
                pytrees, such as an SAE and those of `gsae_jax.taps`, are compiled again only if their structure
                differs, and not for another feature or strength.
            max_new_tokens: the largest number of tokens that a text is continued by.
            temperature: logits are divided by it before a token is sampled. 0 chooses the most likely token.
            seed: seed of the sampling.
            prepend_bos: as for `tokenize`.

        Raises:
            UserError: `texts` is not text, a number is out of range, or prompts and new tokens exceed the context.
        """
        self._check_head()
        prompts = tokenizer_lib.as_texts(texts)
        if prompts is None:
            raise UserError(f"are of type {type(texts).__name__}; give a string, or several in a list", "texts")
        errors.check_kind(max_new_tokens, numbers.Integral, "max_new_tokens", "a whole number")
        errors.check_kind(seed, numbers.Integral, "seed", "a whole number")
        errors.check_kind(temperature, numbers.Real | jax.Array, "temperature", "a number")
        if abs(seed) > INT32:
            raise UserError(f"is {seed}; write a whole number up to {INT32} in size", "seed")
        if max_new_tokens < 1:
            raise UserError(f"is {max_new_tokens}; write a whole number from 1 on", "max_new_tokens")
        if not 0 <= temperature < math.inf:
            raise UserError(f"is {temperature}; write 0 or a positive number", "temperature")
        ids = tokenizer_lib.tokenize(self.tokenizer, prompts, prepend_bos)
        longest, most = max(map(len, ids)), self.config.n_ctx - max_new_tokens
        if longest > most:
            why = f"{max_new_tokens} more tokens exceed the {self.config.n_ctx} positions of this language model"
            raise UserError(f"have up to {longest} tokens; {why}", "texts")
        for limit in self.config.lengths:
            if any(len(row) <= limit < len(row) + max_new_tokens for row in ids):
                why = (
                    f"this language model has other rotary frequencies for texts of more than {limit} tokens (longrope)"
                )
                how = f"continue texts up to {limit} tokens, or texts that are longer already"
                raise UserError(f"is {max_new_tokens}, but {why}; {how}", "max_new_tokens")
        length = min(batching.padded_size(max(longest, SHORTEST)), most)
        rows = batching.padded_size(len(ids))
        tokens, mask = tokenizer_lib.padded(ids + ids[-1:] * (rows - len(ids)), length, left=True)
        eos = self.tokenizer.eos_token_id
        with_bar = processes.shows_bars()
        function = generation.compiled(self.module, tap, tuple(self.sites), max_new_tokens, with_bar)
        sampling = jnp.float32(temperature), jax.random.key(seed)
        stop = jnp.int32(-1 if eos is None else eos)
        with generation.bar(max_new_tokens, with_bar):
            new = function(self.params, (self._tokens(tokens), mask), sampling, stop)[: len(ids)].tolist()
        written = [own + (row[: row.index(eos)] if eos in row else row) for own, row in zip(ids, new, strict=True)]
        # Some tokenizers drop the space before the first word, so that new tokens are decoded behind the prompt's.
        decode = self.tokenizer.decode
        done = [
            text + decode(whole)[len(decode(own)) :] for text, own, whole in zip(prompts, ids, written, strict=True)
        ]
        return done[0] if isinstance(texts, str) else done

    def logit_effects(
        self, directions: jax.typing.ArrayLike, site: str = "", at: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """The direct effects [..., V] on all logits of adding directions to the activations of a site, float32.

        The direct effect is the path through the residual stream to the last norm, without the later blocks:
        `lm.logit_effects(sae.W_dec[feature], sae.targets[-1])`.

        By default it is `(d * w) @ W_U`. d is the direction, minus its mean if the last norm is a LayerNorm. w is the
        gain of this norm (1 + w in Gemma). W_U is the unembedding (the transposed embedding if they are tied). The
        norm's division, a soft-cap of the logits and biases are left out. The division would scale all effects equally.
        The soft-cap would keep their signs but not their sizes. In Gemma 4, the numbers that blocks multiply the stream
        by are included, and what they add for each token is left out.

        With `at`, it is the exact derivative of the logits along d, if the residual stream after the last block is
        `at`. It includes the norm's division and the soft-cap.

        Args:
            directions: [..., width of the site], such as some rows of `sae.W_dec`.
            site: where they are added; "" is the residual stream. Directions of `attn.hook_z` and `mlp.hook_post` are
                first multiplied by W_O and W_out.
            at: [D], for example `lm.activations(text, site)[site][0, -1]`, where `site` is the `hook_resid_post` of the
                last block.

        Raises:
            UserError: an unknown site, arrays of wrong shapes, or a norm or an MLP between the site and the residual
                stream.
        """
        self._check_head()
        if site:
            sites_lib.check(site, self.sites, "site")
        width = self.sites[site] if site else self.config.d_model
        array = readout.to_stream(self.module, self.params, readout.checked(directions, width, "directions"), site)
        if at is None:
            return readout.direct_effects(self.module, self.params, array)
        stream = readout.checked(at, self.config.d_model, "at")
        if stream.ndim != 1:
            raise UserError(f"has shape {list(stream.shape)}; give the activations [D] of one token", "at")
        return readout.derivatives(self.module, self.params, array, stream)

    def _check_head(self) -> None:
        if not self.module.head:
            raise UserError("was given to load_lm, so there is no unembedding; load the whole model", "num_layers")

    def _forward(self, function: Callable[..., Any], tokens: Any, mask: Any, rows_per_forward: int | None) -> Any:
        """`function(tokens, needed mask, mask)` in batches, and in few shapes unless a shape is compiled anyway."""
        if callable(mask):
            raise UserError("is a function; use `run`, which takes a tap (`taps.read` stores activations)", "mask")
        tokens, mask = self._inputs(tokens, mask)
        needed = self._needed(mask, tokens.shape[1])
        if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
            return function(tokens, needed, mask)
        if rows_per_forward is not None and rows_per_forward < 1:
            raise UserError(f"is {rows_per_forward}; write a whole number from 1 on", "rows_per_forward")
        B, T = tokens.shape
        length = min(batching.padded_size(max(T, SHORTEST)), self.config.n_ctx)
        at_once = rows_per_forward or max(1, TOKENS_PER_FORWARD // length)
        rows = max(B, min(at_once, batching.padded_size(B)))
        if needed is None and length > T:  # what is added to the rows is padding
            needed = self._needed(np.ones((B, T), bool) if mask is None else mask, length)
        inputs = jax.tree.map(lambda x: batching.pad(x, rows - B, length - T), (tokens, needed, mask))
        results = batching.in_batches(lambda batch: function(*batch), inputs, at_once, "forward passes")
        return results if (rows, length) == (B, T) else jax.tree.map(lambda y: y[:B, :T], results)

    def _needed(self, mask: Any, length: int) -> Any:
        """The mask for the forward pass: none if all padding is on the right, where no other token attends to it.

        If rows of this length may have other rotary frequencies than shorter ones, the mask says how long each text is.
        """
        if mask is None or isinstance(mask, jax.core.Tracer) or not (mask[:, :-1] >= mask[:, 1:]).all():
            return mask
        return mask if any(length > most for most in self.config.lengths) else None

    def _inputs(self, tokens: Any, mask: Any) -> tuple[Any, Any]:
        """Tokens [B, T], int32, and the mask [B, T] or None. Under `jax.jit` values are not checked."""
        texts = tokenizer_lib.as_texts(tokens)
        if texts is not None:
            if mask is not None:
                raise UserError("is given together with texts, whose padding is known; leave it out", "mask")
            tokens = self.tokenize(texts)
        if isinstance(tokens, tokenizer_lib.Tokens):
            if mask is not None:
                why = "is given, but `tokenize` returns the tokens with their mask"
                raise UserError(f"{why}; leave it out, or give `.tokens_BxT` and this mask", "mask")
            tokens, mask = tokens
            # Without padding, no mask goes into the forward pass. Under `jax.jit` it is not known whether there is any.
            mask = None if not isinstance(mask, jax.core.Tracer) and np.all(mask) else mask
        tokens = self._tokens(tokens)
        if mask is None:
            return tokens, None
        if jnp.shape(mask) != tokens.shape:
            raise UserError(f"has shape {list(jnp.shape(mask))}; write that of tokens, {list(tokens.shape)}", "mask")
        return tokens, mask.astype(bool) if isinstance(mask, jax.core.Tracer) else np.asarray(mask, bool)

    def _tokens(self, tokens_BxT: Any) -> Any:
        """Tokens [B, T], int32. Under `jax.jit` their shape is checked; their values are not known yet."""
        traced = isinstance(tokens_BxT, jax.core.Tracer)
        try:
            tokens: Any = tokens_BxT if traced else np.asarray(tokens_BxT)
        except ValueError as error:
            raise UserError("are rows of several lengths; pad them, and give the mask", "tokens") from error
        if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"are {tokens.dtype}{list(tokens.shape)}; give integers of shape [batch, tokens]", "tokens")
        if tokens.shape[1] > self.config.n_ctx:
            most = self.config.n_ctx
            what = f"have {tokens.shape[1]} positions; this language model has {most}"
            raise UserError(f"{what}. Give shorter texts, or rows of at most {most} tokens", "tokens")
        if not traced:
            check_tokens(tokens, self.config.d_vocab, "tokens")
        return tokens.astype(jnp.int32)


def _unless_padding(mask_BxT: jax.Array | None, y: jax.Array) -> jax.Array:
    return y if mask_BxT is None else jnp.where(mask_BxT[..., None], y, 0)


@partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Any, tokens_BxT: jax.Array, needed: jax.Array | None, mask: Any) -> jax.Array:
    return _unless_padding(mask, module.apply({"params": params}, tokens_BxT, sites_lib.no_tap, needed))


@partial(jax.jit, static_argnums=(0, 1))
def _activations(
    module: Any, sites: tuple[str, ...], params: Any, tokens_BxT: jax.Array, needed: jax.Array | None, mask: Any
) -> dict[str, jax.Array]:
    activations = capture(module, params, tokens_BxT, sites, needed)
    return {site: _unless_padding(mask, x) for site, x in activations.items()}


def capture(
    module: Any, params: Any, tokens_BxT: jax.Array, sites: Iterable[str], mask_BxT: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Activations [B, T, D] at `sites`, one forward pass for all; under jit, what they do not need is not computed."""
    activations: dict[str, jax.Array] = {}
    module.apply({"params": params}, tokens_BxT, sites_lib.capture(sites, activations), mask_BxT, method="hidden")
    return activations


def capture_each(
    modules: Iterable[tuple[str, Any]], params: Mapping[str, Any], tokens_BxT: jax.Array, sites: Iterable[str]
) -> dict[str, jax.Array]:
    """Activations [B, T, D] at sites of several language models, one forward pass of each model that has one of them.

    Args:
        modules: (name, module) of each; "" is the name of the first, whose sites have no @.
        params: by name.
        tokens_BxT: the tokens.
        sites: names as `sites.at` writes them.
    """
    activations: dict[str, jax.Array] = {}
    for name, module in modules:
        own = [hook for hook, of in map(sites_lib.parts, sites) if of == name]
        of_model = capture(module, params[name], tokens_BxT, own) if own else {}
        activations |= {sites_lib.at(hook, name): x for hook, x in of_model.items()}
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
            or a hub name such as "EleutherAI/pythia-70m". "" is the embedded model.
        revision: branch, tag or commit of a hub name.
        dtype: type of parameters and activations, "float32" or "bfloat16".
        num_layers: load only the first `num_layers` blocks and no unembedding. Then only `LM.activations` works.
        mesh: shard the parameters over its devices. By default they are on the first device.
        allow_nan: accept weights that are not finite.

    Raises:
        UserError: `path` is not a checkpoint, the model is not supported, or weights are wrong (all are listed).
    """
    errors.check_kind(path, str | os.PathLike, "path", "a directory or a hub name")
    with errors.about("path"):
        checkpoint = Checkpoint.open(path, revision)
        module = checkpoint.module(num_layers, mesh)
        tokenizer = checkpoint.tokenizer()
        return LM(str(checkpoint.folder), module, checkpoint.params(module, dtype, allow_nan), tokenizer)


def load_others(lms: Mapping[str, config_lib.LM], first: LM, mesh: jax.sharding.Mesh | None = None) -> dict[str, LM]:
    """The language models of `Experiment.lms`, beside the first one; raises `UserError` as `load_lm`, and as
    `tokenizer.check_same`."""
    loaded = {}
    for name, lm in lms.items():
        with about_other(name):
            loaded[name] = load_lm(lm.path, revision=lm.revision, dtype=lm.dtype, mesh=mesh)
            tokenizer_lib.check_same(first.tokenizer, loaded[name].tokenizer, (first.path, loaded[name].path))
    return loaded


def check_context(module: Any, context_length: int, name: str = "") -> None:
    """Raises `UserError` for rows of more tokens than a language model has positions for.

    `name`: of a model other than the first.
    """
    if context_length > module.config.n_ctx:
        which = f"the language model {name!r}" if name else "this language model"
        raise UserError(
            f"is {context_length}; {which} has positions for {module.config.n_ctx}",
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


def special_tokens_of(first: LM, others: Mapping[str, LM]) -> tuple[int, ...]:
    """`special_tokens` of all these language models' tokenizers."""
    return tuple(sorted({*first.special_tokens}.union(*(lm.special_tokens for lm in others.values()))))
