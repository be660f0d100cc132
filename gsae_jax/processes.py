"""Several processes, one program: JAX's multi-controller runtime, and how its processes fail together.

Every process runs the same command and the same compiled programs on its own devices; the first one speaks for all.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm
from jax._src import distributed  # its key-value store has no public name; orbax uses it too
from jax.experimental import multihost_utils

from gsae_jax import config as config_lib
from gsae_jax.errors import TrainingError, UserError

HEARTBEAT_TIMEOUT = 30  # seconds until a process that was killed is missed
GRACE = 3  # seconds in which a reason reaches all processes
INITIALIZATION_TIMEOUT = 3600  # seconds: machines of a cluster may come one by one
# What launchers of several processes set, and when they do mean several.
LAUNCHERS: dict[str, Callable[[str], bool]] = {
    "OMPI_COMM_WORLD_SIZE": lambda size: size not in ("", "1"),
    "PMI_SIZE": lambda size: size not in ("", "1"),
    "JOB_COMPLETION_INDEX": lambda index: index != "",  # Kubernetes, which does not say of how many
}
# From a scheduler that takes the machine back, a user at the keyboard, and a terminal that is closed.
INTERRUPTIONS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FAILURE = "gsae_jax/failure"  # where the first process to fail says why


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Become one of several processes, if there are several; to be called before JAX is used.

    TPU pods, Slurm, Open MPI 4 and GKE say who the others are; elsewhere the arguments do: process 0 listens at
    `coordinator` (host:port). A `count` of 1 asks nobody. JAX ends a process whose partners do not come in an hour.

    Raises:
        UserError: only some of the arguments, ones that contradict each other, or a launcher of several processes
            that does not say who the others are.
    """
    if count == 1:
        return
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"is missing; write all of {', '.join(given)}, or none on a cluster that JAX detects", missing[0]
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"is {coordinator!r}; write host:port of process 0, such as 10.0.0.1:8476", "--coordinator")
    if count is not None and count < 1:
        raise UserError(f"is {count}; write 1 or more", "--num_processes")
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"is {index}; write 0 to {count - 1}, a different one in each process", "--process_id")
    # A Slurm job of one task needs nobody, and JAX would see one of its GPUs only.
    if missing and os.environ.get("SLURM_NTASKS") == "1":
        return
    if coordinator is not None:
        print(f"process {index} of {count}, waiting for the others at {coordinator}", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # Where the flags say everything, a Slurm step around them must not choose the devices.
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:  # no cluster was detected
        if not missing:
            raise
        # Each would train alone, all into one run.
        for variable, several in LAUNCHERS.items():
            if several(os.environ.get(variable, "")):
                raise UserError(
                    f"is missing, but {variable} says that this process is one of several, and JAX cannot find the "
                    f"others; write {', '.join(given)}, or --num_processes=1 to run it alone",
                    "--coordinator",
                ) from error
    except RuntimeError as error:
        where = f"{coordinator} " if coordinator else "the coordinator "
        raise UserError(
            f"process {index} of {count} cannot connect to {where}({' '.join(str(error).split())})", "--coordinator"
        ) from error


def on_interruption(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have `handler` called on SIGTERM, SIGINT and SIGHUP; returns the handlers that it replaces.

    A signal that is already ignored stays ignored; nohup ignores SIGHUP so. In a run of several processes JAX handles
    SIGTERM.
    """
    numbers = [number for number in INTERRUPTIONS if signal.getsignal(number) != signal.SIG_IGN]
    if jax.distributed.is_initialized():
        numbers = [number for number in numbers if number != signal.SIGTERM]
    return {number: signal.signal(number, handler) for number in numbers}


def first() -> bool:
    """Whether this process speaks for all: writes what is not sharded, prints, and shows progress."""
    return jax.process_index() == 0


class _Console(logging.Handler):
    """Puts messages on standard output and warnings on standard error, wherever these go at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of the first process; the others are silent."""
        if first():
            is_warning = record.levelno >= logging.WARNING
            text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
            stream = sys.stderr if is_warning else sys.stdout
            if stream is not None:
                tqdm.tqdm.write(text, file=stream)  # which keeps clear of bars
                stream.flush()


LOGGER = logging.getLogger("gsae_jax")  # the parent of every module's logger
if not LOGGER.handlers:  # a program that gave it handlers keeps them
    LOGGER.addHandler(_Console())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # absl's handler of the root logger would repeat every line


def wait(name: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(name)


def shows_bars() -> bool:
    """Whether this process shows progress bars: the first one does, on a terminal and in a notebook."""
    return first() and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def agree(field: str, value: Any, message: str) -> None:
    """Raises `UserError` if this JSON-able value is not the same in every process."""
    if jax.process_count() == 1:
        return
    ours = np.frombuffer(bytes.fromhex(config_lib.fingerprint(value)), np.uint32)
    differing = np.flatnonzero((multihost_utils.process_allgather(ours) != ours).any(1))
    if differing.size:
        raise UserError(f"differs between process {jax.process_index()} and {differing.tolist()}: {message}", field)


def guarded(main: Callable[[], int | None], describe: Callable[[BaseException], tuple[str, int]]) -> int | None:
    """`main()`, whose failure in one process ends them all; a process that is alone fails like any program.

    Args:
        main: what to run.
        describe: the message and the exit code of an error.
    """
    if not jax.distributed.is_initialized():
        return main()
    client: Any = distributed.global_state.client
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            try:
                reason = json.loads(client.key_value_try_get(FAILURE))
            except jax.errors.JaxRuntimeError:
                continue  # nobody failed
            if reason["process"] != jax.process_index():
                _end(f"stopped because process {reason['process']} failed: {reason['message']}", reason["code"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return main()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        message, code = describe(error)
        if not isinstance(error, UserError | TrainingError | KeyboardInterrupt):
            traceback.print_exc()
        reason = json.dumps({"process": jax.process_index(), "message": message, "code": code})
        try:
            client.key_value_set(FAILURE, reason)
        except jax.errors.JaxRuntimeError:
            time.sleep(2 * GRACE)  # another one was first, and its reason will end us; or process 0 is gone
        _end(message, code)
    finally:
        done.set()
        watcher.join()


def _end(message: str, code: int) -> NoReturn:
    """Leave at once: an orderly exit waits for processes that wait for us."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if first():
        time.sleep(GRACE)  # the others read the reason from here
    os._exit(code)
