"""What an experiment takes on machines that are not there: does it fit, what devices exchange, for how long it runs.

python -m gsae_jax.plan --config configs/gemma_2_2b.py --topology v5e:4x4 [--json]

    v5e:4x4, v5p:8x8x8, v6e:16x16, v4:2x2x4   TPUs: the real train step is compiled for them, with libtpu
                                              (pip install 'gsae_jax[tpu]'); without it, an estimate that says so
    gpu:h100x8, gpu:a100x64, h200, b200       GPUs in nodes of eight: an estimate
    cpu:8                                     compiled for so many CPU devices: memory and exchanges, no time

Nothing is run, and of the language model only its config.json is read. Times are computation at a stated part of the
chip's rate and exchanges at the full rate of its links, from their makers' specifications: the first figure of a range
is for exchanges that hide behind computation entirely, the second for none that do.
"""

import json

import jax
from absl import flags

from gsae_jax import cli, config_trees
from gsae_jax.config import Experiment
from gsae_jax.planning import planner


def main() -> None:
    """The command."""
    kind, _, size = TOPOLOGY.value.partition(":")
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, nothing runs on it
    if kind == "cpu" and size.isdigit():
        jax.config.update("jax_num_cpu_devices", int(size))
    report = planner.plan(config_trees.from_dict(Experiment, cli.given(CONFIG)), TOPOLOGY.value)
    print(json.dumps(report, indent=2) if JSON.value else planner.describe(report))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "Such as v5e:4x4, v5p:8x8x8, v6e:16x16, gpu:h100x8 or cpu:8.", required=True
    )
    JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")
    cli.run(main)
