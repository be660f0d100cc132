"""The MLP of a layer with experts: a router chooses a few for each token, and their outputs are added with weights.

Shape suffixes: those of `transformer`, and E experts, A experts that a token uses, N tokens, R rows of a block.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

MOST_ROWS = 256  # in a block


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        n_experts: how many there are.
        experts_per_token: how many each token uses: those with the largest logits of the router.
        d_mlp: neurons of one expert.
        normalized: the weights of a token's experts sum to 1. Otherwise they are probabilities among all experts.
        bias: router and experts have biases (GPT-OSS).
        limit: the gate is clamped to at most this, and the other input to this in size; 0 = no clamp (GPT-OSS).
        slope: with a clamp, the activation is gate * sigmoid(slope * gate), and 1 is added to the other input.
    """

    n_experts: int
    experts_per_token: int
    d_mlp: int
    normalized: bool = True
    bias: bool = False
    limit: float = 0.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers that no model can have."""
        if not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(f"gives {self.experts_per_token} experts per token, of {self.n_experts}")

    def neurons(self, gate: jax.Array, y: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """An expert's neurons after the activation function and the gate."""
        if not self.limit:
            return activation(gate) * y
        gate, y = jnp.minimum(gate, self.limit), jnp.clip(y, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.slope * gate) * (y + 1)


@partial(jax.jit, static_argnums=(3, 4, 5))
def mixture(
    x_BxTxD: jax.Array,
    logits_BxTxE: jax.Array,
    weights: dict[str, jax.Array],
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
    mesh: Mesh | None,
) -> jax.Array:
    """The weighted sum [B, T, D] of the outputs of each token's experts. No token is dropped.

    It is compiled also where the rest of the language model is not.

    On a mesh every device computes its own rows along `data`, and its own part of every expert's neurons along
    `latent`. So all devices have equal work, whichever experts are chosen.

    Args:
        x_BxTxD: what the MLP reads.
        logits_BxTxE: of the router; float32.
        weights: `W_gate` and `W_in` [E, D, M], `W_out` [E, M, D], and perhaps `b_gate`, `b_in` [E, M], `b_out` [E, D].
        experts: the settings.
        activation: of the gate.
        mesh: where the weights' M may lie along `latent`; None: one device.
    """
    if mesh is None:
        return _on_one_device(x_BxTxD, logits_BxTxE, weights, experts, activation)
    rows = None if x_BxTxD.shape[0] % mesh.shape["data"] else "data"
    neurons = None if experts.d_mlp % mesh.shape["latent"] else "latent"
    specs = {
        "W_gate": (None, None, neurons),
        "W_in": (None, None, neurons),
        "W_out": (None, neurons, None),
        "b_gate": (None, neurons),
        "b_in": (None, neurons),
        "b_out": (None, None),
    }
    stream = PartitionSpec(rows, None, None)
    return jax.shard_map(
        lambda x, logits, weights: _on_one_device(x, logits, weights, experts, activation, rows, neurons),
        mesh=mesh,
        in_specs=(stream, stream, {name: PartitionSpec(*specs[name]) for name in weights}),
        out_specs=stream,
    )(x_BxTxD, logits_BxTxE, weights)


def _on_one_device(
    x_BxTxD: jax.Array,
    logits_BxTxE: jax.Array,
    weights: Mapping[str, jax.Array],
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
    rows: str | None = None,
    neurons: str | None = None,
) -> jax.Array:
    """`mixture` of one device's rows along the axis `rows`, summed along the axis `neurons`."""
    axes = tuple(axis for axis in (rows, neurons) if axis)
    W = {name: _varying(value, rows) for name, value in weights.items()}  # along `neurons` their parts differ
    x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    logits_NxE = logits_BxTxE.reshape(len(x_NxD), -1)
    logits_NxA, chosen_NxA = jax.lax.top_k(logits_NxE, experts.experts_per_token)
    total = jax.nn.logsumexp(logits_NxA if experts.normalized else logits_NxE, axis=-1, keepdims=True)
    share_NxA = jnp.exp(logits_NxA - total)

    blocks = _Blocks.of(chosen_NxA, experts.n_experts)
    x_nxRxD = _varying(x_NxD[blocks.token], neurons).reshape(*blocks.shape, -1)

    def product(x_nxRxK: jax.Array, W_ExKxM: jax.Array) -> jax.Array:
        return _product(axes, x_nxRxK, W_ExKxM, blocks.expert, blocks.used)

    def affine(suffix: str) -> jax.Array:
        y_nxRxM = product(x_nxRxD, W[f"W_{suffix}"])
        return y_nxRxM + W[f"b_{suffix}"][blocks.expert][:, None] if experts.bias else y_nxRxM

    y_nxRxD = product(experts.neurons(affine("gate"), affine("in"), activation), W["W_out"])
    y_NxAxD = y_nxRxD.reshape(-1, y_nxRxD.shape[-1])[blocks.place_NxA]
    y_NxD = (share_NxA[..., None] * y_NxAxD).sum(1).astype(x_NxD.dtype)
    if neurons:
        y_NxD = jax.lax.psum(y_NxD, neurons)
    if experts.bias:
        y_NxD += (share_NxA[..., None] * W["b_out"][chosen_NxA]).sum(1).astype(x_NxD.dtype)
    return y_NxD.reshape(x_BxTxD.shape)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Each use of an expert by a token has a place in a block of R places, all of one expert. Some places stay empty.

    Attributes:
        token: [n * R], the token at each place; 0 where the place is empty.
        expert: [n], of each block.
        used: [n], whether any place of the block is taken.
        place_NxA: the place of each use.
    """

    token: jax.Array
    expert: jax.Array
    used: jax.Array
    place_NxA: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(n, R)."""
        return len(self.expert), len(self.token) // len(self.expert)

    @classmethod
    def of(cls, chosen_NxA: jax.Array, n_experts: int) -> "_Blocks":
        """From the experts that each token uses."""
        uses = chosen_NxA.size
        R = block_rows(uses, n_experts)
        n = (uses + min(uses, n_experts) * (R - 1)) // R  # however the uses fall on the experts
        order = jnp.argsort(chosen_NxA.ravel(), stable=True)
        expert = chosen_NxA.ravel()[order]
        uses_E = jnp.zeros(n_experts, jnp.int32).at[expert].add(1)
        blocks_E = -(-uses_E // R)
        last_E = jnp.cumsum(blocks_E)
        rank = jnp.arange(uses) - (jnp.cumsum(uses_E) - uses_E)[expert]
        place = (last_E - blocks_E)[expert] * R + rank
        return cls(
            token=jnp.zeros(n * R, jnp.int32).at[place].set(order // chosen_NxA.shape[1]),
            expert=jnp.minimum(jnp.searchsorted(last_E, jnp.arange(n), side="right"), n_experts - 1),
            used=jnp.arange(n) < last_E[-1],
            place_NxA=jnp.zeros(uses, jnp.int32).at[order].set(place).reshape(chosen_NxA.shape),
        )


def block_rows(uses: int, n_experts: int) -> int:
    """Rows of a block: a power of two, so small that a few blocks are full where all experts are used equally."""
    return min(MOST_ROWS, 2 ** max(0, (uses // (4 * n_experts)).bit_length() - 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    axes: tuple[str, ...], x_nxRxK: jax.Array, W_ExKxM: jax.Array, expert_n: jax.Array, used_n: jax.Array
) -> jax.Array:
    """Each block's rows times the matrix of its expert [n, R, M]; 0 for blocks that are not used.

    `jax.lax.ragged_dot` computes the same. But on CPUs it multiplies every row by the matrix of every expert, and needs
    memory for all these products (`benchmarks/experts.py`).

    Args:
        axes: of the mesh, along which the arrays differ.
        x_nxRxK: the rows.
        W_ExKxM: the matrices.
        expert_n: of each block.
        used_n: whether the block is.
    """
    return _each(axes, lambda x_RxK, expert: x_RxK @ W_ExKxM[expert], W_ExKxM.shape[2], x_nxRxK, expert_n, used_n)


def _product_forward(axes: tuple[str, ...], *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(axes, *inputs), inputs


def _product_backward(
    axes: tuple[str, ...], inputs: tuple[jax.Array, ...], dy_nxRxM: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Written by hand: JAX would keep each block's matrix until the gradient is computed."""
    x_nxRxK, W_ExKxM, expert_n, used_n = inputs

    def add(dW_ExKxM: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_RxK, dy_RxM, expert = inputs
        return dW_ExKxM.at[expert].add(x_RxK.T @ dy_RxM), None

    zero_ExKxM = _varying(jnp.zeros(W_ExKxM.shape, W_ExKxM.dtype), *axes)
    dW_ExKxM, _ = jax.lax.scan(add, zero_ExKxM, (x_nxRxK, dy_nxRxM, expert_n))
    back = partial(_each, axes, lambda dy_RxM, expert: dy_RxM @ W_ExKxM[expert].T, W_ExKxM.shape[1])
    return back(dy_nxRxM, expert_n, used_n), dW_ExKxM, None, None


_product.defvjp(_product_forward, _product_backward)


def _each(
    axes: tuple[str, ...],
    function: Callable[[jax.Array, jax.Array], jax.Array],
    width: int,
    x_nxRxK: jax.Array,
    expert_n: jax.Array,
    used_n: jax.Array,
) -> jax.Array:
    """A function [R, width] of each block that is used, and 0 for the others."""
    zero = _varying(jnp.zeros((x_nxRxK.shape[1], width), x_nxRxK.dtype), *axes)

    def block(inputs: tuple[jax.Array, ...]) -> jax.Array:
        x_RxK, expert, used = inputs
        return jax.lax.cond(used, function, lambda *_: zero, x_RxK, expert)

    return jax.lax.map(block, (x_nxRxK, expert_n, used_n))


def _varying(x: jax.Array, *axes: str | None) -> jax.Array:
    """An array whose copies along these axes of the mesh are from now on different arrays (inside `shard_map`)."""
    return jax.lax.pcast(x, tuple(axis for axis in axes if axis), to="varying")
