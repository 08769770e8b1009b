"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: no lock, one writer is up to the user
    fcntl = None

LOCK = "adapter.lock"


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or the end of the process, however that ends.

    The lock is the kernel's (``flock``), on a file in the folder that holds the owner's process id. The file is removed
    before the lock is released; one that a killed process left behind is taken over.

    Args:
        folder: it must exist.
        name: of the lock file.

    Raises:
        StoreError: another process holds the lock (its id is named), or the folder cannot be written to.
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
        """Lock the file; False where its last holder removed it meanwhile, so that the lock is on nothing."""
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
        """Let go; again is harmless."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
