"""Mutants of an input: each works or is refused in one sentence, in bounded time and memory."""

import collections
import contextlib
import gc
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

from gsae_jax.errors import UserError

FEW, MANY = 8, 200  # mutants of each kind
SECONDS = 60  # of computing for one of them; ten times as long on the clock, as a machine may have other work
MEMORY = 256 * 2**20  # bytes that one of them may take; its files are smaller than 2**20


def listing(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def bounded():
    """Within `SECONDS` and `MEMORY`; what asks for ever more memory ends before the machine's does."""

    def late(number, frame):
        raise TimeoutError(f"not done in {SECONDS} seconds of computing, or ten times as long")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    limits, before = resource.getrlimit(resource.RLIMIT_AS), memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**33, limits[1]))
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 10 * SECONDS)}
    handlers = {number: signal.signal(number, late) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert memory("VmHWM") - before < MEMORY


def works(use, *args):
    """Whether it does; what is refused is refused in one sentence."""
    with warnings.catch_warnings(action="ignore"), bounded():
        try:
            use(*args)
        except UserError as error:
            refusal = error
        else:
            return True
    assert str(refusal).isprintable()
    assert refusal.field or str(args[0]) in refusal.problem  # it says what it is about
    return False


def try_mutants(kind, originals, folder, seeds, kinds):
    made_of, damage, use = kinds[kind]
    counts = collections.Counter()
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        mutant = folder / "mutant"
        shutil.copytree(draw.choice(originals[made_of]), mutant)
        damage(draw, mutant)
        before = listing(folder)
        try:
            counts["worked" if works(use, mutant) else "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind}, mutant {seed}") from error
        assert listing(folder) == before
        shutil.rmtree(mutant)
    gc.collect()  # what was not awaited, here, where that is no error
    return counts
