"""What every command shares: a config flag, and errors as one sentence with exit code 2."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from gsae_jax import processes
from gsae_jax.config import ConfigError, TrainingError

TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code a refused input was noticed.")


def define_config() -> Any:
    """The `--config FILE.py` flag; `--config.a.b=value` overrides one field."""
    return config_flags.DEFINE_config_file("config", None, "Experiment file, for example configs/quickstart.py.")


def given(config: Any) -> Any:
    """The config that was given.

    Raises:
        ConfigError: none was, or its file cannot be read.
    """
    if config.value is None:
        raise ConfigError("--config", "is missing; write an experiment file, for example configs/quickstart.py")
    try:
        return config.value.to_dict()
    except (OSError, ImportError, SyntaxError) as error:
        raise ConfigError("--config", f"the file cannot be read: {' '.join(str(error).split())}") from error


def run(main: Callable[..., int | None], *positional: str, several: bool = False) -> None:
    """Parse the flags and call `main`; what a user can get wrong ends in one sentence on stderr and exit code 2.

    Args:
        main: the command.
        positional: names of the arguments that `main` takes from the command line.
        several: the command may run in several processes, which find each other by the cluster or by flags.
    """
    if several:
        flags.DEFINE_string("coordinator", None, "host:port of process 0; clusters that JAX knows say so themselves.")
        flags.DEFINE_integer("num_processes", None, "How many processes run this command together.")
        flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, ConfigError):  # raised by a config file, and wrapped twice
                cause = cause.__context__
            _refuse(str(cause or error))
        except (AttributeError, KeyError) as error:  # an override of a field that the config lacks
            # ml_collections' message is the repr of "'name'\nDid you mean ...".
            what = str(error).replace("\\n", "; ").replace("\\", "").strip("\"'")
            _refuse(f"--config: no such field: {what}")

    def guarded(argv):
        if len(argv) - 1 > len(positional):
            unexpected = argv[1 + len(positional)]
            _refuse(f"unexpected argument {unexpected!r}; flags are written --name=value (--help lists them)")
        if len(argv) - 1 < len(positional):
            _refuse(f"{' '.join(positional[len(argv) - 1 :])} missing; --help shows how the command is written")
        try:
            if several:
                processes.join(*(flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")))
            sys.exit(processes.guarded(lambda: main(*argv[1:]), _describe))
        except TrainingError as error:
            _refuse(str(error), 1)
        except KeyboardInterrupt:
            _refuse("interrupted", 130)
        except ConfigError as error:
            if TRACEBACK.value:
                raise
            _refuse(str(error))

    # TFDS and orbax warn of what is as it should be, and log the tracebacks of errors that they raise as well.
    logging.set_verbosity(logging.FATAL)
    app.run(guarded, flags_parser=parse)


def _describe(error: BaseException) -> tuple[str, int]:
    """The last line and the exit code of a process that others wait for."""
    if isinstance(error, ConfigError | TrainingError):
        return f"error: {error}", 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    what = f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lost = isinstance(error, jax.errors.JaxRuntimeError)  # of a collective, most often
    return what + " (another process may have ended before; look at its output)" * lost, 1


def _refuse(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
