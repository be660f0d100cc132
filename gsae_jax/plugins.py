"""Finding a part by the name of its file: adding an SAE, a language model or a corpus touches one file."""

import importlib
import pkgutil
from types import ModuleType

from gsae_jax.errors import UserError, known_names


def known(wing: str, having: str) -> dict[str, ModuleType]:
    """The modules of `gsae_jax.<wing>` that define `having`, by file name."""
    package = importlib.import_module(f"gsae_jax.{wing}")
    modules = {
        info.name: importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if not info.ispkg
    }
    return {name: module for name, module in sorted(modules.items()) if hasattr(module, having)}


def load(wing: str, name: str, having: str) -> ModuleType:
    """The module called `name` of a wing.

    Raises:
        UserError: no such module; the message lists the known ones.
    """
    modules = known(wing, having)
    if name not in modules:
        raise UserError(f"{name!r} is not known; {known_names(name, modules)}")
    return modules[name]
