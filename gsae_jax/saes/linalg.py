"""What architectures share: the matrix product, what shifts inputs and reconstructions, the initial dictionary."""

from collections.abc import Mapping
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.kernels import active

# Features that are active on a token before training. With zero biases half of all features are, and wide dictionaries
# need hundreds of steps, all of them dense, to shrink their reconstructions to the size of the inputs.
INITIAL_L0 = 64
ROUNDING = 1e-5  # of an inner product of one, in float32


def matmul(x: jax.Array, W: jax.Array, dtype: str) -> jax.Array:
    """x @ W [D, F], of x [B, D] or [D]: operands in `dtype`, and the sum in float32, or in float64 where `dtype` is.

    The products of its gradients have operands in `dtype` as well.
    """
    if jnp.finfo(dtype).bits >= 32:
        return jnp.matmul(x.astype(dtype), W.astype(dtype), preferred_element_type=jnp.dtype(dtype))
    if x.ndim == 1:
        return matmul(x[None], W, dtype)[0]
    return _narrow_matmul(active.varying(x, W), active.varying(W, x), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_matmul(x_BxD: jax.Array, W_DxF: jax.Array, dtype: str) -> jax.Array:
    # JAX's own derivative would multiply the float32 cotangent with float32 copies of the operands.
    return jnp.matmul(x_BxD.astype(dtype), W_DxF.astype(dtype), preferred_element_type=jnp.float32)


def _narrow_matmul_forward(x, W, dtype):
    return _narrow_matmul(x, W, dtype), (x, W)


def _narrow_matmul_backward(dtype, saved, d_out):
    x, W = saved
    d_x, d_W = _narrow_matmul(d_out, W.T, dtype), _narrow_matmul(x.T, d_out, dtype)
    return d_x.astype(x.dtype), d_W.astype(W.dtype)


_narrow_matmul.defvjp(_narrow_matmul_forward, _narrow_matmul_backward)


def centred_product(x_BxD: jax.Array, b_D: jax.Array, W: jax.Array, dtype: str) -> jax.Array:
    """(x - b) @ W, for training: a batch that many SAEs share meets all their encoders in one product.

    The centring is a bias, -b @ W. With bfloat16 it needs inputs without a large mean, as `activations.center` makes
    them: the two products would lose their digits.
    """
    return matmul(x_BxD, W, dtype) - matmul(b_D, W, dtype)[None]


def total(widths: int | tuple[int, ...]) -> int:
    """The width of a site, or of several together."""
    return sum(widths) if isinstance(widths, tuple) else widths


def center(params: Mapping[str, jax.Array]) -> jax.Array:
    """What is subtracted from inputs [D]: `b_in` in transcoders, `b_dec` in SAEs."""
    return params["b_in"] if "b_in" in params else params["b_dec"]


def offset(params: Mapping[str, jax.Array], x_BxD: jax.Array, dtype: str) -> jax.Array:
    """What is added to the decoder's product, for training: `b_dec` [1, D], in skip transcoders + x @ W_skip [B, D]."""
    b_dec = params["b_dec"][None]
    return b_dec + matmul(x_BxD, params["W_skip"], dtype) if "W_skip" in params else b_dec


def shifted(bias: jax.Array, b_D: jax.typing.ArrayLike, W_DxF: jax.Array) -> jax.Array:
    """bias + b @ W [F], on the host in float64 and rounded once: an encoder's bias for inputs centred otherwise."""
    with np.errstate(over="ignore", invalid="ignore"):  # callers check whether it is finite
        shifted_F = np.asarray(bias) + np.asarray(b_D, np.float64) @ np.asarray(W_DxF, np.float64)
        return jnp.asarray(shifted_F.astype(np.float32))


def aligned(W_DxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Encoder columns w' = w + (1 - w . d) / (d . d) d. Each has an inner product of one with its decoder row d.

    In aligned training (arXiv 2605.18629) w' takes the place of w, and the gradient of w' reaches both w and d. Of all
    columns with this inner product, w' is the nearest to w. It is defined for every w. The alternative w / (w . d) is
    not defined if w . d is 0, and it reverses w if w . d is negative.
    """
    dots_F, squares_F = _alignment(W_DxF, W_dec_FxD), _alignment(W_dec_FxD.T, W_dec_FxD)
    return W_DxF + ((1 - dots_F) / squares_F)[None] * W_dec_FxD.T


def once_aligned(W_DxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """The same, but columns that are aligned up to rounding stay as they are, so that a second call changes no bit."""
    is_aligned_F = jnp.abs(_alignment(W_DxF, W_dec_FxD) - 1) < ROUNDING
    return jnp.where(is_aligned_F[None], W_DxF, aligned(W_DxF, W_dec_FxD))


def _alignment(W_DxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """The inner product [F] of each feature's column and row."""
    return jnp.einsum("df,fd->f", W_DxF, W_dec_FxD, precision="highest")


def unit_rows(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Random directions [rows, columns], each of unit norm."""
    return unit(jax.random.normal(key, (rows, columns)))


def rectified(x_BxD: jax.Array, b_D: jax.Array, W_DxF: jax.Array, bias_F: jax.Array, dtype: str) -> jax.Array:
    """ReLU((x - b) @ W + bias) [B, F]."""
    # Centred in float32, before the product: with a large mean, bfloat16 has no digits left for the rest.
    return jax.nn.relu(matmul(x_BxD.astype(jnp.float32) - b_D[None], W_DxF, dtype) + bias_F[None])


def initial_bias(initial_l0: float, width: int) -> jax.Array:
    """Biases [F] with which about `initial_l0` features are active on a token before training.

    Pre-activations are then about normal with variance 1, as rows are unit and a site's activations have E||x||^2 = D.
    The biases are zero, and half of the features are active, for 0 and for more than that half.
    """
    share = initial_l0 / width
    return jnp.full(width, NormalDist().inv_cdf(share) if 0 < share < 0.5 else 0.0)


def check_initial_l0(initial_l0: int) -> None:
    """Raises UserError for a negative number."""
    if initial_l0 < 0:
        raise UserError(f"is {initial_l0}; write how many features to start with on a token, or 0", "initial_l0")


def unit(W: jax.Array) -> jax.Array:
    """W with rows of unit norm; rows of zeros stay."""
    norms = jnp.linalg.norm(W, axis=-1, keepdims=True)
    return W / jnp.where(norms > 0, norms, 1)


def with_unit_rows(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same function of W_enc, b_enc, W_dec and b_dec, with decoder rows of unit norm; rows of zeros stay."""
    norms_F = jnp.linalg.norm(params["W_dec"], axis=-1)
    norms_F = jnp.where(norms_F > 0, norms_F, 1)
    W_enc, W_dec = params["W_enc"] * norms_F[None], params["W_dec"] / norms_F[:, None]
    return params | {"W_enc": W_enc, "b_enc": params["b_enc"] * norms_F, "W_dec": W_dec}


def error_statistics(x_BxD: jax.Array, x_hat_BxD: jax.Array) -> dict[str, jax.Array]:
    """Batch means: squared error over D, and the numerator and denominator of gamma (equation 10)."""
    return {
        "mse": jnp.square(x_BxD - x_hat_BxD).mean(),
        "x_hat_sq": jnp.square(x_hat_BxD).sum(-1).mean(),
        "x_hat_dot_x": (x_hat_BxD * x_BxD).sum(-1).mean(),
    }
