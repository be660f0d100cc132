"""Local and gs:// paths: which they are, and what they need."""

import glob
import importlib.util
import os
import re

import fsspec
from etils import epath

from gsae_jax.config import ConfigError


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is a gs:// one."""
    return os.fspath(path).startswith("gs://")


def check(field: str, path: epath.PathLike) -> None:
    """Prepare for a path that may be gs://.

    Raises:
        ConfigError: a URL of another kind, or gs:// without the packages for it.
    """
    text = os.fspath(path)
    if not re.match(r"\w\w+:/", text):
        return
    if not re.match("gs://[^/]", text):
        # A pathlib.Path makes gs:/ of gs://.
        raise ConfigError(field, f"is {text!r}; write a local path or gs://bucket/folder, as text")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(field, f"{text} is in a bucket; `pip install '.[gcs]'` first")
    # What other processes and tensorstore write would be missing from remembered listings.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def absolute(path: str) -> str:
    """A local path that means the same in every working directory.

    A path that does not exist comes back unchanged, as it may be a hub name.
    """
    try:
        expanded = os.path.expanduser(path)
        if path and not is_bucket(path) and os.path.lexists(expanded):
            return os.path.abspath(expanded)
        # Only the path is a pattern; characters of the working directory are literal.
        pattern = glob.has_magic(path) and not is_bucket(path) and not os.path.isabs(expanded)
        return os.path.join(glob.escape(os.getcwd()), expanded) if pattern else path
    except (OSError, ValueError):  # a name that no path can have, or a working directory that is gone
        return path


def line(error: Exception) -> str:
    """An error of a library that has kinds of its own, such as gcsfs, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
