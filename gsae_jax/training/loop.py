"""The trainer: prepares, resumes or starts, trains, and saves."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from gsae_jax import config_trees, loggers, processes
from gsae_jax import mesh as mesh_lib
from gsae_jax.config import Experiment
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import metrics_log, run_directory
from gsae_jax.storage.facts import Facts
from gsae_jax.training import lengthening, optimiser, starting
from gsae_jax.training.divergence import Divergence
from gsae_jax.training.interruption import Signals
from gsae_jax.training.preparation import Prepared, prepare
from gsae_jax.training.progress import Progress
from gsae_jax.training.step import TrainState

logger = logging.getLogger(__name__)

RETRIES = (1, 5, 25)  # seconds before the last state is saved again, if that failed


def train(config: Experiment, path: epath.PathLike, starts: Mapping[str, dict[str, Any]] | None = None) -> bool:
    """Train the experiment in a run directory, from its newest checkpoint if there is one.

    Args:
        starts: parameters [N, ...] that stacks of a new run start from, in the language model's units.

    Returns:
        True when training is complete, False when a signal came before the end (state saved).

    Raises:
        UserError: the config or the directory cannot be used; nothing was written in it then.
        TrainingError: an SAE skipped `train.max_skipped` updates in a row, or the last state could not be saved.
    """
    workdir = run_directory.Workdir(path)
    try:
        return _train(prepare(config, workdir, starts or {}))
    finally:
        workdir.release()


def _train(run: Prepared) -> bool:
    """Resume or start, and train; the run's directory is made when all that can be checked is."""
    workdir, before = run.workdir, run.before
    logger.info(run.about)
    _compile_ahead(run)
    state = _started(run) if before is None else None
    if processes.first():
        workdir.create(config_trees.to_dict(run.config), run.latest)
        for hint in loggers.hints(run.config.loggers, workdir.path):
            logger.info(hint)
    processes.wait("the run's directory")
    workdir.config()
    workdir.check_latest(run.latest)
    checkpoints = checkpoints_lib.Checkpoints(workdir, run.config.checkpoint)
    try:
        if state is None:
            state = _resumed(run, checkpoints)
        return _Loop(run, state, checkpoints).run()
    finally:
        checkpoints.close()


def _compile_ahead(run: Prepared) -> None:
    """Raises `UserError` for a last part of training that an accelerator has no room for."""
    config, mesh = run.config, run.program.mesh
    is_ahead = (run.latest or 0) < config.train.steps and any(stack.kl_fraction for stack in config.stacks.values())
    if is_ahead and mesh_lib.platform(mesh) != "cpu":
        shape = config.rows_per_call, config.data.context_length
        rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=mesh_lib.sharding(mesh, "data"))
        run.program.compile_kl(run.program.abstract_state(), run.source_params, rows)


def _started(run: Prepared) -> TrainState:
    """The first state of a new run."""
    config, program = run.config, run.program
    state = starting.start(program, run.source_params, run.stream, most=run.parts[-1] // config.rows_per_call)
    for name, params in run.starts.items():
        own = state.stacks[name].params
        started = program.unfolded(name, params, state)
        state.stacks[name].params = jax.device_put(started, jax.tree.map(lambda x: x.sharding, own))
    return state


def _resumed(run: Prepared, checkpoints: checkpoints_lib.Checkpoints) -> TrainState:
    """The state of the checkpoint that the run continues from, and its place in the text."""
    assert run.before is not None
    assert run.latest is not None
    state, position = starting.restore(run.program, checkpoints, run.latest, run.before.buffer)
    try:
        run.stream.set_state(position)
    except (LookupError, TypeError, ValueError) as error:  # grain has no error of its own
        what = f"the position of checkpoint {run.latest} in the text is not as it was written ({error})"
        raise UserError(f"{what}; put its files back", "--workdir") from error
    logger.info(f"continuing from step {run.latest:,}{_unlike(run.before.machine, run.facts.machine)}")
    for name, code in run.before.code.items():
        if code != run.facts.code.get(name):
            architecture = run.config.stacks[name].architecture
            logger.warning(f"{architecture} has changed since step {run.latest:,}; the run continues with the new code")
    if run.steps_before is not None:
        logger.info(f"train.steps is {run.config.train.steps:,} now ({run.steps_before:,} before)")
        for sentence in lengthening.consequences(run.config, run.steps_before, run.latest, run.parts):
            logger.info(f"- {sentence}")
        for name in lengthening.late(run.config, run.steps_before, run.latest):
            stack = next(stack for stack in run.program.stacks if stack.name == name)
            shardings = jax.tree.map(lambda x: x.sharding, state.stacks[name])
            state.stacks[name] = jax.device_put(stack.without_moments(state.stacks[name]), shardings)
    if state.store:
        return state
    logger.info(
        "the exchange buffer was not saved (checkpoint.buffer=False) and is filled with the text that comes next: "
        "batches differ from those of a run that was not interrupted"
    )
    return starting.filled(run.program, run.program.emptied(state), run.source_params, run.stream)


def _unlike(before: dict[str, Any], now: dict[str, Any]) -> str:
    differing = [f"{name} ({before[name]} before, {now[name]} now)" for name in before if before[name] != now.get(name)]
    if not differing:
        return ""
    return f", with other {', '.join(differing)}: equal to float tolerance, not bit for bit"


def logged(statistics: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the metrics say of a step, by `{stack}/{statistic}`: a number for each SAE, with gamma from its parts."""
    values: dict[str, Any] = {}
    for name, of_stack in statistics.items():
        dot = of_stack.pop("x_hat_dot_x")
        gamma = of_stack.pop("x_hat_sq") / np.where(dot == 0, np.nan, dot)
        values |= {f"{name}/{key}": value.tolist() for key, value in sorted((of_stack | {"gamma": gamma}).items())}
    return values


@dataclasses.dataclass
class _Call:
    """A call of the train step whose statistics are still to be looked at.

    Attributes:
        step: after the call.
        statistics: of the call.
        dropped: tokens so far.
        tokens: [rows, T], what it trained on; None where a store has no tokens.
    """

    step: int
    statistics: Any
    dropped: jax.Array
    tokens: np.ndarray | None


class _Loop:
    """Calls the train step, logs and saves, until training is complete, interrupted, or has lost an SAE."""

    def __init__(self, run: Prepared, state: TrainState, checkpoints: checkpoints_lib.Checkpoints):
        self._prepared, self._state, self._checkpoints = run, state, checkpoints
        self._step = self._saved = self._logged = int(state.step)
        self._facts = dataclasses.replace(
            run.facts,
            scales={site: float(scale) for site, scale in state.scales.items()},
            means={site: np.asarray(mean_D).tolist() for site, mean_D in state.means.items()},
            norm_limits={site: float(limit) for site, limit in state.norm_limits.items()},
        )
        as_json = config_trees.to_dict(run.config)
        first = processes.first()
        self._metrics = metrics_log.Metrics(run.workdir, self._step, run.config.loggers, as_json) if first else None
        self._logged_at, self._is_warm = time.perf_counter(), False

    def run(self) -> bool:
        """Whether training is complete and no signal came.

        Raises:
            TrainingError: an SAE was lost, or the text cannot be read any more.
            UserError: the text cannot be used.
        """
        config, total = self._prepared.config, self._prepared.config.train.steps
        unusable: TrainingError | UserError | None = None
        last: _Call | None = None  # its statistics are read while the next call runs
        with Signals() as signals, Progress(total, self._step, list(config.stacks)) as progress:
            divergence = Divergence(config, self._prepared.program.widths, progress, self._facts.skips)
            in_row = {name: stack.skipped_in_row for name, stack in self._state.stacks.items()}
            divergence.count(self._step, in_row)
            while self._step < total and not divergence.lost:
                if signals.stop(self._step // config.updates_per_call):
                    break
                try:
                    tokens, placed = self._next_batch()
                except (TrainingError, UserError) as error:  # the text cannot be read any more, or used
                    if jax.process_count() > 1:  # the others wait in the next call
                        raise
                    unusable = error
                    break
                call = self._call(tokens, placed, progress)
                if last is not None:
                    self._look_at(last, divergence, progress)
                last = call
                if self._step // config.checkpoint.every > self._saved // config.checkpoint.every:
                    self._save(call, divergence)
            if last is not None:
                self._look_at(last, divergence, progress)
                if self._step > self._saved:
                    self._save(last, divergence)
            unmeasured = self._step == total and signals.stop(total // config.updates_per_call)
        self._finish(last, divergence)
        if unusable:
            raise unusable
        if divergence.lost:
            message = divergence.write(self._prepared.workdir, self._step)
            if self._step < total:
                raise TrainingError(message)
            logger.warning(message)  # the report has a note about it as well
        if self._step < total:
            kept = f"step {self._saved:,} is saved" if self._saved else "no step was made yet"
            logger.info(f"{signals.received}: {kept}; the same command continues from there")
        elif unmeasured:
            logger.info(f"{signals.received}: training is complete and saved; the same command measures the SAEs")
        return self._step == total and not unmeasured

    def _next_batch(self) -> tuple[np.ndarray | None, Any]:
        """The tokens of a batch, and the batch on the mesh; where it cannot be used, the stream is as before."""
        stream, source = self._prepared.stream, self._prepared.program.source
        position = stream.get_state()
        try:
            rows = next(stream)
            return source.tokens(rows), source.place(rows)
        except (TrainingError, UserError):
            stream.set_state(position)  # what was not trained on is not passed over when the run continues
            raise

    def _call(self, tokens: np.ndarray | None, placed: Any, progress: Progress) -> _Call:
        """Train on a batch, and resample where it is time."""
        config, program = self._prepared.config, self._prepared.program
        if new := [name for name in config.kl_stacks(self._step) if config.kl_start(name) == self._step]:
            progress.say(f"step {self._step:,}: from here on, the loss of {', '.join(new)} has the KL divergence")
        train_step = program.step_at(self._step)
        self._state, statistics, dropped = train_step(self._state, self._prepared.source_params, placed)
        self._step += config.updates_per_call
        if self._step in config.resampled_at:
            self._state, counts = program.resample(self._state)
            progress.say(f"step {self._step:,}: re-initialised dead features: {_named(counts)}")
        return _Call(self._step, statistics, dropped, tokens)

    def _look_at(self, call: _Call, divergence: Divergence, progress: Progress) -> None:
        """Look for SAEs that diverge, and log."""
        divergence.look(call.step, call.statistics, call.tokens)
        jax.block_until_ready(call.statistics)  # one call ahead is enough: the bar and signals stay true
        progress.ended(call.step)
        self._log(call, progress)
        if self._metrics and call.step == self._saved:
            self._metrics.sync()  # now with the line of the step that was saved

    def _log(self, call: _Call, progress: Progress) -> None:
        train, per_call = self._prepared.config.train, self._prepared.config.updates_per_call
        every = train.log_every
        # Which steps are logged depends on the step alone, so that a resumed run's metrics are an uninterrupted run's.
        now = time.perf_counter()
        if call.step // every == (call.step - per_call) // every and call.step != train.steps:
            if progress.is_warm and not self._is_warm:  # from here on, tokens/s does not count the compiler
                self._logged, self._logged_at, self._is_warm = call.step, now, True
            return
        statistics = jax.device_get(call.statistics)
        tokens_per_second = (call.step - self._logged) * train.batch_size / (now - self._logged_at)
        values = logged(statistics) | {
            "dropped": int(call.dropped),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if self._metrics:
            self._metrics.write(call.step, values)
        progress.show(call.step, values)
        self._logged, self._logged_at, self._is_warm = call.step, now, progress.is_warm

    def _save(self, call: _Call, divergence: Divergence) -> None:
        """Save the state, which is that after the call."""
        config, state = self._prepared.config, self._state
        stack, _, name = config.checkpoint.keep_best.partition("/")
        score = math.nan
        # The statistics are of the updates of this call.
        first = call.step - config.updates_per_call
        if stack and first >= optimiser.constant_from(config.train.steps, config.stacks[stack]):
            score = float(jax.device_get(call.statistics[stack][name]).mean())
        divergence.look(call.step, call.statistics, call.tokens)
        l1_coefficients = {
            name: jax.device_get(stack.l1_coefficient).tolist()
            for name, stack in state.stacks.items()
            if config.stacks[name].l1_coefficients
        }
        facts: Facts = dataclasses.replace(self._facts, l1_coefficients=l1_coefficients, skips=divergence.skips)
        params, rest = starting.saved_parts(state, config.checkpoint.buffer)
        position, best = self._prepared.stream.get_state(), score if math.isfinite(score) else None
        self._checkpoints.save(call.step, params, rest, position, facts, best)
        self._saved = call.step

    def _finish(self, last: _Call | None, divergence: Divergence) -> None:
        """Wait for the last checkpoint, and save it again where that failed; raises `TrainingError` if it fails."""
        workdir, step = self._prepared.workdir, self._step
        self._checkpoints.wait()
        for pause in RETRIES:
            if step == 0 or workdir.latest_step() == step:
                break
            time.sleep(pause)
            if last is not None:
                self._save(last, divergence)
            self._checkpoints.wait()
        if self._metrics:
            self._metrics.close(complete=step == self._prepared.config.train.steps)
        if step and (newest := workdir.latest_step()) != step:
            raise TrainingError(
                f"step {step:,} could not be saved, the newest checkpoint is of step {newest or 0:,}; make room, and "
                "the same command continues from there"
            )


def _named(counts: dict[str, jax.Array]) -> str:
    return ", ".join(f"{name} {' '.join(map(str, values.tolist()))}" for name, values in jax.device_get(counts).items())
