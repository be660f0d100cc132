"""The decoder-only transformer that every family is a setting of, with TransformerLens' names for parameters and sites.

Per block, sequential: x += attn(ln1(x)); x += mlp(ln2(x)). Norms may also follow attention and MLP, or follow only.
Parallel: x += attn(ln1(x)) + mlp(ln2(x)); there `hook_resid_mid` is the stream between the two additions, which the MLP
does not read (TransformerLens has none).

Shape suffixes: B batch, T tokens, D d_model, H heads, G key-value heads, K d_head, M d_mlp, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.lms import partition
from gsae_jax.lms.attention import Scores, attend, attend_kept
from gsae_jax.lms.experts import Experts, mixture
from gsae_jax.lms.sites import Tap, checked, no_tap

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
normal, ones, zeros = nn.initializers.normal, nn.initializers.ones, nn.initializers.zeros


# A number in a file must not fill the memory: layers are listed, a head's rotary frequencies, and the tensors of
# experts. In Hugging Face's names and ours.
MOST = {"n_layers": 1000, "num_hidden_layers": 1000, "n_layer": 1000, "d_head": 2**14, "head_dim": 2**14}
MOST |= dict.fromkeys(("num_experts", "num_local_experts"), 2**14)


def check_size(name: str, size: Any) -> None:
    """Raises `ValueError` for a size that no model can have."""
    most = MOST.get(name, 2**31 - 1)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
        raise ValueError(f"has {name} = {size!r}; it must be a whole number from 1 to {most}")


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ from block to block.

    Attributes:
        attention_scale: what scores are multiplied by before the soft-cap and the softmax.
        window: tokens that a token sees, itself included; 0 = all before it.
        frequencies: radians per position by which pairs of the first 2 * len(frequencies) dimensions of each query
            and key are turned; () = no rotary positions.
        rotary_scale: what the turned dimensions are multiplied by.
        long_frequencies: the frequencies in texts of more than `long_after` tokens (longrope); () = `frequencies`.
        long_after: see there.
        d_head, n_key_value_heads, d_mlp: instead of those that `Config` says; 0 = as it says.
        values_are_keys: values are the keys before their norm and rotation, or before the norm of values (Gemma 4).
        keys_from: the block whose keys and values are read; None: the layer's own (Gemma 4).
        experts: of its MLP; None: the MLP is dense.
    """

    attention_scale: float
    window: int = 0
    frequencies: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    long_after: int = 0
    d_head: int = 0
    n_key_value_heads: int = 0
    d_mlp: int = 0
    values_are_keys: bool = False
    keys_from: int | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers that no model can have."""
        if not (isinstance(self.window, int) and 0 <= self.window < 2**31):
            raise ValueError(f"gives a window of {self.window!r}; it must be from 1 to {2**31 - 1}, or absent")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; sizes have TransformerLens' names.

    Attributes:
        layers: one entry per block.
        n_ctx: the longest text, in tokens.
        normalization: LayerNorm with bias, or RMSNorm.
        norm_offset: RMSNorm multiplies by `norm_offset + w` (Gemma: 1).
        norm_before: normalise what attention and MLP read.
        norm_after: normalise what attention and MLP return (Gemma 2, 3 and 4, OLMo).
        parallel: attention and MLP read the same stream (Pythia).
        gated_mlp: activation(x @ W_gate) * (x @ W_in) instead of activation(x @ W_in).
        qk_norm: RMSNorm of every query and key head (Qwen 3, Gemma 3 and 4).
        qk_norm_whole: of all heads of a token together instead (OLMo).
        learned_positions: an embedding of each position is added to the tokens'.
        tied: the unembedding is the transposed embedding.
        embedding_scale: what embeddings are multiplied by (Gemma).
        attention_sinks: each head's softmax has one more score, of no token: its parameter `sinks` (GPT-OSS).
        attention_softcap, logit_softcap: c * tanh(x / c) on scores and logits; 0 = none (Gemma 2).
        v_norm: RMSNorm of every value head, without weights (Gemma 4).
        d_per_layer: width of what each block adds to the stream for the token itself; 0 = none (Gemma 4).
        block_scale: each block multiplies the stream that leaves it by a number (Gemma 4).
    """

    layers: tuple[Layer, ...]
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    activation: str
    norm_eps: float
    normalization: Literal["LN", "RMS"] = "RMS"
    norm_offset: float = 0.0
    norm_before: bool = True
    norm_after: bool = False
    parallel: bool = False
    gated_mlp: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_sinks: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    learned_positions: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    v_norm: bool = False
    d_per_layer: int = 0
    block_scale: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for sizes that no model can have."""
        for name in ("d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "n_layers"):
            check_size(name, getattr(self, name))
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"gives {self.norm_eps} as the epsilon of its norms; it must be positive")
        for heads in {self.n_key_value_heads, *(layer.n_key_value_heads for layer in self.layers)} - {0}:
            if self.n_heads % heads:
                raise ValueError(f"gives {self.n_heads} attention heads, not a multiple of its {heads} key-value heads")

    @property
    def n_layers(self) -> int:
        """How many blocks."""
        return len(self.layers)

    @property
    def dense(self) -> "Config":
        """With a dense MLP in place of the experts that a token uses. It has the same products but the routers'."""
        layers = (
            dataclasses.replace(layer, experts=None, d_mlp=layer.experts.experts_per_token * layer.experts.d_mlp)
            if layer.experts
            else layer
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def lengths(self) -> set[int]:
        """Numbers of tokens after which a text has other rotary frequencies."""
        return {layer.long_after for layer in self.layers if layer.long_frequencies}


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where the tokens of a call stand among the S places whose keys and values Flax's collection `cache` keeps.

    Attributes:
        first: the place of the call's first token.
        mask_BxS: False at padding, of all places.
    """

    first: jax.typing.ArrayLike
    mask_BxS: jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """What a block is called with beside the stream.

    Attributes:
        layer: its settings.
        positions_BxT: of the tokens; B is 1 without padding.
        lengths_B: tokens of each text without padding, those to come included; B is 1 without padding.
        mask_BxT: False at padding, or None.
        tap: called with the site's name within the block, and its activations.
        cache: where keys and values are kept for later calls; None: they are not.
        number: of the block.
        tokens_BxT: token ids.
        embedded_BxTxD: the stream that enters the first block.
        read: the keys and values that earlier blocks read, by their numbers; the block adds its own.
    """

    layer: Layer
    positions_BxT: jax.Array
    lengths_B: jax.Array
    mask_BxT: jax.Array | None
    tap: Tap
    cache: Cache | None
    number: int
    tokens_BxT: jax.Array
    embedded_BxTxD: jax.Array
    read: dict[int, tuple[jax.Array, jax.Array]]


class Part(nn.Module):
    """A module whose parameters lie in shards on `mesh` and are gathered where they are used."""

    config: Config
    mesh: Any

    def weight(self, name: str, init: Any, *shape: int) -> jax.Array:
        """A parameter, whole along the mesh's `data` axis."""
        return partition.gathered(name, self.param(name, init, shape), self.mesh)


class Norm(Part):
    """LayerNorm or RMSNorm over the last axis, in float32 whatever the dtype of the stream."""

    has_weights: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        c, axes = self.config, tuple(range(x.ndim - 1))
        y = x.astype(jnp.float32)
        if c.normalization == "LN":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.norm_eps)
        if self.has_weights:
            w = self.weight("w", zeros if c.norm_offset else ones, x.shape[-1]).astype(jnp.float32) + c.norm_offset
            y *= jnp.expand_dims(w, axes)
        if c.normalization == "LN":
            y += jnp.expand_dims(self.weight("b", zeros, x.shape[-1]).astype(jnp.float32), axes)
        return y.astype(x.dtype)


class Attention(Part):
    """Causal attention with grouped key-value heads; `hook_z` has the heads concatenated, as W_O reads them."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, layer = self.config, call.layer
        H, D, K, G = c.n_heads, c.d_model, layer.d_head or c.d_head, layer.n_key_value_heads or c.n_key_value_heads

        def project(name: str, heads: int) -> jax.Array:
            y = jnp.einsum("btd,hdk->bthk", x, self.weight(f"W_{name}", normal(D**-0.5), heads, D, K))
            return y + self.weight(f"b_{name}", zeros, heads, K)[None, None] if c.qkv_bias else y

        def placed(name: str, y: jax.Array) -> jax.Array:
            if c.qk_norm:
                whole = y.reshape(*x.shape[:2], -1) if c.qk_norm_whole else y
                y = Norm(c, self.mesh, name=name)(whole).reshape(y.shape)
            return rotate(y, call) if layer.frequencies else y

        q_BxTxHxK = placed("q_norm", project("Q", H))
        if layer.keys_from is None:
            k_BxTxGxK = project("K", G)
            v_BxTxGxK = k_BxTxGxK if layer.values_are_keys else project("V", G)
            k_BxTxGxK = placed("k_norm", k_BxTxGxK)
            if c.v_norm:
                v_BxTxGxK = Norm(c, self.mesh, has_weights=False, name="v_norm")(v_BxTxGxK)
            if call.cache is not None:
                k_BxTxGxK, v_BxTxGxK = self._kept("k", k_BxTxGxK, call.cache), self._kept("v", v_BxTxGxK, call.cache)
            call.read[call.number] = k_BxTxGxK, v_BxTxGxK
        else:
            k_BxTxGxK, v_BxTxGxK = call.read[layer.keys_from]
        sinks_H = self.weight("sinks", zeros, H) if c.attention_sinks else None
        scores = Scores(layer.window, layer.attention_scale, c.attention_softcap, sinks_H)
        if call.cache is None:
            z = attend(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, call.mask_BxT, scores, self.mesh)
        else:
            places = call.cache.first, call.cache.mask_BxS
            z = attend_kept(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, *places, scores)
        z = z.reshape(*x.shape[:2], H * K)
        W_O = self.weight("W_O", normal((H * K * 2 * c.n_layers) ** -0.5), H, K, D)
        out = call.tap("attn.hook_z", z) @ W_O.reshape(H * K, D)
        return out + self.weight("b_O", zeros, D)[None, None] if c.attention_out_bias else out

    def _kept(self, name: str, y_BxTxGxK: jax.Array, cache: Cache) -> jax.Array:
        """The keys or values [B, S, G, K] of all places, those of this call among them."""
        B, _, G, K = y_BxTxGxK.shape
        kept = self.variable("cache", name, jnp.zeros, (B, cache.mask_BxS.shape[1], G, K), y_BxTxGxK.dtype)
        kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, y_BxTxGxK, cache.first, axis=1)
        return kept.value


class MLP(Part):
    """W_out @ activation(W_in @ x), or gated."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        D, M, activation = c.d_model, call.layer.d_mlp or c.d_mlp, ACTIVATIONS[c.activation]

        def affine(x: jax.Array, suffix: str, std: float, *shape: int) -> jax.Array:
            y = x @ self.weight(f"W_{suffix}", normal(std), *shape)
            return y + self.weight(f"b_{suffix}", zeros, shape[-1])[None, None] if c.mlp_bias else y

        y = affine(x, "in", D**-0.5, D, M)
        y = activation(affine(x, "gate", D**-0.5, D, M)) * y if c.gated_mlp else activation(y)
        return affine(call.tap("mlp.hook_post", y), "out", (M * 2 * c.n_layers) ** -0.5, M, D)


class PerToken(Part):
    """What Gemma 4 adds to the stream for the token itself, after its MLP: a gate, which the stream opens, times an
    embedding of the token that the block has for itself and a projection of the model's."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, mesh = self.config, self.mesh
        D, P = c.d_model, c.d_per_layer
        W_E = self.param("W_E", normal(0.5 * P**-0.5), (c.d_vocab, P))
        own = partition.lookup(W_E, call.tokens_BxT, mesh) * jnp.asarray(P**0.5, x.dtype)
        context = call.embedded_BxTxD @ self.weight("W_context", normal(D**-0.5), D, P) * D**-0.5
        value = (Norm(c, mesh, name="norm")(context) + own) * 0.5**0.5
        gate = ACTIVATIONS[c.activation](x @ self.weight("W_gate", normal(D**-0.5), D, P))
        return (gate * value) @ self.weight("W_out", normal((P * 2 * c.n_layers) ** -0.5), P, D)


class ExpertsMLP(Part):
    """An MLP with experts (`experts.mixture`). It has no site `mlp.hook_post`: its neurons are not one array."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, experts = self.config, call.layer.experts
        assert experts is not None
        D, E, M = c.d_model, experts.n_experts, experts.d_mlp
        W_router = self.weight("W_router", normal(D**-0.5), D, E)
        logits = jnp.matmul(x, W_router, preferred_element_type=jnp.float32)
        weights = {
            "W_gate": self.weight("W_gate", normal(D**-0.5), E, D, M),
            "W_in": self.weight("W_in", normal(D**-0.5), E, D, M),
            "W_out": self.weight("W_out", normal((M * 2 * c.n_layers) ** -0.5), E, M, D),
        }
        if experts.bias:
            logits += self.weight("b_router", zeros, E).astype(jnp.float32)[None, None]
            weights |= {f"b_{name}": self.weight(f"b_{name}", zeros, E, M) for name in ("gate", "in")}
            weights["b_out"] = self.weight("b_out", zeros, E, D)
        return mixture(x, logits, weights, experts, ACTIVATIONS[c.activation], self.mesh)


class Block(Part):
    """Attention and MLP, each normalised before or after or both, and added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, mesh, tap = self.config, self.mesh, call.tap

        def norm(name: str, x: jax.Array, present: bool = True) -> jax.Array:
            return Norm(c, mesh, name=name)(x) if present else x

        x = tap("hook_resid_pre", x)
        attention = Attention(c, mesh, name="attn")(norm("ln1", x, c.norm_before), call)
        attention = tap("hook_attn_out", norm("ln1_post", attention, c.norm_after))
        mid = tap("hook_resid_mid", x + attention)
        mlp_input = x if c.parallel else mid
        if c.norm_before:
            mlp_input = tap("ln2.hook_normalized", norm("ln2", mlp_input))
        mlp = (ExpertsMLP if call.layer.experts else MLP)(c, mesh, name="mlp")(mlp_input, call)
        mlp = tap("hook_mlp_out", norm("ln2_post", mlp, c.norm_after))
        x = mid + mlp
        if c.d_per_layer:
            x += norm("token_post", PerToken(c, mesh, name="token")(x, call))
        if c.block_scale:
            x *= self.weight("scale", ones, 1)[None, None]
        return tap("hook_resid_post", partition.rows(x, mesh))


class Model(nn.Module):
    """`hidden` runs the blocks and `logits` reads them out; with `head=False` the model ends after its last block.

    Attributes:
        mesh: where the parameters lie in shards (`partition`); None: on one device.
    """

    config: Config
    head: bool = True
    mesh: Any = None

    def setup(self) -> None:
        """Parameters under TransformerLens' names."""
        c = self.config
        self.W_E = self.param("embed.W_E", normal(0.5 * c.d_model**-0.5), (c.d_vocab, c.d_model))
        if c.learned_positions:
            self.W_pos = self.param("pos_embed.W_pos", normal(0.1 * c.d_model**-0.5), (c.n_ctx, c.d_model))
        self.blocks = [Block(c, self.mesh, name=f"blocks.{layer}") for layer in range(c.n_layers)]
        if self.head:
            self.ln_final = Norm(c, self.mesh, name="ln_final")
            if not c.tied:
                self.W_U = self.param("unembed.W_U", normal(c.d_model**-0.5), (c.d_model, c.d_vocab))
            if c.unembed_bias:
                self.b_U = self.param("unembed.b_U", zeros, (c.d_vocab,))

    def hidden(
        self,
        tokens_BxT: jax.Array,
        tap: Tap = no_tap,
        mask_BxT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> jax.Array:
        """The residual stream [B, T, D] after the last block.

        Args:
            tokens_BxT: token ids.
            tap: called with every site's name and activations (`gsae_jax.lms.sites`).
            mask_BxT: False at padding, which nothing attends to; positions count the other tokens.
            cache: where these tokens continue those of earlier calls; it has the mask then.
        """
        c, tap, T = self.config, checked(tap), tokens_BxT.shape[1]
        mask = mask_BxT if cache is None else cache.mask_BxS
        positions_BxT = jnp.arange(T)[None] if mask is None else jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        lengths_B = jnp.full(1, T) if mask is None else mask.sum(1)
        if cache is not None:
            positions_BxT = jax.lax.dynamic_slice_in_dim(positions_BxT, cache.first, T, axis=1)
        x = partition.lookup(self.W_E, tokens_BxT, self.mesh)
        x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.learned_positions:
            x += partition.gathered("W_pos", self.W_pos, self.mesh)[positions_BxT]
        embedded, read = x, dict[int, tuple[jax.Array, jax.Array]]()
        for number, (block, layer) in enumerate(zip(self.blocks, c.layers, strict=True)):
            own_tap = _prefixed(tap, f"blocks.{number}.")
            place = positions_BxT, lengths_B, mask_BxT
            x = block(x, Call(layer, *place, own_tap, cache, number, tokens_BxT, embedded, read))
        return x

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Logits [B, T, V], float32, of a residual stream."""
        c = self.config
        W_U = self.W_E.T if c.tied else self.W_U
        W_U = partition.gathered("W_U", W_U, self.mesh)
        logits = jnp.matmul(self.ln_final(x_BxTxD), W_U, preferred_element_type=jnp.float32)
        if c.unembed_bias:
            logits += self.b_U[None, None]
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap) if c.logit_softcap else logits

    def __call__(self, tokens_BxT: jax.Array, tap: Tap = no_tap, mask_BxT: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V], float32, of token ids [B, T]."""
        return self.logits(self.hidden(tokens_BxT, tap, mask_BxT))


def rotate(x_BxTxHxK: jax.Array, call: Call) -> jax.Array:
    """Rotary positions: dimensions i and i + R of the first 2R are turned by positions * frequencies[i]."""
    layer, R = call.layer, len(call.layer.frequencies)
    frequencies = jnp.array(layer.frequencies, jnp.float32)[None, None, None]
    if layer.long_frequencies:
        is_long = call.lengths_B[:, None, None, None] > layer.long_after
        frequencies = jnp.where(is_long, jnp.array(layer.long_frequencies, jnp.float32)[None, None, None], frequencies)
    angles = call.positions_BxT[..., None, None] * frequencies
    cos, sin = layer.rotary_scale * jnp.cos(angles), layer.rotary_scale * jnp.sin(angles)
    a, b, rest = jnp.split(x_BxTxHxK, (R, 2 * R), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(y.astype(x_BxTxHxK.dtype) for y in turned), rest], axis=-1)


def _prefixed(tap: Tap, prefix: str) -> Tap:
    return lambda site, x: tap(prefix + site, x)
