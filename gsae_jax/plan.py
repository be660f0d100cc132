"""Estimate an experiment's memory, communication and time on hardware that you do not have.

python -m gsae_jax.plan --config configs/gemma_2_2b.py --topology v5e:4x4 [--json]

    v5e:4x4, v5p:8x8x8, v6e:16x16, v4:2x2x4   TPUs: compiles the real train step with libtpu (pip install
                                              'gsae_jax[tpu]'); without libtpu, estimates
    gpu:h100x8, gpu:a100x64, h200, b200       GPUs in nodes of eight: estimates
    cpu:8                                     CPU devices: compiles the step; memory and communication only

Nothing is run, and only config.json of the language model is read. Times assume that computation reaches the stated
part of the chip's peak rate, and that communication reaches the full rate of its links (from the manufacturers'
specifications). In a range of times, communication overlaps completely with computation for the first number, and not
at all for the second.
"""

import json

import jax
from absl import flags

from gsae_jax import cli, config_trees
from gsae_jax.config import Experiment
from gsae_jax.planning import planner
from gsae_jax.planning.hardware import Topology


def main() -> None:
    """The command."""
    topology = Topology.parse(TOPOLOGY.value)
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, nothing runs on it
    if topology.chip == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.size)
    config = config_trees.from_dict(Experiment, cli.given(CONFIG))
    report = planner.plan(config, TOPOLOGY.value, STORE_BANDWIDTH.value)
    print(json.dumps(report, indent=2) if JSON.value else planner.describe(report))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "Such as v5e:4x4, v5p:8x8x8, v6e:16x16, gpu:h100x8 or cpu:8.", required=True
    )
    STORE_BANDWIDTH = flags.DEFINE_float(
        "store_bandwidth", 2.0, "GB/s at which all processes together read a store of activations.", lower_bound=1e-3
    )
    JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")
    cli.run(main)
