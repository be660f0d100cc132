"""Stacks of SAEs on the mesh: their state, its placement, and one update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax.saes import trained
from gsae_jax.training import optimiser

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StackState:
    """N SAEs of one shape; every array has a leading axis N.

    Attributes:
        params: the architecture's parameters.
        second_moments: the optimiser's state.
        l1_coefficient: [N]; moves where the stack has a target of L0.
        learning_rate: [N], before the schedule's factor.
        steps_since_fired: [N, F], updates since a feature was last active on any token of a batch.
        skipped: [N], updates that were not made because the loss or a gradient was not finite.
        skipped_in_row: [N], those since the last that was.
    """

    params: dict[str, jax.Array]
    second_moments: Any
    l1_coefficient: jax.Array
    learning_rate: jax.Array
    steps_since_fired: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Stack:
    """What does not change in training: a stack's name, site, and architecture."""

    name: str
    config: config_lib.Stack
    architecture: Any
    sae: Any

    @classmethod
    def build(cls, name: str, config: config_lib.Stack, d_in: int, dtype: str) -> "Stack":
        """Raises `ConfigError` for an unknown architecture or option."""
        architecture, sae = trained.build_config(
            config.architecture, d_in, config.width, dtype, config.options, f"stacks.{name}"
        )
        return cls(name, config, architecture, sae)

    def init(self) -> StackState:
        """The untrained stack; an SAE's start depends on its seed only."""
        l1, learning_rates, seeds = (jnp.array(column) for column in zip(*self.config.numbers(), strict=True))
        params = jax.vmap(lambda seed: self.architecture.init(jax.random.key(seed), self.sae))(seeds)
        return StackState(
            params=params,
            second_moments=optimiser.scale_by_second_moment.init(params),
            l1_coefficient=l1.astype(jnp.float32),
            learning_rate=learning_rates.astype(jnp.float32),
            steps_since_fired=jnp.zeros((len(seeds), self.sae.width), jnp.int32),
            skipped=jnp.zeros(len(seeds), jnp.int32),
            skipped_in_row=jnp.zeros(len(seeds), jnp.int32),
        )

    def specs(self) -> Any:
        """The mesh axes of every array of the state: features over all devices, first along `latent`."""
        axes = self.architecture.FEATURE_AXES

        def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
            name = getattr(path[-1], "key", None)
            if axes.get(name) is None:
                return P()
            return P(*[None] * (1 + axes[name]), ("latent", "data"))

        abstract = jax.eval_shape(self.init)
        everywhere: Any = P()
        return dataclasses.replace(
            abstract,
            params=jax.tree_util.tree_map_with_path(spec, abstract.params),
            second_moments=jax.tree_util.tree_map_with_path(spec, abstract.second_moments),
            l1_coefficient=everywhere,
            learning_rate=everywhere,
            steps_since_fired=P(None, ("latent", "data")),
            skipped=everywhere,
            skipped_in_row=everywhere,
        )

    def update(
        self, state: StackState, x_BxD: jax.Array, rate: jax.Array, gain: jax.typing.ArrayLike = 0.0
    ) -> tuple[StackState, dict[str, jax.Array]]:
        """One step on one device of the mesh (inside `shard_map`); returns batch means [N] of the loss's statistics.

        An SAE whose loss or gradients are not finite stays as it is, and its statistics are 0.

        `rate` is the schedule's factor on learning rates, and `gain` how far L0 off its target moves l1 coefficients.

        Every device keeps, and updates, its own part of the features' parameters; for the loss it gathers those of
        its `latent` shard along `data`, inside the differentiated function: the transpose scatters the summed
        gradients back to the parts.
        """

        def loss(part: dict[str, jax.Array], l1_coefficient: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = {name: gather(value, self.architecture.FEATURE_AXES[name]) for name, value in part.items()}
            value, statistics = self.architecture.loss(
                params, x_BxD, l1_coefficient, self.sae, lambda x: jax.lax.psum(x, "latent")
            )
            # The mean over `data` inside the differentiated function: its transpose sums the gradients, once, rightly
            # weighted.
            return jax.lax.pmean(value, "data"), statistics

        # One by one and not under `vmap`: batched products run at half the rate of plain ones on a CPU, and what one
        # SAE needs in between can be used again by the next.
        found = [
            jax.grad(loss, has_aux=True)({name: value[index] for name, value in state.params.items()}, l1_coefficient)
            for index, l1_coefficient in enumerate(state.l1_coefficient)
        ]
        grads, statistics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        fired = statistics.pop("fired").astype(jnp.int32)
        if jax.lax.axis_size("data") > 1:
            fired = jax.lax.psum_scatter(fired, "data", scatter_dimension=1, tiled=True)
        statistics = jax.lax.pmean(statistics, "data")
        finite_N = _finite(grads) & jnp.isfinite(statistics["loss"])

        def where_finite(new: jax.Array, old: jax.typing.ArrayLike) -> jax.Array:
            return jnp.where(jnp.expand_dims(finite_N, range(1, new.ndim)), new, old)

        params, second_moments = optimiser.update(state.params, grads, state.second_moments, rate * state.learning_rate)
        l1_coefficient = state.l1_coefficient
        if self.config.target_l0:
            excess = jnp.log(statistics["l0"] / jnp.array(self.config.target_l0))
            l1_coefficient = l1_coefficient * jnp.exp(gain * jnp.clip(excess, -1, 1))
        statistics["l1_coefficient"] = state.l1_coefficient
        return dataclasses.replace(
            state,
            params=jax.tree.map(where_finite, params, state.params),
            second_moments=second_moments._replace(
                nu=jax.tree.map(where_finite, second_moments.nu, state.second_moments.nu)
            ),
            l1_coefficient=where_finite(l1_coefficient, state.l1_coefficient),
            steps_since_fired=jnp.where(finite_N[:, None] & (fired > 0), 0, state.steps_since_fired + 1),
            skipped=state.skipped + ~finite_N,
            skipped_in_row=jnp.where(finite_N, 0, state.skipped_in_row + 1),
        ), jax.tree.map(lambda value: where_finite(value, 0), statistics) | {"updates": finite_N.astype(jnp.float32)}


def _finite(grads: dict[str, jax.Array]) -> jax.Array:
    """Whether all of an SAE's gradients [N, ...] are, and their squares, on every device."""
    squares_N = sum(jnp.square(value).sum(range(1, value.ndim)) for value in grads.values())
    return jax.lax.psum((~jnp.isfinite(squares_N)).astype(jnp.int32), ("latent", "data")) == 0


def gather(part: jax.Array, axis: int | None) -> jax.Array:
    """An SAE's parameter whole along `data`, where `axis` runs over features."""
    # Where there is nothing to gather, the compiler would still copy.
    if axis is None or jax.lax.axis_size("data") == 1:
        return part
    return jax.lax.all_gather(part, "data", axis=axis, tiled=True)
