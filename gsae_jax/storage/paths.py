"""Paths on the local disk and in a bucket, gs://bucket/folder: all that differs between the two.

Both kinds are epath's, so that orbax and TFDS take them. In a bucket there are no directories and no locks, and files
are put whole: they are neither appended to nor renamed.
"""

import contextlib
import errno
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator

import filelock
import fsspec
from etils import epath

from gsae_jax import errors
from gsae_jax.config_trees import check_text
from gsae_jax.errors import UserError

PROBE = ".probe-"  # how the names of files begin that only try whether a bucket can be written


class LocalPath(epath.gpath.PosixGPath):
    """A path on the local disk. Its own characters are literal in `glob`, where epath takes them for a pattern.

    orbax looks for the files of a checkpoint by `glob`. It passes on the path that it was given, and what it makes of
    it has this class too.
    """

    @property
    def local(self) -> pathlib.Path | None:
        """The path for whoever can only use the local disk."""
        return pathlib.Path(self)

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        """The files in this folder that match."""
        return map(type(self), pathlib.Path(self).glob(pattern))

    def is_file(self) -> bool:
        """Whether it is a file that can be read to its end; epath takes pipes and devices for files."""
        return os.path.isfile(self)

    def size(self) -> int:
        """In bytes; epath's `stat` fails for files of users without a name, as in containers."""
        return os.stat(self).st_size

    def absolute(self) -> "LocalPath":
        """As orbax wants it."""
        return type(self)(pathlib.Path(self).absolute())

    def is_empty(self, ignored: str) -> bool:
        """Whether nothing is here, or a folder that has at most a file with the name `ignored`."""
        return not self.exists() or (self.is_dir() and all(entry.name == ignored for entry in self.iterdir()))

    def make_folder(self) -> None:
        """Make the folder, and those above it, where they are missing."""
        self.mkdir(parents=True, exist_ok=True)

    def lock(self, name: str) -> filelock.BaseFileLock | None:
        """A lock in the file `name` of this folder."""
        return filelock.FileLock(self / name)

    def check_name(self) -> None:
        """Raises `UserError` for a path that orbax's tensorstore takes for another one."""
        why = "which the checkpoint library takes for a slash, so that it would write elsewhere"
        _refuse_characters(os.fspath(self.absolute()), "\\", why)

    def check_writable(self) -> None:
        """Raises `UserError` where no folder can be made or written here."""
        above = next(folder for folder in self.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise UserError(f"{self} is not writable, as {above} is not a folder; write another path")
        parent = self if self.is_dir() else above
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{parent} is not writable; write a directory that is")
        try:  # even root may not write everywhere; a temporary file has no name, so nothing is left behind
            tempfile.TemporaryFile(dir=os.path.realpath(parent)).close()
        except OSError as error:
            raise UserError(f"{parent} is not writable ({error}); write one that is") from error

    def unreadable(self, error: Exception) -> str:
        """A sentence for a path whose reading gave an error."""
        return f"{self} cannot be read ({error}); write one that can be"

    def put_text(self, text: str) -> None:
        """Write a file whole or not at all, in place of what was here."""
        scratch = self.with_name(f".{self.name}.new")  # the next write takes the place of what a killed process left
        try:
            scratch.write_text(text)
            os.replace(scratch, self)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise

    def scratch_parent(self) -> pathlib.Path:
        """Where a folder may be made that `put_folder` takes; it exists."""
        parent = pathlib.Path(self).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        return parent

    def put_folder(self, scratch: pathlib.Path, last: str, replace: bool) -> None:
        """Have the files of a local folder here, all at once; with `replace` in place of what was here.

        Args:
            scratch: the folder, which is gone then; on the same disk.
            last: the file that a bucket gets last.
            replace: else only an empty folder may be here.
        """
        if replace:
            shutil.rmtree(self, ignore_errors=True)
        os.replace(scratch, self)

    def move_folder(self, to: "LocalPath") -> None:
        """Move this folder, whole."""
        to.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self, to)

    def growing(self) -> "Growing":
        """This folder, for files that are appended to."""
        return Growing(pathlib.Path(self))


class BucketPath(epath.gpath.PosixGPath):
    """A path in a bucket; its methods do what those of `LocalPath` do."""

    @property
    def local(self) -> pathlib.Path | None:
        """None: nothing here is on the local disk."""
        return None

    def size(self) -> int:
        """In bytes."""
        return self.stat().length

    def absolute(self) -> "BucketPath":
        """Itself; epath takes gs:// for a local folder."""
        return self

    def is_empty(self, ignored: str) -> bool:
        """Whether nothing is here but what tries whether the bucket can be written."""
        try:
            names = {entry.name for entry in self.iterdir() if not entry.name.startswith(PROBE)} - {ignored}
        except FileNotFoundError:
            return True
        # A folder that someone made lists itself, and so does a file.
        return not names or (names == {self.name} and self.is_dir())

    def make_folder(self) -> None:
        """Nothing: a bucket has no directories."""

    def lock(self, name: str) -> filelock.BaseFileLock | None:
        """None: a bucket has no locks."""
        return None

    def check_name(self) -> None:
        """Raises `UserError` for a path that gcsfs takes for another one."""
        _refuse_characters(os.fspath(self), "[]*?\\", "which bucket clients take for patterns")

    def check_writable(self) -> None:
        """Raises `UserError` where files cannot be written and deleted here."""
        probe = self / f"{PROBE}{uuid.uuid4().hex}"
        try:
            probe.write_text("")
            probe.unlink()
        except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
            raise UserError(
                f"{self} cannot be written ({error_line(error)}); write a bucket that exists, and log in to an account "
                "that may read, write, list and delete in it"
            ) from error

    def unreadable(self, error: Exception) -> str:
        """A sentence for a path whose reading gave an error."""
        return f"{self} cannot be read ({error_line(error)}); log in to an account that may read it"

    def put_text(self, text: str) -> None:
        """Write a file; in a bucket every file appears whole or not at all."""
        self.write_text(text)

    def scratch_parent(self) -> pathlib.Path:
        """Where a folder may be made that `put_folder` takes."""
        return pathlib.Path(tempfile.gettempdir())

    def put_folder(self, scratch: pathlib.Path, last: str, replace: bool) -> None:
        """Put the files of a local folder here; the one called `last`, which says that all are here, comes last."""
        copy_files(scratch, self, last)

    def move_folder(self, to: "BucketPath") -> None:
        """Copy all files of this folder, and then delete them here; nothing in a bucket can be renamed."""
        files = list(files_below(self))
        for file in files:
            file.copy(to / os.path.relpath(os.fspath(file), os.fspath(self)), overwrite=True)
        for file in files:
            file.unlink()

    def growing(self) -> "Growing":
        """A local folder for files that are appended to; `sync` copies them here."""
        return _GrowingCopy(self)


Path = LocalPath | BucketPath


class Growing:
    """A folder on the local disk where files are appended to.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def sync(self) -> None:
        """Have all files where they belong."""

    def close(self) -> None:
        """Sync for the last time."""


class _GrowingCopy(Growing):
    def __init__(self, bucket: BucketPath):
        self._bucket, self._scratch = bucket, tempfile.TemporaryDirectory(prefix="gsae_jax-")
        super().__init__(pathlib.Path(self._scratch.name))

    def sync(self) -> None:
        for folder, _, names in os.walk(self.folder):
            for file in (pathlib.Path(folder, name) for name in names if not pathlib.Path(folder, name).is_symlink()):
                epath.Path(file).copy(self._bucket / file.relative_to(self.folder), overwrite=True)

    def close(self) -> None:
        self.sync()
        self._scratch.cleanup()


def _is_in_bucket(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith("gs://")


def of(path: epath.PathLike) -> Path:
    """The path of a file or folder of ours, or one that was checked before."""
    return BucketPath(path) if _is_in_bucket(path) else LocalPath(path)


def of_user(path: epath.PathLike) -> Path:
    """The path that a user wrote; the ~ of a local one, which shells leave to programs, becomes the home directory.

    Raises:
        UserError: no path, a URL of another kind, or gs:// without the packages for it.
    """
    errors.check_kind(path, str | os.PathLike, "", "a path")
    check_text(os.fspath(path))
    if not os.fspath(path):
        raise UserError("is empty; write a path")
    check(path)
    if _is_in_bucket(path):
        return BucketPath(path)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{os.fspath(path)[:50]!r}... has a name that is too long; write another path") from error
    return LocalPath(path if os.path.lexists(path) else os.path.expanduser(path))


def local_of_user(path: epath.PathLike) -> pathlib.Path | None:
    """As `of_user`, on the local disk; None for a path in a bucket."""
    return None if _is_in_bucket(path) else of_user(path).local


def require_local(path: epath.PathLike) -> pathlib.Path:
    """An absolute path on the local disk, which a user wrote; raises `UserError` for a URL, and as `of_user`."""
    if _is_url(path):
        raise UserError(f"{os.fspath(path)} is not a local path; write one, and copy what it holds")
    return pathlib.Path(of_user(path)).absolute()


def check(path: epath.PathLike) -> None:
    """Prepare for a path that may be gs://.

    Raises:
        UserError: a URL of another kind, or gs:// without the packages for it.
    """
    text = os.fspath(path)
    if not _is_url(text):
        return
    if not re.match("gs://[^/]", text):
        # A pathlib.Path makes gs:/ of gs://.
        raise UserError(f"is {text!r}; write a local path or gs://bucket/folder, as text")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket; `pip install 'gsae_jax[gcs]'` first")
    # What other processes and tensorstore write would be missing from remembered listings.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def check_readable(path: epath.PathLike) -> None:
    """Raises `UserError` for what `check` refuses, and for a bucket that cannot be read."""
    check(path)
    try:
        of(path).exists()
    except Exception as error:
        raise UserError(of(path).unreadable(error)) from error


def absolute(path: str) -> str:
    """A local path that means the same in every working directory.

    A path that does not exist comes back unchanged, as it may be a hub name.
    """
    try:
        expanded = os.path.expanduser(path)
        if path and not _is_in_bucket(path) and os.path.lexists(expanded):
            return os.path.abspath(expanded)
        # Only the path is a pattern; characters of the working directory are literal.
        pattern = glob.has_magic(path) and not _is_in_bucket(path) and not os.path.isabs(expanded)
        return os.path.join(glob.escape(os.getcwd()), expanded) if pattern else path
    except (OSError, ValueError):  # a name that no path can have, or a working directory that is gone
        return path


def copy_files(folder: pathlib.Path, to: Path, last: str) -> None:
    """Copy the files of a folder; the one called `last`, which says that all are there, comes last."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
        epath.Path(file).copy(to / file.name, overwrite=True)


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder, those of folders in it too."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


def error_line(error: Exception) -> str:
    """An error of a library that has kinds of its own, such as gcsfs, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_url(path: epath.PathLike) -> bool:
    return re.match(r"\w\w+:/", os.fspath(path)) is not None


def _refuse_characters(path: str, refused: Iterable[str], why: str) -> None:
    if wrong := [character for character in refused if character in path]:
        raise UserError(f"{path} contains {' '.join(wrong)}, {why}; write a path without it")
