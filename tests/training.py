"""What tests that train have in common."""

import dataclasses
import json
import signal

import jax
import numpy as np

import gsae_jax
from gsae_jax import mesh as mesh_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms.checkpoints import Checkpoint, open_others
from gsae_jax.training import preparation, starting


def begin(experiment, mesh=None):
    """A program, its first state, language-model parameters and the stream of tokens."""
    mesh = mesh or mesh_lib.make_mesh(experiment.mesh)
    checkpoint, others = Checkpoint.open(experiment.lm.path), open_others(experiment.lms)
    program, tokenizer = preparation.build(experiment, mesh, checkpoint, others)
    each = {"": checkpoint, **others}
    lm_params = program.source_params(lambda name, module: each[name].params(module, program.dtype_of(name)))
    rows = rows_lib.open_rows(experiment.data, "train", tokenizer, 2**20)
    stream = rows_lib.batches(rows, experiment.rows_per_call, experiment.seed)
    return program, starting.start(program, lm_params, stream), lm_params, stream


def advance(program, state, lm_params, stream, calls):
    for _ in range(calls):
        train_step = program.step_at(int(state.step))
        state, metrics, _ = train_step(state, lm_params, program.source.place(next(stream)))
    return state, jax.device_get(metrics)


def with_(experiment, **changes):
    """The experiment with fields of groups replaced: `train={"steps": 3}`."""
    groups = {name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(experiment, **groups)


def single_device_mesh():
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((1, 1), ("data", "latent"), devices=jax.devices()[:1], axis_types=(auto, auto))


def params_of(path):
    return {name: jax.device_get(sae.params) for name, sae in gsae_jax.load(path).items()}


class Interrupting:
    """A stream that sends this process a SIGTERM with its last batch but `ahead`."""

    def __init__(self, stream, after):
        self.stream, self.left = stream, after

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return next(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def assert_same(ours, theirs):
    for name, params in theirs.items():
        for key, value in params.items():
            np.testing.assert_array_equal(ours[name][key], value, err_msg=f"{name} {key}")


def begin_calls(experiment):
    """How many batches of tokens measuring and filling take."""
    counting = []
    stream = begin(experiment)[3]
    position = stream.get_state()
    fresh = rows_lib.batches(
        rows_lib.open_rows(experiment.data, "train", gsae_jax.load_lm(experiment.lm.path).tokenizer, 2**20),
        experiment.rows_per_call,
        experiment.seed,
    )
    while fresh.get_state() != position:
        counting.append(next(fresh))
    return len(counting)


def metrics_without_time(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
