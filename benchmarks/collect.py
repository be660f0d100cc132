"""Collecting the features of a run against measuring it, on the same tokens; and memory for more tokens.

    python benchmarks/collect.py --workdir runs/quickstart [--tokens 1048576]
        [--out benchmarks/results/collect-NAME.json]

`collect` is the whole command's work for all SAEs of the run, with effects, neighbours and the files; `measure` is that
of `evaluate`. Both are timed in this process, one after the other, after a first call on few tokens that compiles. The
peak of memory is that of a process of its own for each number of tokens.
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

from gsae_jax import collecting, features, measuring


def timed(function, *args, **kwargs):
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def collect(workdir, tokens, folder, name):
    """Collect the features of all SAEs of a run; returns how many tokens the held-out text has of those."""
    out = collecting.collect(collecting.Wanted(workdir, out=str(Path(folder) / name), tokens=tokens))
    return next(iter(features.load(out).values())).about["tokens"]


def peak(workdir, tokens):
    """The tokens and the peak of memory in MiB of a process that collects."""
    command = [sys.executable, __file__, "--workdir", workdir, "--tokens", str(tokens), "--peak"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", action="store_true", help="collect once, and print the peak of memory")
    arguments = parser.parse_args()
    workdir, tokens = arguments.workdir, arguments.tokens
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peak:
            seen = collect(workdir, tokens, folder, "peak")
            # Not getrusage, which begins with the memory of the process that started this one.
            kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
            print(json.dumps({"tokens": seen, "peak_mib": int(kib) / 1024}))
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
