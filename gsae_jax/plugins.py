"""Finding a part by its name: a file of the package (`gated`), a module (`my_package.topk`) or a file (`topk.py`).

In the package the file's name is the registry, so that adding an SAE, a language model or a corpus touches one file.
"""

import functools
import hashlib
import importlib
import os
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from gsae_jax.errors import UserError, known_names

_FILES: dict[str, tuple[str, ModuleType]] = {}  # the hash of the source that a user's file had, and what it became


def known(wing: str, having: str) -> dict[str, ModuleType]:
    """The modules of `gsae_jax.<wing>` that define `having`, by file name."""
    package = importlib.import_module(f"gsae_jax.{wing}")
    modules = _modules(package.__name__, tuple(package.__path__))
    return {name: module for name, module in modules.items() if hasattr(module, having)}


@functools.cache  # an SAE asks for its architecture each time that it is used
def _modules(package: str, folders: tuple[str, ...]) -> dict[str, ModuleType]:
    """The modules of a package in these folders, by sorted names."""
    names = sorted(info.name for info in pkgutil.iter_modules(folders) if not info.ispkg)
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


def load(wing: str, name: str, having: str) -> ModuleType:
    """The module with this name: of a wing, or a user's own.

    Args:
        wing: a folder of the package.
        name: of a file there; or a dotted path, or the path of a .py file. A file is read once, until `reread`.
        having: what the module must define.

    Raises:
        UserError: no such module, with the known names; or one that cannot be imported or does not define `having`.
    """
    if not is_own(name):
        modules = known(wing, having)
        if name not in modules:
            own = f"your own is written as my_package.{name}, or as a path, {name}.py"
            raise UserError(f"{name!r} is not known; {known_names(name, modules)}; {own}")
        return modules[name]
    module = _imported(name)
    if not hasattr(module, having):
        raise UserError(f"{source(module)} does not define {having}")
    return module


def is_own(name: str) -> bool:
    """Whether a name is not one of the package's, but a dotted path or the path of a file."""
    return "." in name


def absolute(name: str) -> str:
    """The name of a part, with the absolute path of a file."""
    return os.path.abspath(os.path.expanduser(name)) if _is_file(name) else name


def label(name: str) -> str:
    """The name of a part for tables and figures: of a path only the file."""
    return os.path.basename(name) if _is_file(name) else name


def source(module: Any) -> str:
    """The file of a module, for messages."""
    return module.__file__ or module.__name__


def fingerprint(module: Any) -> str:
    """A name for the source of a module as it was read."""
    for digest, known in _FILES.values():
        if known is module:
            return digest[:16]
    return hashlib.sha256(Path(source(module)).read_bytes()).hexdigest()[:16]


def read(path: str) -> ModuleType:
    """The module of a .py file.

    Raises:
        UserError: it is not there, or fails.
    """
    path = absolute(path)
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); write the path of a .py file") from error
    digest = hashlib.sha256(path.encode() + text).hexdigest()
    name = f"gsae_jax_file_{digest[:16]}"
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses look up the types of their fields there
    try:
        exec(compile(text, path, "exec"), module.__dict__)  # importlib's cache overlooks changes within a second
    except Exception as error:
        del sys.modules[name]
        raise _broken(path, path, error) from error
    _FILES[path] = digest, module
    return module


def reread() -> None:
    """Read the users' files anew that have changed. A run calls it at its start, and then keeps what it has."""
    for path, (digest, _) in list(_FILES.items()):
        file = Path(path)
        if not file.is_file() or hashlib.sha256(path.encode() + file.read_bytes()).hexdigest() != digest:
            del _FILES[path]


def failure(error: BaseException, path: str) -> str:
    """`line 12: TypeError: ...`: an error, and the last line of a file that led to it. `path` ends the file's path."""
    calls = traceback.walk_tb(error.__traceback__)
    lines: list[int | None] = [line for frame, line in calls if frame.f_code.co_filename.endswith(path)]
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, SyntaxError) and (error.filename or "").endswith(path):
        lines, reason = [error.lineno], error.msg
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {reason}"


def _is_file(name: str) -> bool:
    return name.endswith(".py")


def _imported(name: str) -> ModuleType:
    """The module of a dotted path or of a file."""
    if _is_file(name):
        path = absolute(name)
        return _FILES[path][1] if path in _FILES else read(path)
    file = f"{os.sep}{name.replace('.', os.sep)}.py"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            where = "Python looks in the working directory and in the packages that are installed"
            raise UserError(f"there is no module {name!r}: {error}; {where}") from error
        raise _broken(name, file, error) from error
    except Exception as error:
        raise _broken(name, file, error) from error


def _broken(name: str, path: str, error: Exception) -> UserError:
    return UserError(f"{name} cannot be imported: {failure(error, path)}")
