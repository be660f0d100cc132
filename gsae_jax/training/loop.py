"""The trainer: checks everything first, then prepares, resumes or starts, trains, and saves."""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from gsae_jax import config as config_lib
from gsae_jax import loggers, processes
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import scaling
from gsae_jax.config import ConfigError, Experiment, TrainingError
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import parameters
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import metrics_log, reading, run_directory, writing
from gsae_jax.storage.facts import Facts
from gsae_jax.training.step import Program, TrainState

RETRIES = (1, 5, 25)  # seconds before the last state is saved again, if that failed
FAR = 10  # an SAE has diverged whose squared error is more than this many times that of a zero reconstruction


def train(config: Experiment, path: epath.PathLike, starts: Mapping[str, dict[str, Any]] | None = None) -> bool:
    """Train the experiment in a run directory, from its newest checkpoint if there is one.

    Args:
        starts: parameters [N, ...] that stacks of a new run start from, in the language model's units.

    Returns:
        True when training is complete, False when a signal ended it early (state saved).

    Raises:
        ConfigError: the config or the directory cannot be used; nothing was written in it then.
        TrainingError: an SAE skipped `train.max_skipped` updates in a row, or the last state could not be saved.
    """
    workdir = run_directory.Workdir(path)
    try:
        return _train(config, workdir, starts or {})
    finally:
        workdir.release()


def _train(config: Experiment, workdir: run_directory.Workdir, starts: Mapping[str, dict[str, Any]]) -> bool:
    as_json = config_lib.to_dict(config)
    processes.agree("--config", as_json, "start every process with the same command and the same files")
    workdir.check(as_json)
    if processes.first():  # which alone logs
        loggers.check(config.loggers)
    mesh = mesh_lib.make_mesh(config.mesh)
    checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
    program, tokenizer = build(config, mesh, checkpoint)
    for name, params in starts.items():
        stack = next(stack for stack in program.stacks if stack.name == name)
        table = stack.architecture.PARAMETERS
        if any(value.shape[1:] != table[key].sizes(stack.sae) for key, value in params.items()):
            raise ConfigError(f"stacks.{name}.start_from", "is of another language model; write a run of this one")
    lm_params = checkpoint.params(program.module, config.lm.dtype)
    lm_fingerprint = checkpoint.fingerprint()
    processes.agree("lm.path", lm_fingerprint, "give every process the same language model")
    d_vocab = program.module.config.d_vocab
    rows = rows_lib.open_rows(config.data, "train", tokenizer, _tokens_needed(config), d_vocab)
    processes.agree("data", rows.fingerprint, "give every process the same text")
    stream = rows_lib.batches(rows, config.rows_per_call, config.seed, mesh_lib.local_rows(mesh, config.rows_per_call))
    # The report's text must be there too.
    held_out = rows_lib.held_out_rows(config, tokenizer, config.evaluation.tokens, d_vocab)
    latest = workdir.latest_step()
    if latest is not None:
        if processes.first():
            workdir.hold()
            workdir.set_aside(newer_than=workdir.sound_step())
        processes.wait("a sound checkpoint")
        latest = workdir.latest_step()
    processes.agree("--workdir", latest, "their checkpoints are not the same; write a directory that they share")
    before = None if latest is None else workdir.facts(latest)
    if before is not None:
        workdir.check_model(before, config.lm, lm_fingerprint, "lm.path")
        if before.rows != rows.fingerprint:
            raise ConfigError(
                "data", "the text has changed since this run began; put it back, or start a new --workdir"
            )
    if latest is None:
        processes.say(f"{len(rows):,} rows of {config.data.context_length} tokens; filling the exchange buffer")
        state = start(program, lm_params, stream, most=len(rows) // config.rows_per_call)
        for name, params in starts.items():
            own = state.stacks[name].params
            started = program.unfolded(name, params, state)
            state.stacks[name].params = jax.device_put(started, jax.tree.map(lambda x: x.sharding, own))
    if processes.first():
        workdir.create(as_json)
    processes.wait("the run's directory")
    workdir.config()
    if workdir.latest_step() != latest:
        raise ConfigError("--workdir", "another process has trained here meanwhile; run the command again")
    checkpoints = checkpoints_lib.Checkpoints(workdir, config.checkpoint)
    machine = _machine(mesh)
    fingerprints = {name: parameters.fingerprint(params) for name, params in starts.items()}
    facts = Facts(
        rows=rows.fingerprint,
        widths=program.widths,
        held_out=held_out.fingerprint,
        lm=lm_fingerprint,
        starts=before.starts if before and before.starts else fingerprints,
        buffer=config.checkpoint.buffer,
        machine=machine,
        skips=before.skips if before else {},
    )
    try:
        if before is not None and latest is not None:
            state, position = _restore(program, checkpoints, latest, before.buffer)
            try:
                stream.set_state(position)
            except (LookupError, TypeError, ValueError) as error:  # grain has no error of its own
                what = f"the position of checkpoint {latest} in the text is not as it was written ({error})"
                raise ConfigError("--workdir", f"{what}; put its files back") from error
            processes.say(f"continuing from step {latest:,}{_unlike(before.machine, machine)}")
            if not state.store:
                processes.say(
                    "the exchange buffer was not saved (checkpoint.buffer=False) and is filled with the text that "
                    "comes next: batches differ from those of a run that was not interrupted"
                )
                state = _filled(program, program.emptied(state), lm_params, stream)
        return _loop(config, program, lm_params, stream, state, workdir, checkpoints, facts)
    finally:
        checkpoints.close()


def build(config: Experiment, mesh: jax.sharding.Mesh, checkpoint: Checkpoint) -> tuple[Program, Any]:
    """The train program and the tokenizer, from the language model's settings alone.

    Raises:
        ConfigError: as `Program.build`, or sizes that the devices have no room for.
    """
    tokenizer = checkpoint.tokenizer()
    program = Program.build(config, mesh, checkpoint, loading.special_tokens(tokenizer))
    state = program.abstract_state()
    fresh = config.rows_per_call * config.data.context_length * sum(program.widths.values())
    needed = {f"stacks.{name}": mesh_lib.device_bytes(stack) for name, stack in state.stacks.items()}
    needed["activations.buffer_size"] = mesh_lib.device_bytes(state.store)
    needed["activations.rows_per_forward"] = fresh * jnp.dtype(config.lm.dtype).itemsize // mesh.shape["data"]
    mesh_lib.check_memory(mesh, needed)
    return program, tokenizer


def start(program: Program, lm_params: Any, stream: Iterator[np.ndarray], most: int | None = None) -> TrainState:
    """The first state: sites measured on the first tokens, in `most` calls at the most, and a full buffer."""
    config = program.config
    calls = -(-config.activations.scale_tokens // (config.rows_per_call * config.data.context_length))
    calls = calls if most is None else min(calls, max(1, most))
    batches = [jax.device_get(program.measure(lm_params, program.source.place(next(stream)))) for _ in range(calls)]
    measured = {}
    for site in config.sites:
        measured[site], warnings = scaling.combine([batch[site] for batch in batches], config.activations.center)
        square = measured[site].mean_square
        if not np.isfinite(square) or square == 0:
            raise ConfigError(
                f"site {site}",
                f"has mean squared norm {square} on the first tokens; the language model or the text is unusable",
            )
        for warning in warnings:
            processes.warn(f"site {site}: {warning}")
    return _filled(program, program.init(measured), lm_params, stream)


def _filled(program: Program, state: TrainState, lm_params: Any, stream: Iterator[np.ndarray]) -> TrainState:
    """The state with an empty buffer, filled."""
    batch, slots = next(iter(state.store.values())).shape[:2]
    count = jax.device_put(np.zeros(batch, np.int32), mesh_lib.sharding(program.mesh, "data"))
    call = 0
    while call == 0 or int(count.min()) < slots:
        state, count = program.fill(state, count, lm_params, program.source.place(next(stream)), call)
        call += 1
        if call > 20 * (slots + 10):
            raise ConfigError(
                "activations",
                "the exchange buffer does not fill: nearly every token is dropped; loosen max_norm_multiple",
            )
    return state


def _machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What must be the same for a run to continue bit for bit."""
    return {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": f"data {mesh.shape['data']} x latent {mesh.shape['latent']}",
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }


def _unlike(before: dict[str, Any], now: dict[str, Any]) -> str:
    differing = [f"{name} ({before[name]} before, {now[name]} now)" for name in before if before[name] != now.get(name)]
    if not differing:
        return ""
    return f", with other {', '.join(differing)}: equal to float tolerance, not bit for bit"


def _loop(
    config: Experiment,
    program: Program,
    lm_params: Any,
    stream: Any,
    state: TrainState,
    workdir: run_directory.Workdir,
    checkpoints: checkpoints_lib.Checkpoints,
    facts: Facts,
) -> bool:
    step = logged = saved = int(state.step)
    unusable: TrainingError | ConfigError | None = None
    total, per_call, every = config.train.steps, config.updates_per_call, config.train.log_every
    facts = dataclasses.replace(
        facts,
        scales={site: float(scale) for site, scale in state.scales.items()},
        means={site: np.asarray(mean_D).tolist() for site, mean_D in state.means.items()},
        norm_limits={site: float(limit) for site, limit in state.norm_limits.items()},
    )
    metrics = (
        metrics_log.Metrics(workdir, step, config.loggers, config_lib.to_dict(config)) if processes.first() else None
    )
    logged_at = time.perf_counter()

    def log(at: int, statistics: Any, dropped: jax.Array) -> None:
        nonlocal logged, logged_at
        # Which steps are logged depends on the step alone, so that a resumed run's metrics are an uninterrupted run's.
        if at // every == (at - per_call) // every and at != total:
            jax.block_until_ready(statistics)  # one call ahead is enough: the bar and signals stay true
            return
        values = jax.device_get(statistics)
        now = time.perf_counter()
        tokens_per_second = (at - logged) * config.train.batch_size / (now - logged_at)
        shown = progress.show(values) | {"dropped": int(dropped), "tokens_per_second": round(tokens_per_second, 1)}
        if metrics:
            metrics.write(at, shown)
        progress.bar.set_postfix_str(f"{tokens_per_second:,.0f} tokens/s", refresh=False)
        logged, logged_at = at, now

    def save() -> None:
        nonlocal saved
        stack, _, name = config.checkpoint.keep_best.partition("/")
        score = float(jax.device_get(statistics[stack][name]).mean()) if stack else math.nan
        divergence.look(step, statistics, trained_on)
        l1_coefficients = {name: jax.device_get(s.l1_coefficient).tolist() for name, s in state.stacks.items()}
        now = dataclasses.replace(facts, l1_coefficients=l1_coefficients, skips=divergence.skips)
        parts = saved_parts(state, config.checkpoint.buffer)
        checkpoints.save(step, *parts, stream.get_state(), now, score if math.isfinite(score) else None)
        saved = step

    with _Signals() as signals, _Progress(total, step, list(config.stacks)) as progress:
        # Statistics of the previous call, which are read while the next one runs.
        waiting: tuple[int, Any, jax.Array, np.ndarray] | None = None
        divergence = _Divergence(config, program.widths, progress, facts.skips)
        divergence.count(step, {name: stack.skipped_in_row for name, stack in state.stacks.items()})
        while step < total and not signals.stop(step // per_call) and not divergence.lost:
            position = stream.get_state()
            try:
                tokens_RxT = next(stream)
                placed = program.source.place(tokens_RxT)
            except (TrainingError, ConfigError) as error:  # the text cannot be read any more, or used
                if jax.process_count() > 1:  # the others wait in the next call
                    raise
                unusable = error
                stream.set_state(position)  # what was not trained on is not passed over when the run continues
                break
            state, statistics, dropped = program.train_step(state, lm_params, placed)
            step += per_call
            if step in config.resampled_at:
                state, counts = program.resample(state)
                progress.say(f"step {step:,}: dead features that began again: {_named(counts)}")
            if waiting is not None:
                divergence.look(waiting[0], waiting[1], waiting[3])
                log(*waiting[:3])
                if metrics and waiting[0] == saved:
                    metrics.sync()  # now with the line of the step that was saved
            trained_on = tokens_RxT
            waiting = step, statistics, dropped, trained_on
            progress.bar.update(per_call)
            if step // config.checkpoint.every > saved // config.checkpoint.every:
                save()
        if waiting is not None:
            divergence.look(waiting[0], waiting[1], waiting[3])
            log(*waiting[:3])
        if step > saved:
            save()
    checkpoints.wait()
    for pause in RETRIES:
        if step == 0 or workdir.latest_step() == step:
            break
        time.sleep(pause)
        save()
        checkpoints.wait()
    if metrics:
        metrics.close(complete=step == total)
    if step and (newest := workdir.latest_step()) != step:
        raise TrainingError(
            f"step {step:,} could not be saved, the newest checkpoint is of step {newest or 0:,}; make room, and the "
            "same command continues from there"
        )
    if unusable:
        raise unusable
    if divergence.lost:
        message = divergence.write(workdir, step)
        if step < total:
            raise TrainingError(message)
        processes.warn(message)  # the report has a note about it as well
    if step < total:
        kept = f"step {saved:,} is saved" if saved else "no step was made yet"
        processes.say(f"{signals.received}: {kept}; the same command continues from there")
    return step == total


class _Divergence:
    """Watches for SAEs that diverge: whose numbers are not finite, or whose error is far above that of zeros."""

    def __init__(
        self, config: Experiment, widths: dict[str, int], progress: "_Progress", skips: dict[str, dict[str, Any]]
    ):
        """`widths`: of the sites; `skips`: the attribute as the checkpoint recorded it."""
        self._config, self._widths, self._progress = config, widths, progress
        self._far: set[str] = set()
        # SAE that skips updates -> the step of the call in which that began, and the tokens of that call.
        self.skips = dict(skips)
        self.lost: list[str] = []

    def look(self, step: int, statistics: dict[str, dict[str, jax.Array]], tokens_RxT: np.ndarray) -> None:
        """Say which SAEs begin to diverge in the call that ended at this step; may be called twice for a step."""
        fields = ("skipped_in_row", "mse", "x_hat_sq", "x_hat_dot_x")
        values = jax.device_get({name: {field: of[field] for field in fields} for name, of in statistics.items()})
        self.count(step, {name: of["skipped_in_row"] for name, of in values.items()}, tokens_RxT)
        # A wide random dictionary begins with large reconstructions.
        if step <= max(self._config.train.warmup_steps, self._config.train.steps // 10):
            return
        for name, of in values.items():
            # The squared error of a zero reconstruction, divided by D. The scale makes it 1 in the mean, and some
            # batches have more.
            D = sum(self._widths[site] for site in self._config.stacks[name].targets)
            zero_N = np.maximum(1, of["mse"] + (2 * of["x_hat_dot_x"] - of["x_hat_sq"]) / D)
            for index, far in enumerate(of["mse"] > FAR * zero_N):
                sae = f"{name}_{index}"
                if not far:
                    self._far.discard(sae)
                elif sae not in self._far:
                    self._far.add(sae)
                    self._progress.say(
                        f"step {step:,}: {sae} has diverged: its squared error is more than {FAR} times that of a zero "
                        "reconstruction; lower its learning rate in a new run"
                    )

    def count(self, step: int, in_row: dict[str, Any], tokens_RxT: np.ndarray | None = None) -> None:
        """Record since when SAEs skip updates, and which are `lost`, by how many each skipped in a row."""
        per_call = self._config.updates_per_call
        counts = {f"{name}_{i}": int(n) for name, of in jax.device_get(in_row).items() for i, n in enumerate(of)}
        for sae, skipped in counts.items():
            began = -(-(step - skipped + 1) // per_call) * per_call
            if skipped == 0:
                self.skips.pop(sae, None)
            elif self.skips.get(sae, {}).get("step") != began:
                # Checkpoints of earlier versions do not have the tokens of the calls before them.
                tokens = None if tokens_RxT is None or began != step else tokens_RxT.tolist()
                self.skips[sae] = {"step": began, "tokens": tokens}
                self._progress.say(f"step {began:,}: {sae} skips updates: its loss or gradients are not finite")
        self.lost = [sae for sae, skipped in counts.items() if skipped >= self._config.train.max_skipped]

    def write(self, workdir: run_directory.Workdir, step: int) -> str:
        """Add the SAEs that are lost to `diverged.json` in the run's directory; returns the message."""
        path = workdir.path / "diverged.json"
        if processes.first():
            try:
                records = reading.load_json(path)
            except (OSError, ValueError):
                records = {}
            for sae in self.lost:
                earlier, record = records.get(sae), self.skips[sae]
                same = isinstance(earlier, dict) and earlier.get("step") == record["step"]
                if earlier is None or not (same or record["tokens"] is None):
                    records[sae] = record
            writing.write_text(path, json.dumps(records) + "\n")
        since = ", ".join(f"{sae} since step {self.skips[sae]['step']:,}" for sae in self.lost)
        return (
            f"not finite in {self._config.train.max_skipped} updates in a row: {since}; step {step:,} is saved and "
            f"{path} has the tokens that were read when it began; lower the learning rate of these SAEs in a new run"
        )


def _named(counts: dict[str, jax.Array]) -> str:
    return ", ".join(f"{name} {' '.join(map(str, values.tolist()))}" for name, values in jax.device_get(counts).items())


def saved_parts(state: TrainState, buffer: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds of a state: the SAEs' parameters by stack, and the rest, with or without the buffer."""
    params = {name: stack.params for name, stack in state.stacks.items()}
    rest = vars(state) | {"stacks": {name: dataclasses.replace(s, params={}) for name, s in state.stacks.items()}}
    if not buffer:
        rest["store"] = {}
    if not state.means:  # as in checkpoints of earlier versions
        del rest["means"]
    return params, rest


def _restore(
    program: Program, checkpoints: checkpoints_lib.Checkpoints, step: int, buffer: bool
) -> tuple[TrainState, dict[str, Any]]:
    params, rest, data = checkpoints.restore(step, *saved_parts(program.abstract_state(), buffer))
    state = TrainState(**{"means": {}} | rest)
    for name, stack in state.stacks.items():
        stack.params = params[name]
    return state, data


def _tokens_needed(config: Experiment) -> int:
    """Tokens that a run reads at most once: training, measuring and filling (twice the buffer, for dropped tokens)."""
    return (
        config.train.steps * config.train.batch_size
        + config.activations.scale_tokens
        + 2 * config.activations.buffer_size
    )


class _Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into a name to look at between steps; a second one ends the process at once.

    If one of several processes receives a signal, all end after the same step, which JAX determines.
    """

    received = ""

    def stop(self, call: int) -> bool:
        """Whether to end before this call of the train step."""
        if not self._together:
            return bool(self.received)
        if not multihost_utils.reached_preemption_sync_point(call):
            return False
        self.received = self.received or "SIGTERM"
        return True

    def __enter__(self) -> "_Signals":
        self._together = jax.distributed.is_initialized()
        self._before = processes.on_interruption(self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            print(f"{signal.Signals(number).name} again: ended without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)  # an orderly exit would wait for what is being saved
        self.received = signal.Signals(number).name
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # JAX handles this one, and informs the other processes

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class _Progress:
    """A bar with tokens/s and the time that remains; on a terminal, a line for each stack below it."""

    def __init__(self, total: int, step: int, stacks: list[str]):
        every: Any = {"dynamic_ncols": True, "disable": not processes.first()}
        self.bar = tqdm.tqdm(total=total, initial=step, unit="step", mininterval=1.0, **every)
        below: Any = {"bar_format": "{desc}"} | every | ({} if sys.stderr.isatty() else {"disable": True})
        self._lines = {name: tqdm.tqdm(position=1 + index, **below) for index, name in enumerate(stacks)}

    def show(self, statistics: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        """Put L0, loss and gamma of every SAE on the lines; returns these and the others by `{stack}/{name}`."""
        values: dict[str, Any] = {}
        for name, stack in statistics.items():
            dot = stack.pop("x_hat_dot_x")
            gamma = stack.pop("x_hat_sq") / np.where(dot == 0, np.nan, dot)
            values |= {f"{name}/{key}": value.tolist() for key, value in sorted((stack | {"gamma": gamma}).items())}
            columns = (("L0", stack["l0"], ".1f"), ("loss", stack["loss"], ".3f"), ("γ", gamma, ".3f"))
            texts = (f"{title} {' '.join(f'{value:{form}}' for value in column)}" for title, column, form in columns)
            self._lines[name].set_description_str(f"  {name}: {' | '.join(texts)}")
        return values

    def say(self, text: str) -> None:
        """A line above the bar, from the first process."""
        if processes.first():
            self.bar.write(text, file=sys.stderr)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        for line in (self.bar, *self._lines.values()):
            line.close()
