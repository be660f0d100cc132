"""Dead features begin again from inputs that their SAE reconstructs badly (Appendix D.1; Bricken et al. 2023)."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gsae_jax import mesh as mesh_lib
from gsae_jax.saes import contract, linalg, parameters
from gsae_jax.saes.contract import Role
from gsae_jax.training import optimiser
from gsae_jax.training.stacks import Stack, StackState, gather

INPUTS = 2**15  # activations of the buffer that are looked at
ENCODER_NORM = 0.2  # of a new feature's encoder, relative to the mean of the live ones
Sites = dict[str, jax.Array]  # an array for each site that the stack reads or writes


def resample(
    stack: Stack,
    state: StackState,
    activations: Sites,
    inputs: Callable[[Sites], Sites],
    key: jax.Array,
    dead_after: int,
) -> tuple[StackState, jax.Array]:
    """Give every dead feature of a stack a new start, on one device of the mesh (inside `shard_map`).

    An SAE's dead features take different inputs, drawn with probability proportional to the square of its squared
    error (only where more are dead than there are inputs do some share one). The decoder row is the unit input, seen
    from the decoder's bias as the encoder sees it (of a transcoder, what the features must explain of the target; where
    rows are not unit, of the live ones' mean norm); the encoder's column is the same direction at a fifth of the live
    ones' mean norm; biases and magnitudes' scales are zero. Where features may be negative, a zero bias would open each
    gate, so that biases are the live ones' mean. Where encoders are aligned with decoders, a column cannot be small, so
    that biases leave a fifth of the activation on its own input. Second moments are the mean of the live ones': from
    zero, with a bias correction that is long over, the first step would be thirty times a usual one. First moments are
    zero.

    Args:
        stack: its architecture and sites.
        state: of the stack.
        activations: this device's part [S, B, D] (along the second axis), in the language model's units.
        inputs: activations to the SAE's inputs.
        key: an SAE's draws come from this and its seed.
        dead_after: updates without firing after which a feature is dead.

    Returns:
        The state, and how many features of each SAE [N] began again.
    """
    if not contract.trains_features(stack.architecture, stack.sae):  # its features are given
        return state, jnp.zeros(len(stack.config), jnp.int32)
    table = stack.architecture.PARAMETERS
    aligned = getattr(stack.sae, "aligned", False)
    activations = {site: activations[site] for site in {*stack.config.sites, *stack.config.targets}}
    # Gathered in the store's type, which is half as large as float32.
    everything = {
        site: jax.lax.all_gather(x, "data", axis=1, tiled=True).reshape(-1, x.shape[-1])
        for site, x in activations.items()
    }
    dead_NxF = state.steps_since_fired >= dead_after
    everywhere = jax.lax.all_gather(dead_NxF, mesh_lib.FEATURES, axis=1, tiled=True)
    rank_NxF = jax.lax.dynamic_slice_in_dim(
        everywhere.cumsum(1) - 1, jax.lax.axis_index(mesh_lib.FEATURES) * dead_NxF.shape[1], dead_NxF.shape[1], axis=1
    )

    def one(index: int, seed: int) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
        params = {name: value[index] for name, value in state.params.items()}
        whole = {name: gather(value, table[name].axis) for name, value in params.items()}
        errors_SxB = jax.lax.map(partial(_squared_errors, stack, whole, inputs), activations)
        errors_M = jax.lax.all_gather(errors_SxB, "data", axis=1, tiled=True).reshape(-1)
        # The order of these is one of draws without replacement.
        chances_M = 2 * jnp.log(errors_M) + jax.random.gumbel(jax.random.fold_in(key, seed), errors_M.shape)
        order_M = jnp.argsort(-chances_M)
        drawn_F = order_M[rank_NxF[index] % len(order_M)]
        drawn = inputs({site: x_MxD[drawn_F] for site, x_MxD in everything.items()})
        sae_inputs, _ = stack.batch(drawn)
        skipped = contract.skip(stack.architecture, whole, sae_inputs)

        dead_F = dead_NxF[index]
        moments = jax.tree.map(lambda value: value[index], optimiser.moments(state.second_moments))
        for name, parameter in table.items():
            axis = parameter.axis
            if name not in params or axis is None or not parameter.trained:
                continue
            value, new = params[name], jnp.zeros_like(params[name])
            if parameter.role is Role.FEATURE and aligned:
                x_FxD = drawn[stack.config.sites[0]]
                bias = parameters.input_bias(stack.architecture)
                new -= (1 - ENCODER_NORM) * jnp.linalg.norm(_centred(x_FxD, params.get(bias or "")), axis=-1)
            elif parameter.role is Role.FEATURE and contract.is_signed(stack.architecture):
                new += _live_mean(value, dead_F, default=value)
            elif parameter.role is Role.DECODER:
                bias = parameters.output_bias(stack.architecture, parameter.site)
                target_FxD = drawn[stack.config.targets[parameter.site]]
                if skipped is not None:
                    target_FxD = target_FxD - jax.tree.leaves(skipped)[parameter.site]
                new = _directions(target_FxD, params.get(bias or ""))
                if not parameter.unit_rows:
                    norms_F = jnp.linalg.norm(value, axis=1)
                    new *= _live_mean(norms_F, dead_F, default=norms_F)
            elif parameter.role is Role.ENCODER:
                bias = parameters.input_bias(stack.architecture, parameter.site)
                norms_F = jnp.linalg.norm(value, axis=0)
                directions_FxD = _directions(drawn[stack.config.sites[parameter.site]], params.get(bias or ""))
                new = directions_FxD.T * ENCODER_NORM * _live_mean(norms_F, dead_F, default=norms_F)
            others = tuple(other for other in range(value.ndim) if other != axis)
            mask = jnp.expand_dims(dead_F, others)
            params[name] = jnp.where(mask, new, value)
            second = moments["nu"][name]
            moments["nu"][name] = jnp.where(mask, _live_mean(second.mean(others), dead_F), second)
            if "mu" in moments:
                moments["mu"][name] = jnp.where(mask, 0, moments["mu"][name])
        return params, moments

    of_each = [one(index, seed) for index, (_, _, seed) in enumerate(stack.config.numbers())]
    params, moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_each)
    return dataclasses.replace(
        state,
        params=params,
        second_moments=state.second_moments._replace(**moments),
        steps_since_fired=jnp.where(dead_NxF, 0, state.steps_since_fired),
    ), jax.lax.psum(dead_NxF.sum(1), mesh_lib.FEATURES)


def _directions(x_FxD: jax.Array, bias_D: jax.Array | None) -> jax.Array:
    """Unit rows along x - bias; zeros where it is zero."""
    return linalg.unit(_centred(x_FxD, bias_D))


def _centred(x_FxD: jax.Array, bias_D: jax.Array | None) -> jax.Array:
    return x_FxD if bias_D is None else x_FxD - bias_D[None]


def _live_mean(values_F: jax.Array, dead_F: jax.Array, default: jax.typing.ArrayLike = 0.0) -> jax.Array:
    """Over the live features on all devices; where none lives, the mean of `default` over all."""
    values_F, default_F = jnp.where(dead_F, 0, values_F), jnp.broadcast_to(default, values_F.shape)
    living, live, rest, size = jax.lax.psum(
        (values_F.sum(), (~dead_F).sum(), default_F.sum(), values_F.size), mesh_lib.FEATURES
    )
    return jnp.where(live > 0, living / jnp.maximum(live, 1), rest / size)


def _squared_errors(
    stack: Stack, params: dict[str, jax.Array], inputs: Callable[[Sites], Sites], x: Sites
) -> jax.Array:
    """[B], of an SAE whose features lie along `latent`: the sum over the sites that it writes.

    As in a loss, errors are divided by the site's width, but all are multiplied by that of the first site.
    """
    sae_inputs, targets = stack.batch(inputs(x))
    f_BxF = contract.encode_shard(stack.architecture, params, sae_inputs, stack.sae, contract.Shards("latent", "data"))
    biases = [parameters.output_bias(stack.architecture, site) for site in range(len(stack.config.targets))]
    # A shard decodes its own features; the biases are added once.
    without = params | {name: jnp.zeros_like(params[name]) for name in biases if name in params}
    decoded = jax.lax.psum(stack.architecture.decode(without, f_BxF), "latent")
    decoded = contract.with_skip(stack.architecture, params, sae_inputs, decoded)
    D = jax.tree.leaves(targets)[0].shape[-1]
    errors = [
        jnp.square(target - x_hat - (params[name][None] if name in params else 0)).sum(-1) * (D / target.shape[-1])
        for target, x_hat, name in zip(jax.tree.leaves(targets), jax.tree.leaves(decoded), biases, strict=True)
    ]
    return jnp.stack(errors).sum(0)
