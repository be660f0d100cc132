"""What saving costs: the train loop with a checkpoint every so many steps, and without.

    python benchmarks/saving.py --config configs/quickstart.py [--every 100] [--out benchmarks/results/saving-NAME.json]

Takes a config as `python -m gsae_jax.train` does. Stretches of so many steps with one save, which end when it is whole
on the disk, and stretches without take turns. Printed are the throughput that saving leaves, the time
for which a save keeps the loop waiting, the time until it is whole, and the steps that were made meanwhile.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common
import jax
from absl import flags
from pipeline import experiment
from step import seconds

from gsae_jax import cli
from gsae_jax import config as config_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.training import loop


def main():
    """Print the ratio and the times, and write them."""
    config = config_lib.from_dict(config_lib.Experiment, cli.given(CONFIG))
    program, lm_params, stream, state = experiment(config)
    calls = -(-EVERY.value // config.updates_per_call)
    waits, wholes, steps = [], [], []
    with tempfile.TemporaryDirectory(dir=DIR.value) as folder:
        workdir = workdir_lib.Workdir(folder)
        checkpoints = workdir_lib.Checkpoints(workdir, config.checkpoint)
        saved = 0

        def train(saving):
            nonlocal state, saved
            waiting, pending = None, None
            for call in range(calls):
                if saving and call == 0:
                    started, saved = time.perf_counter(), saved + 1
                    checkpoints.save(
                        saved, *loop.saved_parts(state, config.checkpoint.buffer), stream.get_state(), {}, None
                    )
                    waits.append(time.perf_counter() - started)
                    pending = started, call
                state, metrics, _ = program.train_step(state, lm_params, program.place_tokens(next(stream)))
                jax.block_until_ready(waiting)
                waiting = metrics
                if pending and workdir.latest_step() == saved:
                    wholes.append(time.perf_counter() - pending[0])
                    steps.append((call + 1 - pending[1]) * config.updates_per_call)
                    pending = None
            jax.block_until_ready(state)
            checkpoints.wait()

        without, with_saves = seconds((lambda: train(False), lambda: train(True)), ROUNDS.value)
        checkpoints.close()
        newest = Path(folder) / "checkpoints" / str(saved)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    result = {
        "every": EVERY.value,
        "megabytes": size / 1e6,
        "throughput": without / with_saves,
        "wait_seconds": statistics.median(waits),
        "whole_seconds": statistics.median(wholes),
        "steps_meanwhile": statistics.median(steps),
    }
    note = (
        f"A save of {size / 1e6:.0f} MB every {EVERY.value} steps leaves {result['throughput']:.1%} of the throughput: "
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
    ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.")
    cli.run(main)
