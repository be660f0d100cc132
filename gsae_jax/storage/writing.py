"""Files and folders that appear whole or not at all."""

import contextlib
import fcntl
import glob
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import safetensors
from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.storage import paths

SCRATCH = ".gsae_jax-"  # how the names of folders begin that are being written


def write_text(path: epath.PathLike, text: str) -> None:
    """Write a file whole or not at all, in place of what was there."""
    paths.of(path).put_text(text)


@contextlib.contextmanager
def whole_folder(path: epath.PathLike, last: str = "", replace: bool = True) -> Iterator[pathlib.Path]:
    """An empty local folder to fill. It takes its place when it is whole; where that fails, nothing is left of it.

    What a killed process left of the same folder is removed.

    Args:
        path: its place, local or gs://bucket/folder.
        last: the file that says that all others are there; in a bucket, files appear one after the other.
        replace: what was there; else only an empty folder may be there.

    Raises:
        OSError: it cannot be written.
    """
    target = paths.of(path)
    parent, prefix = target.scratch_parent(), f"{SCRATCH}{target.name[:32]}-"
    for scratch in list(parent.glob(f"{glob.escape(prefix)}*")):
        if (abandoned := _hold(scratch)) is not None:  # by a process that was killed
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(abandoned)
    scratch = parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    held = _hold(scratch)
    try:
        yield scratch
        target.put_folder(scratch, last, replace)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], or_empty: bool = False) -> Iterator[pathlib.Path]:
    """A new local folder to fill, which appears under its name when it is whole, and not at all where that fails.

    Args:
        path: which the user chose.
        or_empty: whether an empty folder may be there.

    Raises:
        UserError: the path exists, or cannot be written.
    """
    target = paths.require_local(path)
    made = []
    try:
        check_new(target, or_empty)
        made = [parent for parent in target.parents if not parent.exists()]
        with whole_folder(target, replace=False) as scratch:
            yield scratch
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{target} cannot be written ({error}); write the name of a new folder") from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # where it holds the folder
                parent.rmdir()


def check_new(path: epath.PathLike, or_empty: bool = False) -> None:
    """Raises `UserError` for a path where no new folder can be; the arguments are those of `new_folder`."""
    target = paths.of_user(path)
    if or_empty and target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or os.path.lexists(target):  # a link may lead nowhere
        raise UserError(f"{target} exists, and nothing is overwritten; write the name of a new folder")
    target.check_writable()


def _hold(folder: pathlib.Path) -> int | None:
    """A descriptor that holds a folder until it is closed or its process ends; None where another process does."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or no folder of ours
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
