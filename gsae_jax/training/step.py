"""The train program: source of activations -> exchange buffer -> SAE updates, one jitted function.

One forward pass serves every stack. The language model is placed by the compiler (its batch lies along `data`); the
SAE updates are written for one device and mapped over the mesh by `shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import errors, loggers
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import buffer, masking, scaling, sources
from gsae_jax.activations import store as store_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import contract, parameters
from gsae_jax.training import optimiser, resampling
from gsae_jax.training.end_to_end import EndToEnd, Rows
from gsae_jax.training.stacks import Stack, StackState

P = PartitionSpec
Metrics = dict[str, dict[str, jax.Array]]  # stack -> statistic -> [N]
Step = Callable[..., tuple["TrainState", Metrics, jax.Array]]


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
class Modules:
    """A language model of a run, without its parameters.

    Attributes:
        module: with no more layers than the sites need.
        whole: the whole model, if the loss of a stack has the KL divergence of its predictions; else None.
    """

    module: Any
    whole: Any = None

    @property
    def loaded(self) -> Any:
        """The module whose parameters all functions take: `whole`, or `module` where that is enough."""
        return self.module if self.whole is None else self.whole


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of an experiment: `measure` and `fill` make the first state, `train_step` moves it on.

    Attributes:
        config: the experiment.
        mesh: of the run.
        models: the language models by name, "" that of `config.lm`; none where activations are stored.
        special_tokens: ids of tokens that SAEs never see.
        stacks: of the experiment.
        widths: of every site that a stack reads or writes.
    """

    config: config_lib.Experiment
    mesh: Mesh
    models: Mapping[str, Modules]
    special_tokens: tuple[int, ...]
    stacks: tuple[Stack, ...]
    widths: dict[str, int]

    @classmethod
    def build(
        cls,
        config: config_lib.Experiment,
        mesh: Any,
        checkpoint: Checkpoint | None,
        special_tokens: tuple[int, ...],
        stored: store_lib.Store | None = None,
        others: Mapping[str, Checkpoint] = MappingProxyType({}),
    ) -> "Program":
        """The program of an experiment, from the settings of its language models; the trainer's and the planner's.

        Args:
            config: the experiment.
            mesh: of the run.
            checkpoint: of `config.lm`; None with a store, where nothing of it is needed.
            special_tokens: ids of tokens that SAEs do not see if `activations.drop_special_tokens`.
            stored: the store of activations, if no language model runs.
            others: of `config.lms`.

        Raises:
            UserError: a size that the mesh does not divide; a logger or architecture that does not exist; a site or
                context that the language model or the store does not have; or a stack that cannot be built.
        """
        mesh_lib.check(config, mesh)
        loggers.check_names(config.loggers)
        checkpoints = {"": checkpoint, **others} if checkpoint is not None and stored is None else {}
        widths = {} if stored is None else _check_store(config, stored)
        for model, each in checkpoints.items():
            whole = each.module()
            loading.check_context(whole, config.data.context_length, model)
            widths |= {sites_lib.at(hook, model): width for hook, width in loading.site_widths(whole).items()}
        for name, read in config.stacks.items():
            for field, names in (("site", read.sites), ("target", read.targets)):
                for site in names if stored is None else ():
                    sites_lib.check(site, widths, f"stacks.{name}.{field}")
        with_kl = [name for name, stack in config.stacks.items() if stack.kl_fraction]
        rows, data = config.rows_per_call // config.updates_per_call, mesh.shape["data"]
        if with_kl and rows % data:
            raise UserError(
                f"is {config.train.batch_size}, {rows} rows of data.context_length, which the mesh's `data` axis "
                f"({data}) does not divide, as stacks.{with_kl[0]}.kl_fraction needs; write a multiple of "
                f"{data * config.data.context_length}, or a larger mesh.latent",
                "train.batch_size",
            )
        predicted = {sites_lib.parts(config.stacks[name].targets[0])[1] for name in with_kl}
        models = {}
        for model, each in checkpoints.items():
            own = [site for site in config.sites if sites_lib.parts(site)[1] == model]
            layers = 1 + max(map(sites_lib.layer_of, own))
            models[model] = Modules(each.module(layers, mesh), each.module(mesh=mesh) if model in predicted else None)
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
        dropped = special_tokens if config.activations.drop_special_tokens else ()
        used = {site: width for site, width in widths.items() if site in config.sites}
        return cls(config, mesh, models, dropped, stacks, used)

    def check_new(self) -> None:
        """Raises `UserError` for options of a new run that do nothing."""
        for stack in self.stacks:
            with errors.within(f"stacks.{stack.name}"):
                contract.check_new(stack.architecture, stack.sae, bool(stack.config.start_from))

    @property
    def _norm_multiple(self) -> float:
        return self.config.activations.max_norm_multiple or math.inf

    @property
    def module(self) -> Any:
        """`Modules.module` of `config.lm`; None where activations are stored."""
        return self.models[""].module if self.models else None

    @property
    def loaded(self) -> Any:
        """`Modules.loaded` of `config.lm`."""
        return self.models[""].loaded

    def source_params(self, params_of: Callable[[str, Any], Any]) -> Any:
        """What the source computes with, from the parameters of each model: `params_of(name, module)`.

        They are in a dict by name if there are several models.
        """
        params = {name: params_of(name, model.loaded) for name, model in self.models.items()}
        return params if self.config.lms else params[""]

    def lm_params(self, source_params: Any, model: str) -> Any:
        """The parameters of one model, of those of the source."""
        return source_params[model] if self.config.lms else source_params

    def dtype_of(self, model: str) -> str:
        """The type of one model."""
        return (self.config.lms[model] if model else self.config.lm).dtype

    @cached_property
    def source(self) -> sources.Source:
        """Where the activations come from."""
        if not self.models:
            rows, dtype = self.config.rows_per_call, self.config.lm.dtype
            return sources.Stored(self.widths, self.mesh, self.special_tokens, rows, dtype)
        return self._source(self.config.sites)

    def _source(self, sites: Sequence[str], whole: bool = False) -> sources.Source:
        """`whole`: read from the whole models, where there are any."""
        rows, forwards = self.config.rows_per_call, self.config.forwards_per_call
        each = {}
        for name, model in self.models.items():
            own = [hook for hook, of in map(sites_lib.parts, sites) if of == name]
            module = model.loaded if whole else model.module
            each[name] = sources.LanguageModel(module, self.mesh, own, self.special_tokens, rows, forwards)
        return sources.LanguageModels(each) if self.config.lms else each[""]

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
            state = TrainState(
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
            # Without weak types, such as that of `jnp.full(F, -2.0)`: an update returns none, and would compile again.
            return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), state)

        return jax.jit(init, out_shardings=self.shardings())()

    def emptied(self, state: TrainState) -> TrainState:
        """The state with an empty buffer."""
        store = jax.jit(self._empty_store, out_shardings=self.shardings().store)()
        return dataclasses.replace(state, store=store)

    def _empty_store(self) -> buffer.Store:
        batch = self.config.train.batch_size
        shape = batch, self.config.activations.buffer_size // batch
        return {site: jnp.zeros((*shape, D), self.config.lm_of(site).dtype) for site, D in self.widths.items()}

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
    def train_step(self) -> Step:
        """(state, source's parameters, batch) -> (state `updates_per_call` later, mean statistics, dropped).

        Means are over the updates that an SAE made, and NaN where it made none; `dropped` is the state's.
        """
        update, updates, specs = self._update(), self.config.updates_per_call, self.specs()

        def on_device(stacks, store, fresh, valid, slots_UxB, shift, units, step):
            arrange = partial(buffer.arrange, updates=updates, shift=shift)
            inputs = (jax.tree.map(arrange, fresh), arrange(valid), slots_UxB, jnp.arange(updates))
            stacks, store, metrics = update(stacks, store, inputs, units, step, {})
            return stacks, store, _means(metrics)

        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(specs.stacks, P("data"), P("data"), P("data"), P(None, "data"), P(), P(), P()),
            out_specs=(specs.stacks, P("data"), P()),
        )

        def call(state, source_params, rows, fresh, valid, slots_UxB, shift):
            units = state.scales, state.means
            return mapped(state.stacks, state.store, fresh, valid, slots_UxB, shift, units, state.step)

        return self._step(self.source, call)

    def step_at(self, step: int) -> Step:
        """The train step for the call that begins at this step: `train_step`, or one of `config.kl_stacks`.

        The statistics of those stacks have `kl`, in nats per prediction.
        """
        names = self.config.kl_stacks(step)
        if names and names not in self._steps_with_kl:
            self._steps_with_kl[names] = self._step_with_kl(names)
        return self._steps_with_kl[names] if names else self.train_step

    def compile_kl(self, *arguments: Any) -> None:
        """Compile the last train step of the run, if it has the KL divergence: no other needs as much memory.

        `arguments`: of a train step.

        Raises:
            UserError: the devices have no room for it.
        """
        last = self.config.train.steps - 1
        names = self.config.kl_stacks(last)
        if not names:
            return
        step: Any = self.step_at(last)
        available, needed = mesh_lib.memory(self.mesh), math.inf
        try:
            memory = step.lower(*arguments).compile().memory_analysis()
            needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            needed += memory.temp_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        if needed > available:
            size = f"{needed / 2**30:,.1f} GiB" if math.isfinite(needed) else "more memory"
            raise UserError(
                f"adds updates that need {size} on each device, and {available / 2**30:,.1f} GiB are available; lower "
                "activations.rows_per_forward, raise mesh.latent, or write 0 in a new run (python -m gsae_jax.plan "
                "estimates the memory of a run)",
                f"stacks.{names[0]}.kl_fraction",
            )

    @cached_property
    def _steps_with_kl(self) -> dict[tuple[str, ...], Step]:
        return {}

    def _step_with_kl(self, names: tuple[str, ...]) -> Step:
        """A train step in which the loss of these stacks has the KL divergence (`end_to_end`).

        The language model runs before each update. The compiler places it, so the updates are mapped one by one.
        """
        update, updates, specs = self._update(), self.config.updates_per_call, self.specs()
        stacks_with_kl = [stack for stack in self.stacks if stack.name in names]
        spliced = {stack.name: sites_lib.parts(stack.config.targets[0])[1] for stack in stacks_with_kl}
        end_to_end = {
            model: EndToEnd(self.models[model].whole, self.mesh, self.config.forwards_per_call, model)
            for model in {*spliced.values()}
        }
        sites = {*self.config.sites}
        for model, of_model in end_to_end.items():
            sites |= of_model.sites([stack for stack in stacks_with_kl if spliced[stack.name] == model])
        arranged = P(None, "data")
        of_grads = {stack.name: stack.split(specs.stacks[stack.name].params)[0] for stack in stacks_with_kl}
        mapped = jax.shard_map(
            update,
            mesh=self.mesh,
            in_specs=(specs.stacks, P("data"), (arranged, arranged, arranged, P()), P(), P(), of_grads),
            out_specs=(specs.stacks, P("data"), P()),
        )

        def call(state, source_params, rows, fresh, valid, slots_UxB, shift):
            arrange = partial(buffer.arrange, updates=updates, shift=shift)
            units = state.scales, state.means

            def one_update(carry, inputs):
                (stacks, store), (inputs, rows) = carry, inputs
                grads, kl = {}, {}
                for stack in stacks_with_kl:
                    model = spliced[stack.name]
                    grads[stack.name], kl[stack.name] = end_to_end[model].gradients(
                        stack,
                        stacks[stack.name],
                        rows,
                        self.lm_params(source_params, model),
                        units,
                        state.norm_limits,
                    )
                inputs = jax.tree.map(lambda x: x[None], inputs)
                stacks, store, metrics = mapped(stacks, store, inputs, units, state.step, grads)
                metrics = jax.tree.map(lambda x: x[0], metrics)
                for name, kl_N in kl.items():
                    metrics[name]["kl"] = jnp.where(metrics[name]["updates"] > 0, kl_N, 0)
                return (stacks, store), metrics

            inputs = (jax.tree.map(arrange, fresh), arrange(valid), slots_UxB, jnp.arange(updates))
            of_stacks = {
                stack.name: stack.without_moments(
                    state.stacks[stack.name], state.step == self.config.kl_start(stack.name)
                )
                for stack in self.stacks
            }
            start = of_stacks, state.store
            (stacks, store), metrics = jax.lax.scan(one_update, start, (inputs, rows.split(updates)))
            return stacks, store, _means(metrics)

        return self._step(self._source(tuple(sites), whole=True), call)

    def _step(self, source: sources.Source, updates: Callable[..., Any]) -> Step:
        """A train step.

        Args:
            source: of the activations.
            updates: (state, source's parameters, `Rows`, fresh activations, which of them are valid, slots of the
                buffer, shift of `buffer.arrange`) -> (stacks, buffer, statistics).
        """
        config = self.config

        def train_step(state: TrainState, source_params: Any, batch: Any) -> tuple[TrainState, Metrics, jax.Array]:
            activations, allowed = source(source_params, batch)
            fresh = {site: x for site, x in activations.items() if site in config.sites}
            valid = masking.valid(allowed, fresh, state.norm_limits)
            # The draws are of the whole mesh, so that a run does not depend on its shape.
            strata, slots = next(iter(state.store.values())).shape[:2]
            shape = config.updates_per_call, strata
            slots_UxB = jax.random.randint(self._key(state.key, state.step, 1), shape, 0, slots)
            shift = jax.random.randint(self._key(state.key, state.step, 2), (), 0, allowed.shape[1])
            rows = Rows(batch, allowed, activations)
            stacks, store, metrics = updates(state, source_params, rows, fresh, valid, slots_UxB, shift)
            dropped = state.dropped + (allowed & ~valid).sum()
            for name, stack in stacks.items():
                metrics[name] |= {"skipped": stack.skipped, "skipped_in_row": stack.skipped_in_row}
                metrics[name]["dead"] = (stack.steps_since_fired >= config.train.dead_after).sum(1)
            step = state.step + config.updates_per_call
            state = dataclasses.replace(state, stacks=stacks, store=store, step=step, dropped=dropped)
            return state, metrics, dropped

        everywhere = NamedSharding(self.mesh, P())
        return jax.jit(train_step, donate_argnums=0, out_shardings=(self.shardings(), everywhere, everywhere))

    def _update(self) -> Callable[..., Any]:
        """(stacks, buffer, inputs, units, step, KL's gradients) -> (stacks, buffer, statistics [updates, N]).

        On one device of the mesh (inside `shard_map`). `inputs` have an entry for each update: what goes into the
        buffer and where, and the update's number. KL's gradients are of one update.
        """
        config = self.config
        schedule = optimiser.schedule(config.train, config.resampled_at)
        fractions = {stack.name: stack.config.coefficient_warmup_fraction or 0.0 for stack in self.stacks}
        gains = {name: optimiser.gain(config.train, fraction) for name, fraction in fractions.items()}
        warmups = {name: optimiser.coefficient_warmup(config.train.steps, part) for name, part in fractions.items()}

        def update(stacks, store, inputs, units, step, kl_grads):
            def one_update(carry, inputs):
                stacks, store = carry
                fresh, valid_B, slots_B, number = inputs
                store, served = buffer.exchange(store, slots_B, fresh, valid_B)
                batch = scaling.all_inputs(served, *units)
                at = step + number
                stepped = {}
                for stack in self.stacks:
                    warmup, grads = warmups[stack.name], kl_grads.get(stack.name)
                    stepped[stack.name] = stack.update(
                        stacks[stack.name],
                        batch,
                        at,
                        schedule(at),
                        gains[stack.name](at),
                        config.train.dead_after,
                        None if warmup is None else warmup(at),
                        None if grads is None else stack.transposed(grads),
                    )
                return ({name: state for name, (state, _) in stepped.items()}, store), {
                    name: m for name, (_, m) in stepped.items()
                }

            stacks = {stack.name: stack.transpose(stacks[stack.name]) for stack in self.stacks}
            (stacks, store), metrics = jax.lax.scan(one_update, (stacks, store), inputs)
            return {stack.name: stack.transpose(stacks[stack.name]) for stack in self.stacks}, store, metrics

        return update

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


def _check_store(config: config_lib.Experiment, stored: store_lib.Store) -> dict[str, int]:
    """The widths of a store's sites; raises `UserError` for an experiment that cannot be trained from it."""
    fields: dict[str, str] = {}
    for name, stack in config.stacks.items():
        fields |= dict.fromkeys(stack.sites, f"stacks.{name}.site")
        fields |= {site: f"stacks.{name}.target" for site in stack.targets if site not in fields}
    stored.check_sites(fields)
    if config.data.context_length != (there := stored.manifest.context_length):
        raise UserError(
            f"is {config.data.context_length}, but rows of the store have {there} tokens; write {there}",
            "data.context_length",
        )
    return stored.manifest.widths


def _means(metrics: Metrics) -> Metrics:
    """The means of statistics [updates, N] over the updates that an SAE made."""
    means = {}
    for name, of_stack in metrics.items():
        made = of_stack.pop("updates").sum(0)
        # An SAE that made no update has no mean. NaN says so; 0 would be the best loss of all.
        means[name] = {key: value.sum(0) / jnp.where(made > 0, made, jnp.nan) for key, value in of_stack.items()}
    return means
