"""Runs from a store of activations against runs with the language model inside, and what the formats of a store cost.

    python benchmarks/store.py --config configs/quickstart.py [--out benchmarks/results/store-NAME.json]

Takes a config as `python -m gsae_jax.train` does. Three cases: that config; a random language model of GPT-2 small's
size, with one gated SAE at blocks.8.hook_resid_pre; and the two formats that a store could have.

Of the first two, the train loop is measured in turns, for one call of the train step: with the language model inside,
from a store, and from a batch that is placed already. To write the store is measured too. `--figure` draws the cost of
n runs, stored and not. `--directory` chooses the disk; files are read soon after they were written, so most are in
memory, and the figures are for a disk that keeps up.
"""

import json
import tempfile
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from array_record.python import array_record_module
from matplotlib.figure import Figure
from step import seconds

import gsae_jax
from gsae_jax import storing
from gsae_jax.activations import store as store_lib
from gsae_jax.lms import checkpoints, gelu, loading
from gsae_jax.lms.transformer import Model
from gsae_jax.storage import run_directory
from gsae_jax.training import loop, preparation

GPT2 = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "n_ctx": 1024}
ROWS = 2048  # of each format


def with_gpt2(config, folder):
    """The experiment with one SAE on a random language model of GPT-2 small's size, saved in a folder."""
    tokenizer = loading.load_lm().tokenizer
    module = Model(gelu.config(GPT2 | {"d_vocab": len(tokenizer)}))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    checkpoints.save(folder, module.config, params, tokenizer)
    config = config.copy_and_resolve_references()
    config.lm.path = str(folder)
    config.stacks = {
        "gated": gsae_jax.stack_config("gated", "blocks.8.hook_resid_pre", 3072, (1e-2,), learning_rates=(1e-3,))
    }
    return config


def prepared(config, folder):
    """A run that is ready to train: its program, stream and first state."""
    experiment = gsae_jax.experiment(config)
    run = preparation.prepare(experiment, run_directory.Workdir(folder), {})
    return run, loop._started(run)


def runs(name, config, folder, rounds, calls):
    """(lines, seconds of a run of the config and of writing its store) of one case."""
    config = config.copy_and_resolve_references()
    config.loggers = ()
    with_model, state = prepared(config, folder / "with_model")
    # A short store is enough to measure with, and the time of a whole one follows from it.
    tokens = 2 * preparation.tokens_needed(with_model.config, rounds * calls * with_model.config.updates_per_call)
    start = time.perf_counter()
    storing.of_model(config, storing.Wanted(str(folder / "store"), tokens=tokens))
    writing = time.perf_counter() - start
    store = store_lib.Store.open(folder / "store")
    written = sum(store.manifest.rows.values()) * store.manifest.context_length
    config.data.source = f"store:{folder / 'store'}"
    stored, stored_state = prepared(config, folder / "stored")
    placed = stored.program.source.place(next(stored.stream))

    def train(run, state, batch):
        waiting = None
        for _ in range(calls):
            state[0], metrics, _ = run.program.train_step(state[0], run.source_params, batch())
            jax.block_until_ready(waiting)
            waiting = metrics
        jax.block_until_ready(state[0])

    states = [state], [stored_state]
    measured = seconds(
        (
            lambda: train(with_model, states[0], lambda: with_model.program.source.place(next(with_model.stream))),
            lambda: train(stored, states[1], lambda: stored.program.source.place(next(stored.stream))),
            lambda: train(stored, states[1], lambda: placed),
        ),
        rounds,
    )
    inside, from_store, without_reading = (taken / calls for taken in measured)
    experiment = with_model.config
    number = experiment.train.steps // experiment.updates_per_call
    needed = preparation.tokens_needed(experiment)
    of_run = {"model": inside * number, "store": from_store * number, "write": writing / written * needed}
    lines = [
        {"case": name, "part": part, "call_seconds": taken, "of_whole": taken / inside}
        for part, taken in (
            ("with the language model", inside),
            ("from a store", from_store),
            ("from a store, without reading", without_reading),
        )
    ]
    lines[1] |= {
        "reading": from_store / without_reading - 1,
        "megabytes": store.manifest.row_bytes * needed / 1e6 / store.manifest.context_length,
    }
    return lines, of_run


def formats(folder, rounds):
    """Seconds to write and to read rows of 128 activations of width 768 in float32, in each of the two formats."""
    x = np.random.default_rng(0).normal(size=(ROWS, 128, 768)).astype(np.float32)
    manifest = store_lib.Manifest.planned(
        dtype="float32",
        context_length=128,
        stride=128,
        widths={"x": 768},
        rows={"train": ROWS, "test": 0},
        planned_rows={"train": ROWS, "test": 0},
        seed=0,
        has_tokens=False,
        special_tokens=(),
        model={},
        tokenizer="",
        text="",
        source={},
    )
    spec = store_lib._spec(store_lib.paths.of(folder / "tensorstore"), x.shape, "float32", manifest)
    array = tensorstore.open(spec, create=True).result()
    file = str(folder / "x.array_record")
    order = np.random.default_rng(1).permutation(ROWS)
    pieces = [range(start, start + 32) for start in range(0, ROWS, 32)]

    def write_records():
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
        for row in x:
            writer.write(row.tobytes())
        writer.close()

    def read_records(batches):
        reader = array_record_module.ArrayRecordReader(file)
        for rows in batches:
            np.stack([np.frombuffer(row, np.float32).reshape(128, 768) for row in reader.read([int(n) for n in rows])])
        reader.close()

    def read_arrays(batches):
        for rows in batches:
            if isinstance(rows, range):
                array[rows.start : rows.stop].read().result()
            else:
                np.concatenate([read.result() for read in [array[n : n + 1].read() for n in rows]])

    def write_arrays():
        writes = [
            array[start : min(start + manifest.shard_rows, ROWS)].write(x[start : start + manifest.shard_rows])
            for start in range(0, ROWS, manifest.shard_rows)
        ]
        for write in writes:
            write.result()

    at_random = [order[start : start + 32] for start in range(0, ROWS, 32)]
    parts = {
        ("TensorStore", "write"): write_arrays,
        ("ArrayRecord", "write"): write_records,
        ("TensorStore", "read 32 rows in a piece"): lambda: read_arrays(pieces),
        ("ArrayRecord", "read 32 rows in a piece"): lambda: read_records(pieces),
        ("TensorStore", "read 32 rows at random"): lambda: read_arrays(at_random),
        ("ArrayRecord", "read 32 rows at random"): lambda: read_records(at_random),
    }
    taken = seconds(tuple(parts.values()), rounds)
    return [
        {"format": format, "part": part, "seconds": each, "megabytes_per_second": x.nbytes / 1e6 / each}
        for (format, part), each in zip(parts, taken, strict=True)
    ]


def draw(results):
    """The cost of n runs, stored and not, in each case."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    for axis, (name, cost) in zip(figure.subplots(1, 2), results.items(), strict=True):
        n = np.arange(1, 11)
        unit = cost["model"]
        axis.plot(n, n, "o-", color="C1", label="with the language model")
        axis.plot(n, (cost["write"] + n * cost["store"]) / unit, "s-", color="C0", label="written once, from the store")
        axis.set(title=name, xlabel="runs", ylabel="time, in runs with the model", ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def main():
    """Print the lines, and write them."""
    config = CONFIG.value
    results, costs, notes = {}, {}, []
    with tempfile.TemporaryDirectory(dir=DIRECTORY.value or None) as directory:
        folder = Path(directory)
        results["formats"] = formats(folder, ROUNDS.value)
        cases = {"quickstart": lambda at: config, "GPT-2 small's size": lambda at: with_gpt2(config, at / "lm")}
        for name, make in cases.items():
            at = folder / str(len(costs))
            at.mkdir()
            results[name], costs[name] = runs(name, make(at), at, ROUNDS.value, CALLS.value)
            cost = costs[name]
            notes.append(
                f"{name}: a run from a store takes {cost['store'] / cost['model']:.2f} of the time of a run with the "
                f"model inside, and writing the store takes {cost['write'] / cost['model']:.2f} of it. Reading costs "
                f"{results[name][1]['reading']:+.1%} of the time without reading."
            )
    for lines in results.values():
        for line in lines:
            print(json.dumps(line))
    print("\n".join(notes))
    common.write(Path(OUT.value) if OUT.value else None, results, tuple(notes))
    if FIGURE.value:
        draw(costs).savefig(FIGURE.value, dpi=110)


if __name__ == "__main__":
    from absl import flags

    from gsae_jax import cli

    CONFIG = cli.define_config()
    OUT = flags.DEFINE_string("out", None, "File to write.")
    FIGURE = flags.DEFINE_string("figure", None, "Picture to write: the cost of n runs.")
    DIRECTORY = flags.DEFINE_string("directory", None, "Where the stores are written.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each part.")
    CALLS = flags.DEFINE_integer("calls", 5, "Calls of the train step in a turn.")
    cli.run(main)
