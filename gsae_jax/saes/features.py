"""The features of a dictionary as a loss sees them: all of them, or the active ones of each token.

A loss that takes pre-activations, parameters of features and decodes from an object of this file is the same function
of both. With `ActiveFeatures` it costs as many multiplications as there are active features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gsae_jax.kernels import active
from gsae_jax.saes import linalg
from gsae_jax.saes.contract import Statistics

CAPACITIES = (128, 256, 512)  # slots for the active features of a token
# With fewer features for each slot, dense products are faster on a CPU (`benchmarks/sparse.py`). A train step needs
# fewer of them than a decode, as its slots serve more products. Accelerators have not been measured.
TRAINED_PER_SLOT, DECODED_PER_SLOT = 16, 64
DENSE_PARTS = 4  # of a batch, where the sparse step takes dense products and [B, F] is large beside the parameters


def capacities(width: int, per_slot: int) -> tuple[int, ...]:
    """Those of `CAPACITIES` for which a dictionary has so many features for each slot."""
    return tuple(K for K in CAPACITIES if width >= K * per_slot)


def block(platform: str) -> int:
    """Tokens of a block (`kernels.active`) on "cpu", "gpu" or "tpu"."""
    return 1 if platform == "cpu" else 64


class Encoder(NamedTuple):
    """The weights that decide which features can be active: those with (x - b) @ W + bias > 0.

    Attributes:
        W: [D, F].
        b: [D].
        bias: [F].
    """

    W: jax.Array
    b: jax.Array
    bias: jax.Array


class Features(Protocol):
    """Arrays [B, _] of a loss lie over all features, or over slots for the active ones.

    In a slot that stays empty `pre` and `each` are 0, and a loss must find 0 for the feature's activation and gradient.
    """

    @property
    def pre(self) -> jax.Array:
        """(x - b) @ W [B, _] of the encoder, without the bias."""

    def each(self, value_F: jax.Array) -> jax.Array:
        """A parameter of features as [B, _], or as [1, F] where that broadcasts."""

    def decode(self, values: Sequence[jax.Array], W_FxD: jax.Array, trained: tuple[bool, ...]) -> jax.Array:
        """values @ W [V, B, D] for V arrays of values; `trained` says of each whether it has a gradient by W."""

    def any(self, on: jax.Array) -> jax.Array:
        """[F], which features are on for a token of the batch."""


@dataclasses.dataclass(frozen=True)
class AllFeatures:
    """`Features` by dense products, with operands in `dtype`."""

    pre: jax.Array
    dtype: str

    @classmethod
    def of(cls, x_BxD: jax.Array, encoder: Encoder, dtype: str) -> "AllFeatures":
        """The features of a batch."""
        return cls(linalg.centred_product(x_BxD, encoder.b, encoder.W, dtype), dtype)

    def each(self, value_F: jax.Array) -> jax.Array:
        """[1, F]."""
        return value_F[None]

    def decode(self, values: Sequence[jax.Array], W_FxD: jax.Array, trained: tuple[bool, ...]) -> jax.Array:
        """`Features.decode`."""
        weights = [W_FxD if has else jax.lax.stop_gradient(W_FxD) for has in trained]
        return jnp.stack([linalg.matmul(v, W, self.dtype) for v, W in zip(values, weights, strict=True)])

    def any(self, on: jax.Array) -> jax.Array:
        """`Features.any`."""
        return on.any(0)


@dataclasses.dataclass(frozen=True)
class ActiveFeatures:
    """`Features` by sums over active features (`kernels.active`).

    Attributes:
        pre: [B, K].
        slots: where they lie.
        width: the number of all features.
        dtype: of the products' operands.
        block: tokens of a block.
    """

    pre: jax.Array
    slots: active.Slots
    width: int
    dtype: str
    block: int

    def each(self, value_F: jax.Array) -> jax.Array:
        """[B, K]."""
        return active.varying(value_F, self.slots.features).at[self.slots.features].get(mode="fill", fill_value=0)

    def decode(self, values: Sequence[jax.Array], W_FxD: jax.Array, trained: tuple[bool, ...]) -> jax.Array:
        """`Features.decode`."""
        return active.decode(
            jnp.stack(values), self.slots, active.varying(W_FxD, self.slots.features), trained, self.dtype, self.block
        )

    def any(self, on: jax.Array) -> jax.Array:
        """`Features.any`."""
        start = active.varying(jnp.zeros(self.width, bool), self.slots.features)
        return start.at[self.slots.features.reshape(-1)].max(on.reshape(-1), mode="drop")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """How a loss is computed by active features.

    Attributes:
        capacities: slots for the active features of a token, ascending. The smallest that suffices for every token of
            a batch is used, and dense products where none does.
        block: tokens of a block.
    """

    capacities: tuple[int, ...]
    block: int


class Choice(NamedTuple):
    """Which features a loss needs to see.

    Attributes:
        encoder: of params.
        active: the features [B, F], from (x - b) @ W + bias; None for those where this is positive.
    """

    encoder: Callable[[Any], Encoder]
    active: Callable[[jax.Array], jax.Array] | None = None


def gradients(
    loss: Callable[[Any, Any, Features], tuple[jax.Array, Statistics]],
    choice: Choice,
    params: Any,
    batch: Any,
    x_BxD: jax.Array,
    dtype: str,
    sparsity: Sparsity,
    axes: tuple[str, ...] = (),
) -> tuple[Any, Statistics]:
    """(gradients, statistics) of a loss: `jax.grad(loss, has_aux=True)`, by active features where they fit.

    Which products are used depends on the data alone, and is the same on every device.

    Args:
        loss: of (params, batch, features). Its value and statistics must be means over tokens, if there is no
            `choice.active`.
        choice: of the features.
        params: what is differentiated.
        batch: arrays [B, ...].
        x_BxD: what the features are of.
        dtype: of the products' operands.
        sparsity: which capacities to compile.
        axes: of the mesh, over which the devices must agree.
    """
    encoder = choice.encoder
    weights = jax.lax.stop_gradient(encoder(params))
    pre_BxF = linalg.matmul(x_BxD - weights.b[None], weights.W, dtype)
    with_bias_BxF = pre_BxF + weights.bias[None]
    # A pre-activation that is not a number counts as active, so that the loss shows it.
    mask = active.pack(choice.active(with_bias_BxF) if choice.active else ~(with_bias_BxF <= 0))
    most = jax.lax.pmax(mask.most, axes) if axes else mask.most
    B, width = pre_BxF.shape

    def by_all(params: Any) -> tuple[Any, Statistics]:
        # Parts of the batch save about 1.5 arrays [B, F] of memory, and take a second set of gradients.
        large = sum(value.size for value in jax.tree.leaves(params)) < 1.5 * B * width
        most_parts = DENSE_PARTS if large and choice.active is None else 1
        parts = next(parts for parts in range(most_parts, 0, -1) if B % parts == 0)

        def add_part(total: Any, inputs: Any) -> tuple[Any, Statistics]:
            batch, x_BxD, pre_BxF = inputs

            def of_part(params: Any) -> tuple[jax.Array, Statistics]:
                W, b, _ = active.varying(encoder(params), x_BxD, pre_BxF)
                return loss(params, batch, AllFeatures(_known_product(pre_BxF, x_BxD, b, W, dtype), dtype))

            grads, statistics = jax.grad(of_part, has_aux=True)(params)
            return jax.tree.map(lambda total, grad: total + grad / parts, total, grads), statistics

        total = jax.tree.map(lambda value: active.varying(jnp.zeros_like(value), value), params)
        split = jax.tree.map(lambda x: x.reshape(parts, B // parts, *x.shape[1:]), (batch, x_BxD, pre_BxF))
        grads, (means, fired, state) = jax.lax.scan(add_part, total, split)
        mean = partial(jax.tree.map, lambda x: x.mean(0))
        return grads, Statistics(mean(means), fired.any(0), mean(state))

    def by_active(K: int, params: Any) -> tuple[Any, Statistics]:
        slots = active.Slots.of(mask, K, width)
        pre_BxK = slots.take(pre_BxF)

        def of_active(params: Any) -> tuple[jax.Array, Statistics]:
            W, b, _ = active.varying(encoder(params), x_BxD, pre_BxF)
            pre = _known_active_product(pre_BxK, slots, x_BxD, b, W, dtype, sparsity.block)
            return loss(params, batch, ActiveFeatures(pre, slots, width, dtype, sparsity.block))

        return jax.grad(of_active, has_aux=True)(params)

    branches = [partial(by_active, K) for K in sparsity.capacities] + [by_all]
    return jax.lax.switch(sum((most > K).astype(jnp.int32) for K in sparsity.capacities), branches, params)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _known_product(pre_BxF: jax.Array, x_BxD: jax.Array, b_D: jax.Array, W_DxF: jax.Array, dtype: str) -> jax.Array:
    """(x - b) @ W, which is known to be `pre`; its gradients are those of the product."""
    return pre_BxF


def _known_product_forward(pre, x, b, W, dtype):
    return pre, (x, b, W)


def _known_product_backward(dtype, saved, d_pre):
    x, b, W = saved
    _, pull = jax.vjp(lambda b, W: linalg.centred_product(x, b, W, dtype), b, W)
    return None, None, *pull(d_pre)


_known_product.defvjp(_known_product_forward, _known_product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _known_active_product(
    pre_BxK: jax.Array,
    slots: active.Slots,
    x_BxD: jax.Array,
    b_D: jax.Array,
    W_DxF: jax.Array,
    dtype: str,
    block: int,
) -> jax.Array:
    """The same of the active features."""
    return pre_BxK


def _known_active_product_forward(pre, slots, x, b, W, dtype, block):
    return pre, (slots, x, b, W)


def _known_active_product_backward(dtype, block, saved, d_pre):
    slots, x, b, W = saved
    F = W.shape[1]
    d_W_FxD = active.add_rows(slots, d_pre[None], x[None], F, dtype, block)
    start = active.varying(jnp.zeros(F, d_pre.dtype), slots.features)
    d_center_F = start.at[slots.features.reshape(-1)].add(d_pre.reshape(-1), mode="drop")
    d_b = -linalg.matmul(d_center_F, W.T, dtype)
    return None, None, None, d_b, (d_W_FxD - d_center_F[:, None] * b[None]).T


_known_active_product.defvjp(_known_active_product_forward, _known_active_product_backward)
