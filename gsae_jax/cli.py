"""What every command shares: a config flag, and errors as one sentence with exit code 2."""

import contextlib
import dataclasses
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from gsae_jax import config_trees, errors, experiments, processes
from gsae_jax.config import Experiment
from gsae_jax.errors import TrainingError, UserError

TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")


class Output:
    """A standard stream that does not fail when its pipe or terminal is closed; what is written then is dropped."""

    def __init__(self, stream: Any):
        """`stream`: sys.stdout or sys.stderr."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *args: Any) -> None:
        try:
            act(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ConfigParser(config_flags.ConfigFileFlagParser):
    """Takes the path of a config file, or the name of an experiment that the package carries."""

    def __init__(self, argv: list[str], cls: Any):
        super().__init__("config")
        self.cls = cls
        self.stated: dict[str, Any] = {}  # the names of the fields that the file or the command line states
        self._overrides = [match[1] for arg in argv if (match := re.match(r"--?config\.([\w.-]+)", arg))]

    def parse(self, argument: str) -> Any:
        """The config of the file, which has every field that the command line may change."""
        with errors.about("--config"):
            path = experiments.located(argument, "--config ")
        config = super().parse(path)
        if config is None:
            raise UserError(f"get_config() of {argument} returns nothing; end it with `return config`", "--config")
        self.stated = _names(config) or {}
        config = experiments.completed(config, self.cls, self._overrides)
        for path in self._overrides:
            group, stated = config, self.stated
            for depth, name in enumerate(path.split("."), 1):
                if stated.get(name) is None:
                    stated[name] = {}
                stated = stated[name]
                known = list(group.keys()) if hasattr(group, "keys") else []
                if name not in known:
                    cls = self.cls if depth == 1 else None
                    how = config_trees.known_fields(name, known, cls) if known else "set it in the config file"
                    if "architecture" in known and name in experiments.options_of(str(group["architecture"])):
                        how = f"write --config.{'.'.join(path.split('.')[: depth - 1])}.options.{name}"
                    raise UserError(f"is not a field of the config; {how}", ".".join(path.split(".")[:depth]))
                group = group[name]
        return config


def define_config(
    flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None, cls: Any = Experiment
) -> Any:
    """The `--config EXPERIMENT` flag; `--config.a.b=value` overrides one field of those of `cls`."""
    about = (
        "Path of a config file, or `quickstart`. --config.GROUP.FIELD=value changes one of its fields, for example "
        "--config.train.steps=5000; `python -m gsae_jax.settings` lists them all."
        if cls is Experiment
        else "Path of a config file, such as configs/pretrain_stdlib.py. --config.FIELD=value changes one of its "
        "fields; `python -m gsae_jax.settings --pretrain` lists them all."
    )
    holder = config_flags.DEFINE_config_file("config", None, about, flag_values=flag_values, sys_argv=argv)
    flag_values["config"].parser = _ConfigParser(sys.argv if argv is None else argv, cls)
    return holder


class _ListFlag(flags.Flag):
    """Adds the values of each time that it is given; absl's own list keeps only the last."""

    def _parse(self, argument: Any) -> Any:
        # A path with a comma, or RUN:STACK of one, is a single value.
        paths = (argument, argument.rpartition(":")[0]) if isinstance(argument, str) else ()
        is_path = any(os.path.lexists(os.path.expanduser(path)) for path in paths if path)
        values = [argument] if is_path else super()._parse(argument)
        return [*(self.value or ()), *(values or ())] if self.present else values


def define_list(name: str, default: list[str], about: str, flag_values: flags.FlagValues = flags.FLAGS) -> Any:
    """A flag whose values are separated by commas, or given by repeating it."""
    about += " Several are separated by commas, or the flag is repeated."
    flag = _ListFlag(flags.ListParser(), flags.CsvListSerializer(","), name, default, about)
    return flags.DEFINE_flag(flag, flag_values)


def parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the flags, which runs a config file; returns the other arguments.

    Raises:
        UserError: an unknown flag, a value that it cannot have, or whatever a config file raises.
    """
    try:
        return flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error}{_meant(error.flagname, argv, flag_values)}", "command line") from error
    except flags.IllegalFlagValueError as error:
        raise _unusable(error, flag_values) from error
    except Exception as error:
        raise _refusal(error) from error


def _meant(name: str, argv: list[str], flag_values: flags.FlagValues) -> str:
    """What to write for a flag that does not exist, if it has the name of a setting."""
    parser: Any = flag_values["config"].parser if "config" in flag_values else None
    if not isinstance(parser, _ConfigParser):
        return ""
    paths = [name] * (name in {field.name for field in dataclasses.fields(parser.cls)})
    paths += config_trees.fields_below(parser.cls).get(name, [])
    line = " ".join(argv)
    value = match[1] if (match := re.search(rf"--?{re.escape(name)}[= ]([^\s-]\S*)", line)) else "VALUE"
    return f"; write {' or '.join(f'--config.{path}={value}' for path in paths)}" if paths else ""


def _unusable(error: flags.IllegalFlagValueError, flag_values: flags.FlagValues) -> UserError:
    """A value that is not of its flag's type, or that is missing, in one sentence."""
    match = re.match(r"flag --([\w.-]+)=(.*?): ", str(error), re.DOTALL)
    if not match or match[1] not in flag_values:
        return _refusal(error)
    name, value = match.groups()
    if "must have a value other than None" in str(error):
        what = {"workdir": "DIRECTORY", "out": "FOLDER"}.get(name, name.upper())
        return UserError(f"is missing; write --{name}={what}", f"--{name}")
    kind = flag_values[name].flag_type()
    wanted = {"int": "an integer such as 1000", "float": "a number such as 0.001", "bool": "True or False"}.get(kind)
    if wanted is None:
        return _refusal(error)
    if kind == "int":
        with contextlib.suppress(ValueError, OverflowError):
            wanted = f"{int(float(value))}" if float(value).is_integer() else wanted
    field = name.removeprefix("config.") if name.startswith("config.") else f"--{name}"
    return UserError(f"is {value!r}, which is not a value of type {kind}; write {wanted}", field)


def given(config: Any) -> Any:
    """The config that was given.

    Raises:
        UserError: none was, or its file cannot be read.
    """
    if config.value is None:
        raise UserError("is missing; write the path of a config file, or quickstart", "--config")
    try:
        return config.value.to_dict() if hasattr(config.value, "to_dict") else config.value
    except Exception as error:  # a file that is not there; values that are still to be given
        raise _refusal(error) from error


def stated(config: Any, flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Only those fields of the config that its file or the command line states; the others would be defaults.

    Raises:
        UserError: as `given`.
    """
    parser: Any = flag_values["config"].parser
    return _only(given(config), parser.stated)


def _names(tree: Any) -> dict[str, Any] | None:
    """The names of the fields in a tree, nested as they are; None of what is no group."""
    if isinstance(tree, ConfigDict):
        items = tree.items(preserve_field_references=True)  # their values may still be missing
    else:
        tree = config_trees.plain(tree)
        if not isinstance(tree, dict):
            return None
        items = tree.items()
    return {str(name): _names(value) for name, value in items}


def _only(tree: Any, names: dict[str, Any] | None) -> Any:
    """The fields of a tree that have these names."""
    if not names or not isinstance(tree, dict):
        return tree
    return {name: _only(tree[name], below) for name, below in names.items() if name in tree}


def run(main: Callable[..., int | None], *positional: str, several: bool = False) -> None:
    """Parse the flags and call `main`; what a user can get wrong ends in one sentence on stderr and exit code 2.

    Args:
        main: the command.
        positional: names of the arguments that `main` takes from the command line. Those in brackets, `[NAME]`, come
            last and may be left out.
        several: the command may run in several processes, which find each other by the cluster or by flags.
    """
    needed = [name for name in positional if not name.startswith("[")]
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in (sys.stdout, sys.stderr))
    if several:
        flags.DEFINE_string("coordinator", None, "host:port of process 0. Not needed on a cluster that JAX detects.")
        flags.DEFINE_integer("num_processes", None, "Number of processes that run this command together.")
        flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")

    # --help shows the flags of the command's own file only, so the flags of this file are made its own.
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def parsed(argv):
        try:
            return parse(argv)
        except UserError as error:
            if any(arg.lstrip("-") == "traceback" for arg in argv):
                traceback.print_exc()
            _refuse(str(error))

    def guarded(argv):
        if len(argv) - 1 > len(positional):
            unexpected = argv[1 + len(positional)]
            _refuse(f"unexpected argument {unexpected!r}; flags are written --name=value (--help lists them)")
        if len(argv) - 1 < len(needed):
            _refuse(f"{' '.join(needed[len(argv) - 1 :])} missing; --help shows how the command is written")
        try:
            if several:
                processes.join(*(flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")))
            sys.exit(processes.guarded(lambda: main(*argv[1:]), _describe))
        except TrainingError as error:
            _refuse(str(error), 1)
        except KeyboardInterrupt:
            _refuse("interrupted", 130)
        except UserError as error:
            if TRACEBACK.value:
                traceback.print_exc()
            _refuse(str(error))

    # TFDS and orbax warn of what is as it should be, and log the tracebacks of errors that they raise as well.
    logging.set_verbosity(logging.FATAL)
    app.run(guarded, flags_parser=parsed)


def _refusal(error: BaseException) -> UserError:
    """What keeps flags from being parsed, or a config file from being run, in one sentence."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:  # a config file's errors are wrapped up to 3 times
        chain.append(following)
        if isinstance(following, UserError):
            return following
    root = chain[-1]
    calls = [(frame.f_code, line) for frame, line in traceback.walk_tb(root.__traceback__)]
    codes, loading = [code for code, _ in calls], config_flags.ConfigFileFlagParser.parse.__code__
    if loading in codes:
        if where := _line(calls[codes.index(loading) + 1 :]):
            return UserError(f"{where}: {type(root).__name__}: {root}", "--config")
        if isinstance(root, OSError | SyntaxError):
            return UserError(f"the file cannot be read: {root}", "--config")
        return UserError(
            f"the file cannot be used: {root}; write a file whose get_config() returns a config", "--config"
        )
    if isinstance(error, flags.Error):
        return UserError(str(error), "command line")
    return UserError(f"cannot be used: {type(error).__name__}: {error}", "--config")


def _line(calls: list[tuple[CodeType, int]]) -> str:
    """`FILE line NUMBER` of the last call in the config file, the first that is not Python's or ml_collections'."""
    package = str(Path(config_flags.__file__).parents[1])
    theirs = [(code.co_filename, line) for code, line in calls if not code.co_filename.startswith(("<", package))]
    return "{} line {}".format(*[call for call in theirs if call[0] == theirs[0][0]][-1]) if theirs else ""


def _describe(error: BaseException) -> tuple[str, int]:
    """The last line and the exit code of a process that others wait for."""
    if isinstance(error, UserError | TrainingError):
        return f"error: {error}", 2 if isinstance(error, UserError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    what = f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lost = isinstance(error, jax.errors.JaxRuntimeError)  # of a collective, most often
    return what + " (another process may have failed first; look at its output)" * lost, 1


def _refuse(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
