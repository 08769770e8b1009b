"""A lock that keeps a folder to one writer at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: there is no lock, so the user must keep to one writer
    fcntl = None

LOCK = "adapter.lock"


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or until the process ends in any way.

    It is a kernel lock (``flock``) on a file in the folder; the file holds the owner's process id. The owner removes the file
    before it releases the lock. If a killed process left a file behind, the next owner takes it over.

    Args:
        folder: an existing folder.
        name: file name of the lock.

    Raises:
        StoreError: another process holds the lock (the message gives its id), or the folder cannot be written to.
    """

    def __init__(self, folder: Path, name: str = LOCK):
        self._path = folder / name
        self._file = -1
        try:
            while not self._acquire(folder):
                pass
            os.ftruncate(self._file, 0)
            os.write(self._file, str(os.getpid()).encode())
        except OSError as error:
            self.release()
            raise StoreError(
                f"{folder} cannot be written to: {error.strerror or error}; make it writable, or give another folder"
            ) from error

    def _acquire(self, folder: Path) -> bool:
        """Try to lock the file; False if its previous owner removed it meanwhile, so that nobody else sees this lock."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return False
            self._file, file = file, -1
            return True
        except BlockingIOError:
            holder = os.read(file, 32).decode("ascii", "replace").strip() or "of unknown id"
            raise StoreError(
                f"{folder} is open for writing in process {holder}; wait for it, or give another folder"
            ) from None
        except FileNotFoundError:
            return False
        finally:
            if file >= 0:
                os.close(file)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
