"""What an experiment takes on machines that are not there: does it fit, and for how many hours it runs.

python -m gsae_jax.plan --config configs/gemma_2_2b.py --topology v5e:4x4 [--json]

Compiles the real train step for the topology (v4, v5e, v5p or v6e, with libtpu: pip install '.[tpu]'; or cpu:N);
nothing is run, and of the language model only its config.json is read.
"""

import json
from typing import Any

import jax
from absl import flags

from gsae_jax import cli
from gsae_jax import config as config_lib
from gsae_jax.config import Experiment
from gsae_jax.training import planning


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    sizes = report["bytes_per_device"]
    mesh = " x ".join(f"{size} {axis}" for axis, size in report["mesh"].items())
    lines = [f"{report['topology']}: {report['devices']} devices, {mesh}", "", "bytes on each device"]
    lines += [f"  {name:<15}{size / 2**30:>9.3f} GiB" for name, size in sizes.items()]
    lines += ["", "what devices exchange in one call (bytes of results; once for each loop)"]
    lines += [
        f"  {kind:<19}{found['count']:>4}{found['bytes'] / 2**20:>12,.1f} MiB"
        for kind, found in report["collectives_per_call"].items()
    ] or ["  nothing"]
    lines += ["", f"{report['flops_per_device_and_step'] / 1e9:,.1f} GFLOP on each device in one step"]
    if "fits" in report:
        milliseconds, rate = 1e3 * report["seconds_per_step"], f"{report['utilisation']:.0%} of the chip's rate"
        lines += [
            f"{milliseconds:,.1f} ms of computation a step at {rate}, exchanges not counted:",
            f"{report['activations_per_second']:,.0f} activations/s, {report['hours']:,.1f} hours, "
            f"{report['chip_hours']:,.0f} chip-hours",
        ]
        memory = f"{sizes['total'] / 2**30:.2f} of {report['memory_of_a_device'] / 2**30:.0f} GiB"
        lines.append(f"it fits: {memory}" if report["fits"] else f"it does not fit: {memory}; {report['advice']}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    kind, _, size = TOPOLOGY.value.partition(":")
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, nothing runs on it
    if kind == "cpu" and size.isdigit():
        jax.config.update("jax_num_cpu_devices", int(size))
    report = planning.plan(config_lib.from_dict(Experiment, cli.given(CONFIG)), TOPOLOGY.value)
    print(json.dumps(report, indent=2) if JSON.value else describe(report))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:4x4, v5p:8x8x8, v6e:16x16 or cpu:8.", required=True)
    JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")
    cli.run(main)
