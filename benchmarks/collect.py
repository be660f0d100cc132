"""Collecting the features of a run against measuring it, on the same tokens; and memory for more tokens.

    python benchmarks/collect.py --workdir runs/quickstart [--tokens 262144]
        [--out benchmarks/results/collect-NAME.json]

`collect` is the whole command's work for all SAEs of the run, with effects, neighbours and the files; `measure` is that
of `evaluate`. Both are timed in this process, one after the other, after a first call on few tokens that compiles. The
peak of memory is that of a process of its own for each number of tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from gsae_jax import collecting, measuring


def timed(function, *args, **kwargs):
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def collect(workdir, tokens, folder, name):
    """Collect the features of all SAEs of a run."""
    collecting.collect(collecting.Wanted(workdir, out=str(Path(folder) / name), tokens=tokens))


def peak(workdir, tokens):
    """MiB of a process that collects."""
    command = [sys.executable, __file__, "--workdir", workdir, "--tokens", str(tokens), "--peak"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--tokens", type=int, default=2**18)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", action="store_true", help="collect once, and print the peak of memory in MiB")
    arguments = parser.parse_args()
    workdir, tokens = arguments.workdir, arguments.tokens
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peak:
            collect(workdir, tokens, folder, "peak")
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return
        for count in (8192, tokens):
            seconds = {
                "collect": timed(collect, workdir, count, folder, f"features_{count}"),
                "measure": timed(
                    measuring.evaluate_saes, [workdir], str(Path(folder) / f"report_{count}"), tokens=count
                ),
            }
    ratio = seconds["collect"] / seconds["measure"]
    results = [{"tokens": tokens, **seconds, "ratio": ratio}]
    print(
        f"{tokens:,} tokens: {', '.join(f'{name} {each:.1f} s' for name, each in seconds.items())}: {ratio:.2f} times"
    )
    for count in (tokens // 8, tokens):
        mib = peak(workdir, count)
        results.append({"tokens": count, "peak_mib": mib})
        print(f"{count:,} tokens: peak of memory {mib:,.0f} MiB")
    common.write(arguments.out, results)


if __name__ == "__main__":
    main()
