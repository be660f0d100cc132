"""What every command shares: a config flag, and errors as one sentence with exit code 2."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from gsae_jax.config import ConfigError

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


def run(main: Callable[..., int | None], *positional: str) -> None:
    """Parse the flags and call `main`; what a user can get wrong ends in one sentence on stderr and exit code 2.

    `positional` names the arguments that `main` takes from the command line.
    """

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
            sys.exit(main(*argv[1:]))
        except ConfigError as error:
            if TRACEBACK.value:
                raise
            _refuse(str(error))

    logging.set_verbosity(logging.ERROR)  # TFDS and orbax warn of what is as it should be
    app.run(guarded, flags_parser=parse)


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
