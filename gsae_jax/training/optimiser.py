"""Adam, on decoders whose rows stay unit (Appendix D.1 of the paper; Bricken et al. 2023).

Adam with b1 = 0, as in the paper, is RMSProp with a bias-corrected second moment, so the state is one array per
parameter. With b1 above 0 it has the first moments as well.
"""

import math
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import optax

from gsae_jax import config as config_lib


def scale_by(b1: float, b2: float) -> optax.GradientTransformation:
    """Adam's scaling of gradients; its state is (count, nu), or (count, mu, nu) with b1 above 0."""
    if b1:
        return optax.scale_by_adam(b1, b2, eps=1e-8)
    # eps outside the root, as Adam has it.
    return optax.scale_by_rms(decay=b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)


GAIN = 16.0  # of `gain`, over all its steps
GAIN_BELOW = 0.25  # its factor where L0 is too small: features that are off come back slowly, and L0 would overshoot
LARGEST_GAIN = 0.05  # at one step
RESAMPLED_RATE = 0.1  # the factor right after a resampling


def schedule(
    config: config_lib.Train, resampled_at: Sequence[int] = (), steps: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The factor on every learning rate at a step: linear warm-up, constant, a cosine to zero over `decay_fraction`.

    After each of the steps `resampled_at` it is a tenth of that, and returns on a cosine over `resample_warmup_steps`.
    `steps` is the length of training, by default that of the config.
    """
    steps = config.steps if steps is None else steps
    decay_steps = min(round(config.decay_fraction * steps), steps - config.warmup_steps)

    def factor(step: jax.Array) -> jax.Array:
        warmup = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        progress = jnp.clip((step - (steps - decay_steps)) / max(1, decay_steps), 0.0, 1.0)
        scale = warmup * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        for at in resampled_at:
            since = jnp.clip((step - at) / config.resample_warmup_steps, 0.0, 1.0)
            back = RESAMPLED_RATE + (1 - RESAMPLED_RATE) * 0.5 * (1 - jnp.cos(jnp.pi * since))
            scale *= jnp.where(step >= at, back, 1.0)
        return scale

    return factor


def coefficient_warmup(steps: int, fraction: float) -> Callable[[jax.Array], jax.Array] | None:
    """The factor on l1 coefficients at a step, from 0 to 1 in a fraction of training; None where it is always 1."""
    return optax.linear_schedule(0.0, 1.0, math.ceil(fraction * steps)) if fraction else None


def gain(config: config_lib.Train, fraction: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """How far log l1 moves at a step per unit of log(L0 / target): so far from warm-up to two thirds of training.

    `fraction`: of training, in which the coefficient itself is warmed up.
    """
    start, end = max(config.warmup_steps, math.ceil(fraction * config.steps)), end_of_gain(config.steps)
    value = min(LARGEST_GAIN, GAIN / max(1, end - start))

    def factor(step: jax.Array) -> jax.Array:
        return jnp.where((step >= start) & (step < end), value, 0.0)

    return factor


def end_of_gain(steps: int) -> int:
    """The step from which on l1 coefficients stay, in a training of so many steps."""
    return 2 * steps // 3


def constant_from(steps: int, config: config_lib.Stack) -> int:
    """The step from which on a stack's l1 coefficients, and the option k, stay in a training of so many steps."""
    warmup = math.ceil((config.coefficient_warmup_fraction or 0.0) * steps)
    return max(warmup, end_of_gain(steps)) if config.target_l0 else warmup


def update(
    params: dict[str, jax.Array],
    grads: dict[str, jax.Array],
    state: optax.OptState,
    learning_rate_N: jax.Array,
    unit_rows: Collection[str],
    finite_N: jax.Array,
    b1: float = 0.0,
    b2: float = 0.999,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """One step of a stack [N, ...]. An SAE that is not `finite` stays as it is.

    Arrays named in `unit_rows` get no gradient along their rows before it, and unit rows after it.
    """

    def each(value_N: jax.Array, like: jax.Array) -> jax.Array:
        return value_N.reshape(-1, *[1] * (like.ndim - 1))

    # Written for few passes over memory. A gradient of 0 and a learning rate of 0 keep a parameter without another read
    # of it, and a product computes sums along rows several times as fast as a reduction does on a CPU.
    grads = {name: jnp.where(each(finite_N, value), value, 0) for name, value in grads.items()}
    across = {
        name: grads[name] - _row_products(grads[name], params[name])[..., None] * params[name] for name in unit_rows
    }
    updates, new = scale_by(b1, b2).update(grads | across, state)
    kept = {
        kind: {name: jnp.where(each(finite_N, value), value, of[name]) for name, value in getattr(new, kind).items()}
        for kind, of in moments(state).items()
    }
    rate_N = jnp.where(finite_N, learning_rate_N, 0)
    params = {name: value - each(rate_N, value) * updates[name] for name, value in params.items()}
    for name in unit_rows:
        norms_NxF = jnp.sqrt(_row_products(params[name], params[name]))
        params[name] *= jnp.where(finite_N[:, None], 1 / norms_NxF, 1)[..., None]
    return params, new._replace(**kept)


def moments(state: optax.OptState) -> dict[str, dict[str, jax.Array]]:
    """The arrays by parameter that the state has: "nu", the second moments, and "mu", the first, if they are kept."""
    return {kind: getattr(state, kind) for kind in ("mu", "nu") if hasattr(state, kind)}


def squared_norms(grads: dict[str, jax.Array]) -> jax.Array:
    """[N], of each SAE's gradients [N, ...]."""
    return sum((_row_products(flat, flat) for flat in _flat(grads)), jnp.zeros(()))


def clip(grads: dict[str, jax.Array], norm_N: jax.Array, limit: float) -> dict[str, jax.Array]:
    """Gradients [N, ...] of these norms, shortened to the limit where they are longer."""
    factor_N = jnp.where(norm_N < limit, 1.0, limit / norm_N)
    return {name: value * factor_N.reshape(-1, *[1] * (value.ndim - 1)) for name, value in grads.items()}


def finite(grads: dict[str, jax.Array]) -> jax.Array:
    """[N], whether all of an SAE's gradients [N, ...] are finite, and their squares."""
    return jnp.isfinite(jnp.stack([_row_products(flat, flat) for flat in _flat(grads)])).all(0)


def _flat(grads: dict[str, jax.Array]) -> list[jax.Array]:
    return [value.reshape(len(value), -1) for value in grads.values()]


def _row_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums along the last axis of x * y, in float32 on every device."""
    return jnp.einsum("...d,...d->...", x, y, precision="highest")
