"""The figures of one NVIDIA GPU, in less than eight minutes, from a clone, without a network.

    python benchmarks/accelerator.py [--parts tests,step,pipeline,peers] [--minutes 8] [--fresh] [--out FILE]

The parts:

    tests      the tests marked `gpu` (`tests/test_gpu.py`), with the largest error that each has seen
    step       dense and sparse steps of step.py's shapes, in float32 (TF32 products) and bfloat16: time, also in
               encoder-sized products of the same card (a dense gated step has seven), and memory
    pipeline   the whole train step, and its parts as in pipeline.py, with a language model of GPT-2 small's size that
               has random weights, on random tokens
    peers      the step of SAELens and dictionary_learning (`peers.py`), where they are installed

Those that matter most come first. Every measurement is a process of its own, so that its peak memory is its own, and
one that runs out of memory is a result. The file, `benchmarks/results/accelerator-CARD.json`, is written after each.
The same command continues where it ended, and tries again what failed. `--fresh` starts anew. A picture of the steps
lies beside the file. `--platform=cpu` measures small shapes on the CPU, to try the command itself.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

from peers_environment import ROOT, existing

PARTS = ("tests", "step", "pipeline", "peers")
LIMITS = {"machine": 60, "tests": 150, "step": 120, "pipeline": 120, "peers": 120}  # seconds of one measurement


class FailedError(Exception):
    """A measurement gave no result; says why in a few words."""


@dataclasses.dataclass
class Kit:
    """Runs measurements, each as a process, and keeps their lines in the file.

    Attributes:
        platform: "gpu" or "cpu".
        deadline: when to stop, in seconds of the monotonic clock.
        path: of the file; not yet known for the first measurement, of the machine.
        contents: of the file.
    """

    platform: str
    deadline: float
    path: Path | None = None
    contents: dict = dataclasses.field(default_factory=lambda: {"facts": {}, "results": {}, "notes": []})

    def write(self):
        """The file, whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.contents, indent=2) + "\n")
        os.replace(new, self.path)

    def note(self, sentence):
        """Print a sentence, and have it below the tables."""
        print(sentence, flush=True)
        if sentence not in self.contents["notes"]:
            self.contents["notes"].append(sentence)

    def call(self, part, *command, allowed=(0,)):
        """What the command prints; raises `FailedError`, or `TimeoutError` where time is up."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu" if self.platform == "cpu" else "cuda,cpu",  # a test compares both
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a test and the peers start a second process
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        try:
            out, errors = process.communicate(timeout=min(left, LIMITS[part]))
        except subprocess.TimeoutExpired as error:
            if left < LIMITS[part]:
                raise TimeoutError from error
            raise FailedError(f"took longer than {LIMITS[part]} seconds") from error
        finally:  # also where the user interrupts
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode < 0:
            raise FailedError(f"was ended by {signal.Signals(-process.returncode).name}")
        said = (errors.strip() or out.strip() or "it says nothing")[-4000:]
        if part != "machine" and (process.returncode or "Traceback" in errors):
            print(said, file=sys.stderr, flush=True)
        if process.returncode not in allowed:
            raise FailedError(said.splitlines()[-1][:300])
        return out

    def measure(self, part, **key):
        """The lines of a measurement."""
        if part in ("machine", "step", "pipeline"):
            order = json.dumps({"part": part} | key)
            out = self.call(part, sys.executable, "benchmarks/accelerator_worker.py", order)
            return json.loads(out.splitlines()[-1])
        with tempfile.TemporaryDirectory() as folder:
            return (self.tests if part == "tests" else self.peers)(Path(folder), **key)

    def tests(self, folder, function):
        """A line for each case of a test."""
        options = ["-o", "addopts=", "-o", "junit_family=xunit1", "-p", "no:cacheprovider", "-W", "default"]
        file = folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", *options, "-q", "-m", "gpu", f"--junitxml={file}"]
        self.call("tests", *command, f"tests/test_gpu.py::{function}", allowed=(0, 1))  # 1: a case fails
        return [tested(case) for case in xml.etree.ElementTree.parse(file).iter("testcase")]

    def peers(self, folder, **shape):
        """A line for each library."""
        options = [f"--{name}={value}" for name, value in shape.items()]
        command = [sys.executable, "benchmarks/peers.py", *options, f"--out={folder / 'peers.json'}"]
        self.call("peers", *command)
        result = json.loads((folder / "peers.json").read_text())
        ours, *theirs = result["results"]
        return [ours | {"note": " ".join(result["notes"])}, *theirs]

    def add(self, part, **key):
        """Measure what the file lacks; returns whether the file has it now."""
        lines = self.contents["results"].setdefault(part, [])
        before = [line for line in lines if key.items() <= line.items()]
        if before and all(line["outcome"] != "failed" for line in before):
            return True
        name = " ".join(map(str, key.values())) or part
        try:
            results = self.measure(part, **key)
        except TimeoutError:
            return False
        except FailedError as error:
            results = [{"outcome": "failed", "why": str(error)}]
        new = [key | {"outcome": "measured"} | line for line in results]
        lines[:] = [line for line in lines if line not in before] + new
        if part == "step":
            compare(lines)
        self.write()
        for line in new:
            print(f"{part}: {name}: {described(line)}", flush=True)
        return True


def tested(case):
    """The line of a test's case, from pytest's XML."""
    line = {"outcome": "passed", "seconds": float(case.get("time")), "case": case.get("name").partition("[")[2][:-1]}
    line |= {found.get("name"): float(found.get("value")) for found in case.iter("property")}
    for kind, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (found := case.find(kind)) is not None:
            line |= {"outcome": outcome, "why": " ".join((found.get("message") or "").split())[:300]}
    return line


def compare(lines):
    """Add to the lines of sparse steps how many times the dense ones take, in products measured beside each."""
    names = ("architecture", "D", "F", "B", "N", "dtype")
    taken = {(*(line[name] for name in names), line["step"]): line.get("products") for line in lines}
    for line in lines:
        dense, own = taken.get((*(line[name] for name in names), "dense")), line.get("products")
        if line["step"] == "sparse" and dense and own:
            line["times_faster"] = dense / own


def described(line):
    """What a measurement found, in a few words."""
    words = [line[key] for key in ("case", "part", "library") if line.get(key)]
    for key, form in (("step_seconds", "{:.2f} ms"), ("call_seconds", "{:.2f} ms")):
        words += [form.format(1e3 * line[key])] if key in line else []
    words += [f"{line['products']:.2f} encoder products"] if "products" in line else []
    words += [f"{line['times_faster']:.2f} times faster"] if "times_faster" in line else []
    words += [line["outcome"]] if line["outcome"] != "measured" else []
    return ", ".join([*words, *([line["why"]] if "why" in line else [])])


def missing(part):
    """Why a part cannot be measured here, as a sentence; "" where it can."""
    if part == "tests" and importlib.util.find_spec("pytest") is None:
        return "pytest is not installed here: the part `tests` is left out."
    if part == "peers" and existing() is None:
        return (
            "SAELens and dictionary_learning are not installed here: the part `peers` is left out "
            "(`python benchmarks/peers.py` installs them, with a network)."
        )
    return ""


def draw(path, lines):
    """Steps as points; returns a sentence where there is no picture."""
    lines = [line for line in lines if "step_seconds" in line]
    if not lines:
        return ""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed here: there is no picture."
    from matplotlib.figure import Figure

    form = "{architecture} D {D:,} F {F:,} N {N} {dtype}"
    shapes = list(dict.fromkeys(form.format(**line) for line in lines))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(shapes)), layout="constrained")
    axis = figure.subplots()
    for how, marker in (("dense", "o"), ("sparse", "s")):
        points = [line for line in lines if line["step"] == how]
        places = [-shapes.index(form.format(**line)) for line in points]
        axis.plot([1e3 * line["step_seconds"] for line in points], places, marker, label=how)
    axis.set_yticks(range(0, -len(shapes), -1), shapes)
    axis.grid(alpha=0.3)
    axis.set(xscale="log", xlabel="milliseconds of a step")
    axis.legend()
    figure.savefig(path, metadata={"Date": None})
    return ""


def begin(kit, out, fresh):
    """Look at the machine, and read what was measured before; returns (part, key) of all measurements."""
    try:
        (found,) = kit.measure("machine")
        why = found.get("why", "pip install 'jax[cuda13]'" if found.get("platform") != kit.platform else "")
    except FailedError as error:
        why = error
    except TimeoutError:
        raise SystemExit("There is no time to look at the machine; write more --minutes.") from None
    if why:
        hint = "" if kit.platform == "cpu" else "; --platform=cpu tries the command on the CPU"
        raise SystemExit(f"JAX finds no {kit.platform.upper()} here that it can use ({why}){hint}.")
    facts = found["facts"]
    card = re.sub(r"[^a-z0-9]+", "-", facts["devices"][0].lower()).strip("-")
    kit.path = out or ROOT / "benchmarks" / "results" / f"accelerator-{card}.json"
    facts["command"] = shlex.join(["python", "benchmarks/accelerator.py", *sys.argv[1:]])
    if kit.path.exists() and not fresh:
        kit.contents = json.loads(kit.path.read_text())
        before = kit.contents["facts"]
        changed = [name for name in ("devices", "commit", "jax", "python") if before[name] != facts[name]]
        if changed:
            what = ", ".join(f"{name} ({before[name]} there, {facts[name]} here)" for name in changed)
            raise SystemExit(f"{kit.path} was measured with other {what}; write --fresh to replace it, or --out=FILE.")
    kit.contents |= {"facts": facts, "notes": []}
    print(f"{facts['devices'][0]}, jax {facts['jax']}, Python {facts['python']}; results go to {kit.path}", flush=True)
    return found["order"]


def main():
    """Measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="those to measure, divided by commas")
    parser.add_argument("--minutes", type=float, default=8, help="after which no measurement goes on")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--out", type=Path, help="the file")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: small shapes")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    kit = Kit(arguments.platform, time.monotonic() + 60 * arguments.minutes)
    order = begin(kit, arguments.out and arguments.out.absolute(), arguments.fresh)
    reasons = {part: missing(part) for part in parts}
    for sentence in filter(None, reasons.values()):
        kit.note(sentence)
    wanted = [(part, key) for part, key in order if reasons.get(part) == ""]
    left_out = [part for part, key in wanted if not kit.add(part, **key)]
    if left_out:
        counts = ", ".join(f"{count} of {part}" for part, count in collections.Counter(left_out).items())
        kit.note(f"Time was up: of the measurements, {counts} are left out; the same command continues.")
    failed = [line for lines in kit.contents["results"].values() for line in lines if line["outcome"] == "failed"]
    if failed:
        kit.note(f"{len(failed)} failed; the same command tries them again.")
    if sentence := draw(kit.path.with_suffix(".svg"), kit.contents["results"].get("step", [])):
        kit.note(sentence)
    kit.write()
    subprocess.run([sys.executable, Path(__file__).with_name("table.py"), kit.path], check=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
