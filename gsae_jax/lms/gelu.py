"""TransformerLens' small pre-LayerNorm transformers: GELU-1L and its kin, the first model of the paper (section 4.1).

Per block: x += attn(ln1(x)); x += mlp(ln2(x)), with a GELU MLP, learned positions and untied embeddings.
Names of settings, parameters and sites are TransformerLens'.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from gsae_jax.lms.sites import Tap, no_tap

MODEL_TYPES = ("gelu",)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of `config.json`."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    layer_norm_eps: float = 1e-5


class LayerNorm(nn.Module):
    """Normalisation in float32, whatever the dtype of the stream."""

    eps: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        D = x_BxTxD.shape[-1]
        w, b = self.param("w", nn.initializers.ones, (D,)), self.param("b", nn.initializers.zeros, (D,))
        x = x_BxTxD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x.astype(x_BxTxD.dtype) * w[None, None] + b[None, None]


class Attention(nn.Module):
    """Causal multi-head attention; `hook_z` has the heads concatenated, as W_O reads them."""

    config: Config

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, tap: Tap, prefix: str) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `prefix` names the block in its sites."""
        c = self.config
        H, D, K = c.n_heads, c.d_model, c.d_head
        into = nn.initializers.normal(D**-0.5)
        q, k, v = (
            jnp.einsum("btd,hdk->bthk", x_BxTxD, self.param(f"W_{name}", into, (H, D, K)))
            + self.param(f"b_{name}", nn.initializers.zeros, (H, K))[None, None]
            for name in "QKV"
        )
        z_BxTxHxK = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        z = tap(f"{prefix}.attn.hook_z", z_BxTxHxK.reshape(*x_BxTxD.shape[:2], H * K))
        W_O = self.param("W_O", nn.initializers.normal((H * K) ** -0.5 * (2 * c.n_layers) ** -0.5), (H, K, D))
        return z @ W_O.reshape(H * K, D) + self.param("b_O", nn.initializers.zeros, (D,))[None, None]


class MLP(nn.Module):
    """W_out @ GELU(W_in @ x), with the exact GELU."""

    config: Config

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, tap: Tap, prefix: str) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `prefix` names the block in its sites."""
        D, M, L = self.config.d_model, self.config.d_mlp, self.config.n_layers
        W_in = self.param("W_in", nn.initializers.normal(D**-0.5), (D, M))
        hidden = jax.nn.gelu(
            x_BxTxD @ W_in + self.param("b_in", nn.initializers.zeros, (M,))[None, None], approximate=False
        )
        W_out = self.param("W_out", nn.initializers.normal(M**-0.5 * (2 * L) ** -0.5), (M, D))
        return (
            tap(f"{prefix}.mlp.hook_post", hidden) @ W_out
            + self.param("b_out", nn.initializers.zeros, (D,))[None, None]
        )


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the stream."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap, prefix: str) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `prefix` names the block in its sites."""
        eps = self.config.layer_norm_eps
        x = tap(f"{prefix}.hook_resid_pre", x)
        attention = Attention(self.config, name="attn")(LayerNorm(eps, name="ln1")(x), tap, prefix)
        x = tap(f"{prefix}.hook_resid_mid", x + tap(f"{prefix}.hook_attn_out", attention))
        mlp = MLP(self.config, name="mlp")(LayerNorm(eps, name="ln2")(x), tap, prefix)
        return tap(f"{prefix}.hook_resid_post", x + tap(f"{prefix}.hook_mlp_out", mlp))


class Model(nn.Module):
    """`hidden` runs the blocks and `logits` reads them out; with `head=False` the model ends after its last block."""

    config: Config
    head: bool = True

    def setup(self) -> None:
        """Parameters under their checkpoint names."""
        c = self.config
        self.W_E = self.param("embed.W_E", nn.initializers.normal(0.5 * c.d_model**-0.5), (c.d_vocab, c.d_model))
        self.W_pos = self.param("pos_embed.W_pos", nn.initializers.normal(0.1 * c.d_model**-0.5), (c.n_ctx, c.d_model))
        self.blocks = [Block(c, name=f"blocks.{layer}") for layer in range(c.n_layers)]
        if self.head:
            self.ln_final = LayerNorm(c.layer_norm_eps, name="ln_final")
            self.W_U = self.param("unembed.W_U", nn.initializers.normal(c.d_model**-0.5), (c.d_model, c.d_vocab))
            self.b_U = self.param("unembed.b_U", nn.initializers.zeros, (c.d_vocab,))

    def hidden(self, tokens_BxT: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """The residual stream [B, T, D] after the last block."""
        x = self.W_E[tokens_BxT] + self.W_pos[None, : tokens_BxT.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, tap, f"blocks.{layer}")
        return x

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Logits [B, T, V], float32, of a residual stream."""
        logits = jnp.matmul(self.ln_final(x_BxTxD), self.W_U, preferred_element_type=jnp.float32)
        return logits + self.b_U[None, None]

    def __call__(self, tokens_BxT: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Logits [B, T, V], float32, of token ids [B, T]."""
        return self.logits(self.hidden(tokens_BxT, tap))


def tensor_name(path: tuple[str, ...]) -> str:
    """The checkpoint's name of a parameter."""
    return ".".join(path)
