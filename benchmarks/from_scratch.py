"""Training to a loss recovered, from scratch: one gated SAE here, and by SAELens' own trainer.

    python benchmarks/from_scratch.py [--width 8192] [--steps 1400] [--out benchmarks/results/from_scratch-NAME.json]

Both train on the quickstart's text and site, with its batch and warm-up. Ours is a whole run: it reads text, runs the
language model, compiles, trains, saves and measures on 8,192 tokens. SAELens gets the same site's activations from a
file: computing them is not in its time. Its l1 coefficient is ours times D, as its inputs are normalised alike, and its
optimizer is its own (Adam with b1 = 0.9). It may train for more steps than we do (`--their_steps`), as loss recovered
can be compared only at an equal L0, which takes it longer to reach. The same code measures all SAEs on the same
held-out text. One line for each checkpoint: seconds of training, loss recovered and L0.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import common
import jax.numpy as jnp
import numpy as np
from peers_environment import environment

import gsae_jax
from gsae_jax.config import Experiment
from gsae_jax.config_trees import from_dict
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluation import measure, metrics
from gsae_jax.saes import gated, parameters
from gsae_jax.saes.trained import SAE

SITE = "blocks.0.hook_mlp_out"
NAMES = {"W_enc": "W_gate"}  # SAELens' -> ours; others have the same


def settings(arguments):
    """Of our run."""
    stack = gsae_jax.stack_config(
        "gated",
        SITE,
        arguments.width,
        l1_coefficients=(arguments.l1_coefficient,),
        learning_rates=(arguments.learning_rate,),
    )
    train = {"steps": arguments.steps, "warmup_steps": min(200, arguments.steps // 5)}
    evaluation = {"tokens": 2**13}  # SAELens' time has no measuring at all
    return gsae_jax.experiment(
        "quickstart", stacks={"gated": stack, "baseline": None}, train=train, evaluation=evaluation
    )


def activations(config, lm, tokens, path):
    """Writes so many of the site's activations, in random order, of text that the run trains on."""
    rows = rows_lib.open_rows(config.data, "train", lm.tokenizer, tokens + 2**16)
    stream, found = rows_lib.batches(rows, 64, config.seed), []
    while sum(map(len, found)) < tokens:
        batch = np.asarray(next(stream))
        x = np.asarray(lm.activations(batch, [SITE])[SITE])
        found.append(x[~np.isin(batch, lm.special_tokens)])
    x = np.concatenate(found)
    np.save(path, x[np.random.default_rng(0).permutation(len(x))[:tokens]])


def theirs(file):
    """Our SAE of a checkpoint of SAELens."""
    with np.load(file) as arrays:
        params = {NAMES.get(name, name): jnp.asarray(arrays[name]) for name in arrays if name != "factor"}
        units = [parameters.Units(float(arrays["factor"]))]
    F, D = params["W_dec"].shape
    params = parameters.fold(gated, params, units, units)
    return SAE("saelens_0", "gated", gated.Config(D, F), SITE, params)


def measured(lm, sae, batches):
    """(loss recovered, L0)."""
    values = metrics.combine(measure.measure(lm, [sae], batches, lm.special_tokens)[sae.name])
    return values["loss_recovered"], values["l0"]


def main():
    """Print a line for each checkpoint, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--their_steps", type=int, default=3000)
    parser.add_argument("--checkpoints", type=int, default=9)
    parser.add_argument("--l1_coefficient", type=float, default=1e-2)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="ours")
    parser.add_argument("--their_learning_rate", type=float, default=3e-3, help="SAELens'")
    arguments = parser.parse_args()
    experiment = settings(arguments)
    config = from_dict(Experiment, experiment)
    B, D = config.train.batch_size, 256
    results = []

    def report(library, seconds, sae):
        recovered, l0 = measured(lm, sae, batches)
        results.append({"library": library, "seconds": seconds, "loss_recovered": recovered, "l0": l0})
        print(f"{library:>10}: {seconds:8.1f} s, loss recovered {recovered:.4f}, L0 {l0:.1f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        lm = gsae_jax.load_lm()
        began = time.perf_counter()
        (sae,) = gsae_jax.fit(experiment, Path(folder) / "run").values()
        seconds = time.perf_counter() - began
        held_out = gsae_jax.held_out(Path(folder) / "run", 2**15)
        batches = list(held_out.reshape(-1, config.evaluation.rows_per_forward, held_out.shape[1]))
        report("gsae_jax", seconds, sae)

        path = Path(folder) / "activations.npy"
        activations(config, lm, arguments.their_steps * B, path)
        options = {
            "activations": str(path),
            "folder": folder,
            "batch": B,
            "steps": arguments.their_steps,
            "warmup": config.train.warmup_steps,
            "width": arguments.width,
            "l1_coefficient": arguments.l1_coefficient * D,
            "learning_rate": arguments.their_learning_rate,
            "checkpoints": arguments.checkpoints,
        }
        command = [environment(), Path(__file__).with_name("from_scratch_worker.py"), json.dumps(options)]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        for line in map(json.loads, lines):
            report("SAELens", line["seconds"], theirs(line["file"]))
    ours, *others = results
    notes = [
        time_to_reach(ours, others, "our loss recovered, at any L0"),
        time_to_reach(
            ours, [line for line in others if line["l0"] <= ours["l0"]], "our loss recovered at an L0 of ours or less"
        ),
    ]
    print(*notes, f"It trained for {others[-1]['seconds'] / ours['seconds']:.1f} times our time.", sep="\n")
    common.write(arguments.out, results, notes)


def time_to_reach(ours, others, what):
    """A sentence about the first of the others that recovers as much loss as ours."""
    seconds = [line["seconds"] for line in others if line["loss_recovered"] >= ours["loss_recovered"]]
    if not seconds:
        return f"SAELens does not reach {what}."
    return f"SAELens takes {min(seconds) / ours['seconds']:.1f} times as long to {what}."


if __name__ == "__main__":
    main()
