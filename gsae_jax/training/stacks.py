"""Stacks of SAEs on the mesh: their state, its placement, and one update."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import errors, plugins
from gsae_jax import mesh as mesh_lib
from gsae_jax.errors import UserError
from gsae_jax.saes import checks, contract, parameters
from gsae_jax.saes import features as features_lib
from gsae_jax.saes.features import Features, Sparsity
from gsae_jax.training import optimiser, sparsity

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StackState:
    """N SAEs of one shape; every array has a leading axis N.

    Attributes:
        params: the architecture's parameters, and the state that it has besides.
        second_moments: the optimiser's state (`optimiser.scale_by`), which has first moments where b1 is above 0.
        l1_coefficient: [N]; moves where the stack has a target of L0. NaN where the architecture has none.
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
    """What does not change in training: a stack's name, sites, architecture, and how its loss is computed."""

    name: str
    config: config_lib.Stack
    architecture: contract.Trainable
    sae: Any
    sparsity: Sparsity | None = None

    @classmethod
    def build(
        cls,
        name: str,
        config: config_lib.Stack,
        widths: Mapping[str, int],
        dtype: str,
        step: str = "dense",
        latent: int = 1,
        platform: str = "cpu",
    ) -> "Stack":
        """A stack of an experiment.

        Args:
            name: the stack's.
            config: its settings.
            widths: of the sites.
            dtype: of the products' operands.
            step: `train.step`.
            latent: shards of the dictionary.
            platform: of the devices.

        Raises:
            UserError: an unknown architecture, option or combination, or an architecture that breaks the contract.
        """
        with errors.within(f"stacks.{name}"):
            config = contract.with_recipe(config)
            architecture, sae = contract.build(config, widths, dtype)
            if not config.target and contract.writes_others(architecture):
                raise UserError(f"is missing; write the site that {config.architecture!r} predicts", "target")
            with errors.about("architecture"):
                checks.check(architecture, sae)
            if not contract.trains_features(architecture, sae) and (config.target_l0 or not config.start_from):
                options = ", ".join(f"{key}={value!r}" for key, value in config.options.items()) or "this architecture"
                if config.target_l0:
                    raise UserError(f"is {config.target_l0}, but {options} trains no features; write ()", "target_l0")
                why = f'is missing, but {options} trains no features; write start_from="RUN:STACK" to have some'
                raise UserError(why, "start_from")
        if latent > 1 and plugins.is_own(config.architecture):
            checks.check_shards(architecture, sae, latent)
        how = sparsity.of_stack(step, config, architecture, sae, latent, platform)
        return cls(name, config, architecture, sae, how)

    def batch(self, values: Mapping[str, Any]) -> tuple[contract.Activations, contract.Activations]:
        """What the architecture takes as inputs and as targets, of a value for each site."""
        several_in = isinstance(self.sae.d_in, tuple)
        inputs = tuple(values[site] for site in self.config.sites) if several_in else values[self.config.sites[0]]
        if not self.config.target:
            return inputs, inputs
        several_out = isinstance(self.sae.d_out, tuple)
        return inputs, (
            tuple(values[site] for site in self.config.targets) if several_out else values[self.config.targets[0]]
        )

    def init(self) -> StackState:
        """The untrained stack; an SAE's start depends on its seed only."""
        l1, learning_rates, seeds = (jnp.array(column) for column in zip(*self.config.numbers(), strict=True))
        params = jax.vmap(lambda seed: self.architecture.init(jax.random.key(seed), self.sae))(seeds)
        return StackState(
            params=params,
            second_moments=optimiser.scale_by(*self._decay_rates).init(self.split(params)[0]),
            l1_coefficient=l1.astype(jnp.float32),
            learning_rate=learning_rates.astype(jnp.float32),
            steps_since_fired=jnp.zeros((len(seeds), self.sae.width), jnp.int32),
            skipped=jnp.zeros(len(seeds), jnp.int32),
            skipped_in_row=jnp.zeros(len(seeds), jnp.int32),
        )

    def loss(
        self,
        params: dict[str, jax.Array],
        state: dict[str, jax.Array],
        inputs: Mapping[str, jax.Array],
        dead: Callable[[], jax.Array],
        step: jax.Array,
        coefficients: Mapping[str, jax.typing.ArrayLike],
        shards: contract.Shards = contract.WHOLE,
        features: Features | None = None,
    ) -> tuple[jax.Array, contract.Statistics]:
        """The loss of one SAE (`contract.Trainable.loss`); `inputs` [B, D] of every site."""
        batch = contract.Batch(*self.batch(inputs), dead, step)
        arguments = params, state, batch, coefficients, self.sae, shards
        if features is None:
            return self.architecture.loss(*arguments)
        return cast(contract.SparselyTrainable, self.architecture).loss(*arguments, features=features)

    def split(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What gradients train, and state."""
        return parameters.split(self.architecture, params)

    def specs(self) -> Any:
        """The mesh axes of every array of the state: features over all devices, first along `latent`."""

        def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
            parameter = self.architecture.PARAMETERS.get(str(getattr(path[-1], "key", "")))
            axis = None if parameter is None else parameter.axis
            return mesh_lib.over_features(None if axis is None else 1 + axis)

        abstract = jax.eval_shape(self.init)
        everywhere: Any = P()
        return dataclasses.replace(
            abstract,
            params=jax.tree_util.tree_map_with_path(spec, abstract.params),
            second_moments=jax.tree_util.tree_map_with_path(spec, abstract.second_moments),
            l1_coefficient=everywhere,
            learning_rate=everywhere,
            steps_since_fired=mesh_lib.over_features(1),
            skipped=everywhere,
            skipped_in_row=everywhere,
        )

    @property
    def _by_rows(self) -> frozenset[str]:
        """Parameters [D, F] that the sparse step trains as [F, D], as it reads and adds rows of features."""
        table = self.architecture.PARAMETERS if self.sparsity else {}
        return frozenset(name for name, parameter in table.items() if parameter.axis == 1 and parameter.trained)

    def without_moments(self, state: StackState, begins: jax.typing.ArrayLike = True) -> StackState:
        """The stack without moments of gradients, if its loss `begins` to have the KL divergence.

        The new gradients are several times as large: with the second moments of the old ones, the first updates would
        be as much too large, and undo training.
        """
        moments = jax.tree.map(lambda x: jnp.where(begins, jnp.zeros_like(x), x), state.second_moments)
        return dataclasses.replace(state, second_moments=moments)

    def transposed(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters [N, ...], or their gradients, in the layout of `update`, or back from it."""
        return {name: value.swapaxes(1, 2) if name in self._by_rows else value for name, value in values.items()}

    def transpose(self, state: StackState) -> StackState:
        """The state in the layout of `update`, or back from it."""

        moments = {kind: self.transposed(values) for kind, values in optimiser.moments(state.second_moments).items()}
        second_moments = state.second_moments._replace(**moments)
        return dataclasses.replace(state, params=self.transposed(state.params), second_moments=second_moments)

    def update(
        self,
        state: StackState,
        batch: dict[str, jax.Array],
        step: jax.Array,
        rate: jax.Array,
        gain: jax.typing.ArrayLike = 0.0,
        dead_after: int = 1000,
        warmup: jax.Array | None = None,
        kl_grads: dict[str, jax.Array] | None = None,
    ) -> tuple[StackState, dict[str, jax.Array]]:
        """One step on one device of the mesh (inside `shard_map`); returns batch means [N] of the loss's statistics.

        An SAE whose loss or gradients are not finite stays as it is, and its statistics are 0.

        Every device keeps, and updates, its own part of the features' parameters; for the loss it gathers those of
        its `latent` shard along `data`, inside the differentiated function: the transpose scatters the summed
        gradients back to the parts.

        Args:
            state: of the stack, as `transpose` gives it.
            batch: inputs [B, D] of every site, of this shard of the data.
            step: updates so far.
            rate: the schedule's factor on learning rates.
            gain: how far L0 off its target moves l1 coefficients.
            dead_after: updates without firing after which a feature is dead.
            warmup: from 0 to 1, the factor on l1 coefficients; None for 1.
            kl_grads: gradients of the KL divergence (`end_to_end`), as `transposed` gives them, which replace a part of
                those of the squared error; None outside of the part of training that has them.
        """
        table = self.architecture.PARAMETERS
        frozen = contract.frozen(self.architecture, self.sae)
        shards = contract.Shards("latent", "data")

        def whole(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                name: gather(value, 0 if name in self._by_rows else table[name].axis) for name, value in values.items()
            }

        def as_declared(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {name: value.T if name in self._by_rows else value for name, value in params.items()}

        def gradients(
            part: dict[str, jax.Array], own: dict[str, jax.Array], l1_coefficient: jax.Array, dead_F: jax.Array
        ) -> tuple[dict[str, jax.Array], contract.Statistics]:
            params, back = jax.vjp(whole, part)
            kept = whole(own)
            coefficients = {"l1_coefficient": l1_coefficient, "warmup": 1.0 if warmup is None else warmup}

            def loss(
                params: dict[str, jax.Array], batch: dict[str, jax.Array], features: Features | None = None
            ) -> tuple[jax.Array, contract.Statistics]:
                params = {
                    name: jax.lax.stop_gradient(value) if name in frozen else value
                    for name, value in as_declared(params).items()
                }
                value, statistics = self.loss(
                    params, kept, batch, lambda: gather(dead_F, 0), step, coefficients, shards, features
                )
                if kl_grads is not None:
                    value -= self.config.kl_weight * statistics.means["mse"]
                # The mean over `data` inside the differentiated function: its transpose sums the gradients, once,
                # rightly weighted.
                return jax.lax.pmean(value, "data"), statistics

            if self.sparsity:
                inputs, _ = self.batch(batch)
                active = contract.active(self.architecture)
                choice = features_lib.Choice(
                    lambda params: contract.encoder(self.architecture, as_declared(params), self.sae),
                    active
                    and (lambda pre_BxF: active(pre_BxF, lambda: gather(dead_F, 0), coefficients, self.sae, shards)),
                )
                grads, statistics = features_lib.gradients(
                    loss,
                    choice,
                    params,
                    batch,
                    inputs,
                    self.sae.dtype,
                    self.sparsity,
                    ("data", "latent"),
                )
            else:
                grads, statistics = jax.grad(loss, has_aux=True)(params, batch)
            return back(grads)[0], statistics

        # One by one and not under `vmap`: batched products run at half the rate of plain ones on a CPU, and what one
        # SAE needs in between can be used again by the next.
        trained, own = self.split(state.params)
        used = state.l1_coefficient if warmup is None else warmup * state.l1_coefficient
        each = trained, own, used, state.steps_since_fired >= dead_after
        if self.sparsity and len(self.config) > 1:
            # The sparse step takes seconds to compile, so it is compiled once for all.
            grads, (statistics, fired, new_own) = jax.lax.map(lambda one: gradients(*one), each)
        else:
            of_each = [gradients(*jax.tree.map(lambda value, n=n: value[n], each)) for n in range(len(self.config))]
            grads, (statistics, fired, new_own) = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_each)
        if kl_grads is not None:
            grads = jax.tree.map(jnp.add, grads, kl_grads)
        fired = fired.astype(jnp.int32)
        if jax.lax.axis_size("data") > 1:
            fired = jax.lax.psum_scatter(fired, "data", scatter_dimension=1, tiled=True)
        statistics = jax.lax.pmean(statistics, "data")
        broken_N = jax.lax.psum((~optimiser.finite(grads)).astype(jnp.int32), mesh_lib.FEATURES)
        finite_N = (broken_N == 0) & jnp.isfinite(statistics["loss"])

        def where_finite(new: jax.Array, old: jax.typing.ArrayLike) -> jax.Array:
            return jnp.where(jnp.expand_dims(finite_N, range(1, new.ndim)), new, old)

        if self.config.clip_norm:
            grads = self._clipped(grads)
        unit_rows = frozenset(name for name in trained if table[name].unit_rows and name not in frozen)
        rate_N = rate * state.learning_rate
        params, second_moments = optimiser.update(
            trained, grads, state.second_moments, rate_N, unit_rows, finite_N, *self._decay_rates
        )
        for name, value in new_own.items():
            params[name] = where_finite(scattered_mean(value, table[name].axis), own[name])
        l1_coefficient = state.l1_coefficient
        if self.config.target_l0:
            excess = jnp.clip(jnp.log(statistics["l0"] / jnp.array(self.config.target_l0)), -1, 1)
            excess = jnp.where(excess < 0, optimiser.GAIN_BELOW * excess, excess)
            l1_coefficient = l1_coefficient * jnp.exp(gain * excess)
        if self.config.l1_coefficients:
            statistics["l1_coefficient"] = used
        return dataclasses.replace(
            state,
            params=params,
            second_moments=second_moments,
            l1_coefficient=where_finite(l1_coefficient, state.l1_coefficient),
            steps_since_fired=where_finite(
                jnp.where(fired > 0, 0, state.steps_since_fired + 1), state.steps_since_fired
            ),
            skipped=state.skipped + ~finite_N,
            skipped_in_row=jnp.where(finite_N, 0, state.skipped_in_row + 1),
        ), jax.tree.map(lambda value: where_finite(value, 0), statistics) | {"updates": finite_N.astype(jnp.float32)}

    @property
    def _decay_rates(self) -> tuple[float, float]:
        """Adam's b1 and b2, which `build` has set."""
        return cast(float, self.config.b1), cast(float, self.config.b2)

    def _clipped(self, grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """This device's part of the gradients [N, ...], clipped by their norm over all devices, for each SAE.

        `clip_norm` is of losses that sum squared errors over a site, as other libraries' do. Ours divides them by D,
        so its gradients have a D-th of the norm. D is the mean width of several sites.
        """
        D = getattr(self.sae, "d_out", self.sae.d_in)
        limit = (self.config.clip_norm or 0.0) / float(np.mean(D))
        table = self.architecture.PARAMETERS
        spread = {name: value for name, value in grads.items() if table[name].axis is not None}
        whole = {name: value for name, value in grads.items() if name not in spread}
        squares_N = jax.lax.psum(optimiser.squared_norms(spread), mesh_lib.FEATURES) + optimiser.squared_norms(whole)
        return optimiser.clip(grads, jnp.sqrt(squares_N), limit)


def gather(part: jax.Array, axis: int | None) -> jax.Array:
    """An SAE's parameter whole along `data`, where `axis` runs over features."""
    # Where there is nothing to gather, the compiler would still copy.
    if axis is None or jax.lax.axis_size("data") == 1:
        return part
    return jax.lax.all_gather(part, "data", axis=axis, tiled=True)


def scattered_mean(value: jax.Array, axis: int | None) -> jax.Array:
    """The mean of a stack's array [N, ...] over the shards of `data`; of features, this device's part."""
    shards = jax.lax.axis_size("data")
    if axis is None or shards == 1:
        return jax.lax.pmean(value, "data")
    return jax.lax.psum_scatter(value, "data", scatter_dimension=1 + axis, tiled=True) / shards
