"""A file that survives a full disk."""

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class File:
    """A file that grows; what a full disk does not take waits for room, and the file never ends in part of it."""

    SCHEME = "patient"  # the prefix of paths by which TensorBoard's writer is told to use this

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""
        self._file = path.open("ab", buffering=0)

    @classmethod
    def open(cls, path: str) -> "File":
        """For tensorboardX, as is `directory_check`."""
        return cls(Path(path.removeprefix(f"{cls.SCHEME}:")))

    @classmethod
    def directory_check(cls, path: str) -> None:
        """Make a directory."""
        Path(path.removeprefix(f"{cls.SCHEME}:")).mkdir(parents=True, exist_ok=True)

    def write(self, content: bytes) -> None:
        """Append."""
        end, waited = os.fstat(self._file.fileno()).st_size, bool(self._waiting)
        self._waiting += content
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            if not waited:
                logger.warning(f"{self._path} cannot be written ({error}); its lines wait until it can")
        else:
            self._waiting = b""

    def flush(self) -> None:
        """Try again."""
        if self._waiting:
            self.write(b"")

    def close(self) -> None:
        """Try again for the last time."""
        self.flush()
        if self._waiting:
            logger.warning(f"{self._path} lacks its last {len(self._waiting)} bytes")
        self._file.close()
