"""What a large mean does to SAEs, with and without `activations.center`: the figure and table of docs/centring.md.

    python docs/centring.py --runs runs/centring --write docs/centring.md    # an hour on two CPU cores

A constant is added to the embedded model's MLP output: m times the root mean square deviation of its coordinates. The
final LayerNorm removes it again, so the language model's predictions stay the same, and the SAEs should be as good.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from matplotlib.figure import Figure

import gsae_jax
from gsae_jax.evaluation import plots
from gsae_jax.lms import checkpoints

SITES = {"mlp_out": "blocks.0.hook_mlp_out", "resid_post": "blocks.0.hook_resid_post"}  # as in configs/centring.py
MEANS = (0, 3, 10, 100)  # m
BIAS = "blocks.0.mlp.b_out"


def shifted_model(folder, constant):
    """The embedded model with a constant added to its MLP output, in float32."""
    shutil.copytree(checkpoints.EMBEDDED, folder, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    tensors[BIAS] += np.float32(constant)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def train(run, lm, center):
    command = [sys.executable, "-m", "gsae_jax.train", "--config=configs/centring.py", f"--workdir={run}"]
    command += [f"--config.lm.path={lm}", f"--config.activations.center={center}"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)


def records(run):
    return {record["name"]: record for record in json.loads((run / "report" / "report.json").read_text())["saes"]}


def draw(records_of):
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for (short, site), axes in zip(SITES.items(), figure.subplots(2, 2), strict=True):
        for axis, field in zip(axes, ("loss_recovered", "l0"), strict=True):
            for color, architecture in zip(plots.COLOURS, ("baseline", "gated"), strict=False):
                for center, style in ((True, "o-"), (False, "x--")):
                    name = f"{architecture}_{short}_0"
                    y = [records_of[mean, center][name][field] for mean in MEANS]
                    label = f"{architecture}, {'centred' if center else 'not centred'}"
                    axis.plot(range(len(MEANS)), y, style, color=color, label=label)
            axis.set(xticks=range(len(MEANS)), xticklabels=MEANS, title=site, ylabel=field.replace("_", " "))
            axis.grid(alpha=0.25)
            axis.set_xlabel("m: the mean, in deviations of a coordinate")
    axes[0].legend(fontsize=7)
    return figure


def table(records_of):
    columns = ("l0", "loss_recovered", "fvu", "alive", "gamma")
    formats = (".1f", ".3f", ".3f", ".0%", ".3f")
    lines = ["| Site | SAE | m | Centred | L0 | Loss recovered | FVU | Alive | γ |", "| :-- " * 4 + "| --: " * 5 + "|"]
    for name in next(iter(records_of.values())):
        for center in (True, False):
            for mean in MEANS:
                record = records_of[mean, center][name]
                numbers = [(record[column], form) for column, form in zip(columns, formats, strict=True)]
                values = ["-" if number is None else format(number, form) for number, form in numbers]
                cells = [f"`{record['site']}`", name.partition("_")[0], mean, "yes" if center else "no", *values]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--write", type=Path, required=True)
    args = parser.parse_args()
    runs, records_of, deviation = args.runs.absolute(), {}, 1.0
    for mean in MEANS:
        lm = shifted_model(runs / f"lm_{mean}", mean * deviation)
        for center in (True, False):
            run = runs / f"mean_{mean}_{'centred' if center else 'not_centred'}"
            train(run, lm, center)
            records_of[mean, center] = records(run)
        if mean == 0:  # centred inputs have a deviation of 1
            deviation = 1 / gsae_jax.load(runs / "mean_0_centred")["gated_mlp_out_0"].scale
    draw(records_of).savefig(args.write.with_suffix(".png"), dpi=120)
    text, lines = args.write.read_text(), table(records_of)
    args.write.write_text(re.sub(r"(<!-- table -->\n).*(\n<!-- end -->)", rf"\1\n{lines}\n\2", text, flags=re.S))


if __name__ == "__main__":
    main()
