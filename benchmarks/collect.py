"""Collecting the features of a run against measuring it, on the same tokens; and memory for more tokens.

    python benchmarks/collect.py --workdir runs/quickstart [--tokens 1048576]
        [--out benchmarks/results/collect-NAME.json]
    python benchmarks/collect.py --model DIR --width 65536

`collect` is the whole command's work for all SAEs of the run, with effects, neighbours and the files; `measure` is that
of `evaluate`. Both are timed in this process, one after the other, after a first call on few tokens that compiles. The
peak of memory is that of a process of its own for each number of tokens. `--width` collects one gated SAE of this width
with random weights, of which each feature is active on one token in a thousand, on 64 rows of random tokens.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import collecting, features, measuring
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.features import collection
from gsae_jax.lms import loading
from gsae_jax.saes import gated, trained


def timed(function, *args, **kwargs):
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def collect(workdir, tokens, folder, name):
    """Collect the features of all SAEs of a run; returns how many tokens the held-out text has of those."""
    out = collecting.collect(collecting.Wanted(workdir, out=str(Path(folder) / name), tokens=tokens))
    return next(iter(features.load(out).values())).about["tokens"]


def own_peak():
    """The peak of memory of this process in MiB. Not getrusage's, which begins with that of the process before it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def wide(model, width, folder):
    """Collect the features of a wide SAE; prints the seconds until the end of each stage."""
    mesh = mesh_lib.make_mesh(config_lib.Mesh(1, 1))
    lm = loading.load_lm(model, mesh=mesh)
    site = "blocks.0.hook_mlp_out"
    rows = np.random.default_rng(0).integers(5, lm.config.d_vocab, (64, 128)).astype(np.int32)
    x = lm.activations(rows[:16], [site])[site].reshape(-1, lm.sites[site])
    config = gated.Config(x.shape[1], width)
    params = dict(gated.init(jax.random.key(0), config))
    center = x.mean(0)
    threshold = -jnp.quantile((x - center) @ params["W_gate"], 0.999, axis=0)
    params |= {"b_dec": center, "b_gate": threshold, "b_mag": threshold}
    sae = trained.SAE("wide_0", "gated", config, site, params, stack="wide")
    about = {"wide_0": {"sae": "wide_0", "width": width, "targets": [site], "model": model}}
    start, seconds = time.perf_counter(), {}

    def show(stage, done, total):
        seconds[stage] = round(time.perf_counter() - start, 1)

    each = {"wide_0": sae}
    collection.collect(collection.Collection(lm, mesh, each, each, rows, lm.special_tokens, about, {}), folder, show)
    print(f"{width:,} features of {rows.size:,} tokens: {seconds} s; peak of memory {own_peak():,.0f} MiB")


def peak(workdir, tokens):
    """The tokens and the peak of memory in MiB of a process that collects."""
    command = [sys.executable, __file__, "--workdir", workdir, "--tokens", str(tokens), "--peak"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir")
    parser.add_argument("--model", help="with --width: directory of a language model")
    parser.add_argument("--width", type=int)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", action="store_true", help="collect once, and print the peak of memory")
    arguments = parser.parse_args()
    workdir, tokens = arguments.workdir, arguments.tokens
    if bool(workdir) == bool(arguments.model) or bool(arguments.model) != bool(arguments.width):
        parser.error("write --workdir, or --model and --width")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.width:
            wide(arguments.model, arguments.width, Path(folder))
            return
        if arguments.peak:
            seen = collect(workdir, tokens, folder, "peak")
            print(json.dumps({"tokens": seen, "peak_mib": own_peak()}))
            return
        for count in (8192, tokens):
            collecting_took, seen = timed(collect, workdir, count, folder, f"features_{count}")
            report = str(Path(folder) / f"report_{count}")
            seconds = {
                "collect": collecting_took,
                "measure": timed(measuring.evaluate_saes, [workdir], report, tokens=count)[0],
            }
    ratio = seconds["collect"] / seconds["measure"]
    results = [{"tokens": seen, **seconds, "ratio": ratio}]
    print(f"{seen:,} tokens: {', '.join(f'{name} {each:.1f} s' for name, each in seconds.items())}: {ratio:.2f} times")
    for count in (seen // 8, seen):
        results.append(peak(workdir, count))
        print("{tokens:,} tokens: peak of memory {peak_mib:,.0f} MiB".format(**results[-1]))
    common.write(arguments.out, results)


if __name__ == "__main__":
    main()
