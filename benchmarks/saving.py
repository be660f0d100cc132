"""What saving costs: the train loop with a checkpoint every so many steps, and without.

    python benchmarks/saving.py --config configs/quickstart.py [--every 100] [--out benchmarks/results/saving-NAME.json]

Takes a config as `python -m gsae_jax.train` does. Short stretches with one save, which end when it is whole on the
disk, and stretches without take turns; what a save costs is the median difference of neighbours. Printed are the
throughput that a save every so many steps leaves, with the 95% bootstrap interval, the time for which a save keeps the
loop waiting, the time until it is whole, and the steps that were made meanwhile.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common
import jax
import numpy as np
from absl import flags
from pipeline import experiment

from gsae_jax import cli, config_trees
from gsae_jax import config as config_lib
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import run_directory
from gsae_jax.training import starting

STRETCH = 4  # calls of the train step


def main():
    """Print the ratio and the times, and write them."""
    config = config_trees.from_dict(config_lib.Experiment, cli.given(CONFIG))
    program, lm_params, stream, state = experiment(config)
    waits, wholes, steps, costs, calls = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=DIR.value) as folder:
        workdir = run_directory.Workdir(folder)
        checkpoints = checkpoints_lib.Checkpoints(workdir, config.checkpoint)
        saved = 0

        def stretch(saving):
            nonlocal state, saved
            began = time.perf_counter()
            waiting, pending = None, saving
            if saving:
                saved += 1
                parts = starting.saved_parts(state, config.checkpoint.buffer)
                checkpoints.save(saved, *parts, stream.get_state(), {}, None)
                waits.append(time.perf_counter() - began)
            for call in range(STRETCH):
                state, metrics, _ = program.train_step(state, lm_params, program.source.place(next(stream)))
                jax.block_until_ready(waiting)
                waiting = metrics
                if pending and workdir.latest_step() == saved:
                    wholes.append(time.perf_counter() - began)
                    steps.append((call + 1) * config.updates_per_call)
                    pending = False
            jax.block_until_ready(state)
            checkpoints.wait()
            if pending:
                wholes.append(time.perf_counter() - began)
                steps.append(STRETCH * config.updates_per_call)
            return time.perf_counter() - began

        for index in range(-1, ROUNDS.value):
            order = (False, True) if index % 2 else (True, False)  # so that a drift favours neither
            taken = {saving: stretch(saving) for saving in order}
            if index >= 0:  # the first compiles
                costs.append(taken[True] - taken[False])
                calls.append(taken[False] / STRETCH)
        checkpoints.close()
        newest = Path(folder) / "checkpoints" / str(saved)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    between = EVERY.value / config.updates_per_call * statistics.median(calls)
    cost = statistics.median(costs)
    drawn = np.median(np.random.default_rng(0).choice(costs, (10_000, len(costs))), axis=1)
    low, high = (between / (between + extreme) for extreme in np.quantile(drawn, (0.975, 0.025)))
    result = {
        "every": EVERY.value,
        "megabytes": size / 1e6,
        "throughput": between / (between + cost),
        "throughput_low": low,
        "throughput_high": high,
        "cost_seconds": cost,
        "wait_seconds": statistics.median(waits),
        "whole_seconds": statistics.median(wholes),
        "steps_meanwhile": statistics.median(steps),
    }
    note = (
        f"A save of {size / 1e6:.0f} MB every {EVERY.value} steps leaves {result['throughput']:.1%} of the throughput "
        f"(between {low:.1%} and {high:.1%}): a save costs {1e3 * cost:.0f} ms of the {between:.1f} s between two, "
        f"the loop waits {1e3 * result['wait_seconds']:.0f} ms, the files are whole after "
        f"{1e3 * result['whole_seconds']:.0f} ms, and {result['steps_meanwhile']:.0f} steps are made meanwhile."
    )
    print(note)
    common.write(Path(OUT.value) if OUT.value else None, [result], (note,))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    OUT = flags.DEFINE_string("out", None, "File to write.")
    DIR = flags.DEFINE_string("dir", None, "Where to save; the machine's temporary directory by default.")
    EVERY = flags.DEFINE_integer("every", 100, "Steps between saves.")
    ROUNDS = flags.DEFINE_integer("rounds", 31, "Pairs of stretches.")
    cli.run(main)
