"""The train program: source of activations -> exchange buffer -> SAE updates, one jitted function.

One forward pass serves every stack. The language model is placed by the compiler (its batch lies along `data`); the
SAE updates are written for one device and mapped over the mesh by `shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import loggers
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import buffer, masking, scaling, sources
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.sites import check as check_site
from gsae_jax.lms.sites import layer_of
from gsae_jax.saes import parameters
from gsae_jax.training import optimiser, resampling
from gsae_jax.training.stacks import Stack, StackState

P = PartitionSpec
Metrics = dict[str, dict[str, jax.Array]]  # stack -> statistic -> [N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that training changes or a resumed run must know.

    Attributes:
        stacks: name -> StackState.
        store: site -> [batch, slots, D], the exchange buffer in the language model's units and dtype.
        scales: site -> what activations, less their mean, are multiplied by so that E||inputs||^2 = D.
        means: site -> [D], which inputs are centred by; empty without `activations.center`.
        norm_limits: site -> the norm above which a token is dropped.
        key: what every random draw folds the step into.
        step: SAE updates so far.
        dropped: tokens kept from the SAEs so far because an activation was not finite or its norm extreme.
    """

    stacks: dict[str, StackState]
    store: buffer.Store
    scales: dict[str, jax.Array]
    means: dict[str, jax.Array]
    norm_limits: dict[str, jax.Array]
    key: jax.Array
    step: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of an experiment: `measure` and `fill` make the first state, `train_step` moves it on."""

    config: config_lib.Experiment
    mesh: Mesh
    module: Any
    special_tokens: tuple[int, ...]
    stacks: tuple[Stack, ...]

    @classmethod
    def build(
        cls, config: config_lib.Experiment, mesh: Any, checkpoint: Checkpoint, special_tokens: tuple[int, ...]
    ) -> "Program":
        """The program of an experiment, from the settings of its language model alone; the trainer's and the planner's.

        Raises:
            UserError: a size that the mesh does not divide; a logger or architecture that does not exist; a site or
                context that the language model does not have; or a stack that cannot be built.
        """
        mesh_lib.check(config, mesh)
        loggers.check_names(config.loggers)
        whole = checkpoint.module()
        loading.check_context(whole, config.data.context_length)
        widths = loading.site_widths(whole)
        for name, read in config.stacks.items():
            for field, names in (("site", read.sites), ("target", read.targets)):
                for site in names:
                    check_site(site, widths, f"stacks.{name}.{field}")
        module = checkpoint.module(1 + max(map(layer_of, config.sites)), mesh)
        latent, platform = mesh.shape["latent"], mesh_lib.platform(mesh)
        stacks = tuple(
            Stack.build(name, stack, widths, config.train.compute_dtype, config.train.step, latent, platform)
            for name, stack in config.stacks.items()
        )
        for stack in stacks if config.activations.center else ():
            if not parameters.can_center(stack.architecture):
                raise UserError(
                    f"is True, but no parameter of {stack.config.architecture!r} (stacks.{stack.name}) can "
                    "absorb the mean; write False, or give it a parameter of role CENTER or a function `shifted`",
                    "activations.center",
                )
        return cls(config, mesh, module, special_tokens if config.activations.drop_special_tokens else (), stacks)

    @property
    def _norm_multiple(self) -> float:
        return self.config.activations.max_norm_multiple or math.inf

    @cached_property
    def source(self) -> sources.LanguageModel:
        """Where the activations come from."""
        rows, forwards = self.config.rows_per_call, self.config.forwards_per_call
        return sources.LanguageModel(self.module, self.mesh, self.config.sites, self.special_tokens, rows, forwards)

    @property
    def widths(self) -> dict[str, int]:
        """The width of every site that a stack reads or writes."""
        return self.source.widths

    def unfolded(self, name: str, params: dict[str, Any], state: TrainState) -> dict[str, np.ndarray]:
        """Parameters [N, ...] of a stack that are in the language model's units, for inputs in those of training."""
        stack = next(stack for stack in self.stacks if stack.name == name)
        inputs, targets = (
            [parameters.Units(float(state.scales[site]), np.asarray(state.means.get(site, 0.0))) for site in sites]
            for sites in (stack.config.sites, stack.config.targets)
        )
        members = [
            parameters.unfold(stack.architecture, {key: value[n] for key, value in params.items()}, inputs, targets)
            for n in range(len(stack.config))
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *members)

    def specs(self) -> Any:
        """The mesh axes of every array of the state."""
        everywhere = {site: P() for site in self.config.sites}
        state: Any = TrainState
        return state(
            stacks={stack.name: stack.specs() for stack in self.stacks},
            store={site: P("data") for site in self.config.sites},
            scales=everywhere,
            means=everywhere if self.config.activations.center else {},
            norm_limits=everywhere,
            key=P(),
            step=P(),
            dropped=P(),
        )

    def shardings(self) -> Any:
        """The placement of every array of the state."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs())

    @cached_property
    def measure(self) -> Callable[..., dict[str, dict[str, jax.Array]]]:
        """(source's parameters, batch) -> {site: `scaling.statistics`} over tokens that are not dropped."""

        def measure(source_params: Any, batch: Any) -> dict[str, dict[str, jax.Array]]:
            activations, allowed = self.source(source_params, batch)
            valid = masking.valid(allowed, activations)
            return {site: scaling.statistics(x, valid, self._norm_multiple) for site, x in activations.items()}

        return jax.jit(measure, out_shardings=NamedSharding(self.mesh, P()))

    def init(self, sites: dict[str, scaling.Site]) -> TrainState:
        """The untrained state with an empty buffer, for the sites as they were measured."""

        def init() -> TrainState:
            return TrainState(
                stacks={stack.name: stack.init() for stack in self.stacks},
                store=self._empty_store(),
                scales={site: jnp.float32(math.sqrt(D / sites[site].mean_square)) for site, D in self.widths.items()},
                means={site: jnp.asarray(sites[site].mean) for site in self.specs().means},
                norm_limits={
                    site: jnp.float32(scaling.norm_limit(self._norm_multiple, sites[site].median_norm))
                    for site in self.widths
                },
                key=jax.random.key_data(jax.random.key(self.config.seed)),
                step=jnp.int32(0),
                dropped=jnp.int32(0),
            )

        return jax.jit(init, out_shardings=self.shardings())()

    def emptied(self, state: TrainState) -> TrainState:
        """The state with an empty buffer."""
        store = jax.jit(self._empty_store, out_shardings=self.shardings().store)()
        return dataclasses.replace(state, store=store)

    def _empty_store(self) -> buffer.Store:
        batch = self.config.train.batch_size
        shape = batch, self.config.activations.buffer_size // batch
        return {site: jnp.zeros((*shape, D), self.config.lm.dtype) for site, D in self.widths.items()}

    def abstract_state(self) -> TrainState:
        """The shape and the placement of every array of the state."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lambda: self.init(scaling.standard(self.widths))),
            self.shardings(),
        )

    @cached_property
    def fill(self) -> Callable[..., tuple[TrainState, jax.Array]]:
        """(state, filled slots [strata], source's parameters, batch, call) -> (state, filled slots), with more."""

        def fill(
            state: TrainState, count_B: jax.Array, source_params: Any, batch: Any, call: jax.Array
        ) -> tuple[TrainState, jax.Array]:
            fresh, allowed = self.source(source_params, batch)
            valid = masking.valid(allowed, fresh, state.norm_limits)
            shift = jax.random.randint(self._key(state.key, call, 0), (), 0, allowed.shape[1])

            @partial(
                jax.shard_map,
                mesh=self.mesh,
                in_specs=(P("data"), P("data"), P("data"), P("data"), P()),
                out_specs=P("data"),
            )
            def on_device(store, count_B, fresh, valid, shift):
                arrange = partial(buffer.arrange, updates=self.config.updates_per_call, shift=shift)
                return buffer.fill(store, count_B, jax.tree.map(arrange, fresh), arrange(valid))

            store, count_B = on_device(state.store, count_B, fresh, valid, shift)
            return dataclasses.replace(state, store=store), count_B

        return jax.jit(
            fill, donate_argnums=(0, 1), out_shardings=(self.shardings(), NamedSharding(self.mesh, P("data")))
        )

    @cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, Metrics, jax.Array]]:
        """(state, source's parameters, batch) -> (state `updates_per_call` later, mean statistics, dropped).

        Means are over the updates that an SAE made, and NaN where it made none; `dropped` is the state's.
        """
        config, updates = self.config, self.config.updates_per_call
        schedule = optimiser.schedule(config.train, config.resampled_at)
        fractions = {stack.name: stack.config.coefficient_warmup_fraction or 0.0 for stack in self.stacks}
        gains = {name: optimiser.gain(config.train, fraction) for name, fraction in fractions.items()}
        warmups = {name: optimiser.coefficient_warmup(config.train.steps, part) for name, part in fractions.items()}
        specs = self.specs()

        def on_device(stacks, store, fresh, valid, slots_UxB, shift, units, step):
            arrange = partial(buffer.arrange, updates=updates, shift=shift)

            def one_update(carry, inputs):
                stacks, store = carry
                fresh, valid_B, slots_B, number = inputs
                store, served = buffer.exchange(store, slots_B, fresh, valid_B)
                batch = scaling.all_inputs(served, *units)
                at = step + number
                stepped = {}
                for stack in self.stacks:
                    warmup = warmups[stack.name]
                    stepped[stack.name] = stack.update(
                        stacks[stack.name],
                        batch,
                        at,
                        schedule(at),
                        gains[stack.name](at),
                        config.train.dead_after,
                        None if warmup is None else warmup(at),
                    )
                return ({name: state for name, (state, _) in stepped.items()}, store), {
                    name: m for name, (_, m) in stepped.items()
                }

            inputs = (jax.tree.map(arrange, fresh), arrange(valid), slots_UxB, jnp.arange(updates))
            stacks = {stack.name: stack.transpose(stacks[stack.name]) for stack in self.stacks}
            (stacks, store), metrics = jax.lax.scan(one_update, (stacks, store), inputs)
            stacks = {stack.name: stack.transpose(stacks[stack.name]) for stack in self.stacks}
            for name, of_stack in metrics.items():
                made = of_stack.pop("updates").sum(0)
                # An SAE that made no update has no mean. NaN says so; 0 would be the best loss of all.
                metrics[name] = {
                    key: value.sum(0) / jnp.where(made > 0, made, jnp.nan) for key, value in of_stack.items()
                }
            return stacks, store, metrics

        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(specs.stacks, P("data"), P("data"), P("data"), P(None, "data"), P(), P(), P()),
            out_specs=(specs.stacks, P("data"), P()),
        )

        def train_step(state: TrainState, source_params: Any, batch: Any) -> tuple[TrainState, Metrics, jax.Array]:
            fresh, allowed = self.source(source_params, batch)
            valid = masking.valid(allowed, fresh, state.norm_limits)
            # The draws are of the whole mesh, so that a run does not depend on its shape.
            strata, slots = next(iter(state.store.values())).shape[:2]
            slots_UxB = jax.random.randint(self._key(state.key, state.step, 1), (updates, strata), 0, slots)
            shift = jax.random.randint(self._key(state.key, state.step, 2), (), 0, allowed.shape[1])
            units = state.scales, state.means
            stacks, store, metrics = mapped(
                state.stacks, state.store, fresh, valid, slots_UxB, shift, units, state.step
            )
            dropped = state.dropped + (allowed & ~valid).sum()
            for name, stack in stacks.items():
                metrics[name] |= {"skipped": stack.skipped, "skipped_in_row": stack.skipped_in_row}
                metrics[name]["dead"] = (stack.steps_since_fired >= config.train.dead_after).sum(1)
            state = dataclasses.replace(state, stacks=stacks, store=store, step=state.step + updates, dropped=dropped)
            return state, metrics, dropped

        everywhere = NamedSharding(self.mesh, P())
        return jax.jit(train_step, donate_argnums=0, out_shardings=(self.shardings(), everywhere, everywhere))

    @cached_property
    def resample(self) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:
        """state -> (state in which dead features began again, {stack: how many of each SAE [N]})."""
        config, specs = self.config, self.specs()

        def on_device(stacks, store, slots_S, scales, means, key):
            activations = {site: jnp.swapaxes(x[:, slots_S], 0, 1) for site, x in store.items()}
            inputs = partial(scaling.all_inputs, scales=scales, means=means)
            resampled = {
                stack.name: resampling.resample(
                    stack, stacks[stack.name], activations, inputs, key, config.train.dead_after
                )
                for stack in self.stacks
            }
            states = {name: state for name, (state, _) in resampled.items()}
            return states, {name: count for name, (_, count) in resampled.items()}

        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(specs.stacks, P("data"), P(), P(), P(), P()),
            out_specs=(specs.stacks, P()),
        )

        def resample(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            key = self._key(state.key, state.step, 3)
            batch, slots = next(iter(state.store.values())).shape[:2]
            looked_at = min(slots, -(-resampling.INPUTS // batch))
            slots_S = jax.random.permutation(jax.random.fold_in(key, 0), slots)[:looked_at]
            stacks, counts = mapped(
                state.stacks, state.store, slots_S, state.scales, state.means, jax.random.fold_in(key, 1)
            )
            return dataclasses.replace(state, stacks=stacks), counts

        return jax.jit(resample, donate_argnums=0, out_shardings=(self.shardings(), NamedSharding(self.mesh, P())))

    @staticmethod
    def _key(key: jax.Array, number: jax.Array, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), number), purpose)
