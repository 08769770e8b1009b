"""An adapter folder open for writing: a change is on disk before the call that makes it returns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError, StoreError
from ..runtime.distributed import from_main, world_size
from .edit_log import encode
from .exchange import (
    DESCRIPTION,
    LOG,
    NEXT,
    TENSORS,
    checked_log,
    description_text,
    read_directory,
    replace_snapshot,
    serialised,
    sync_folder,
    write_synced,
)
from .locking import LOCK, FolderLock

_OWN = {TENSORS, DESCRIPTION, LOG, LOCK, TENSORS + NEXT, DESCRIPTION + NEXT}


def check_place(path: Path) -> None:
    """Check that an adapter can be written to ``path``, before any work is done.

    Raises:
        AdapterError: ``path`` is a file, or a folder that holds something else.
    """
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give the name of a folder for the adapter")
    if path.is_dir() and not (path / DESCRIPTION).is_file() and any(f.name not in _OWN for f in path.iterdir()):
        raise AdapterError(f"folder {path} is not empty and holds no adapter; choose a new folder")


def write_directory(path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write an adapter folder, or replace the adapter in an existing one: completely, or not at all.

    Raises:
        AdapterError: ``path`` exists and is not an adapter folder, or it cannot be written; the old content stays.
        StoreError: a process has the folder open for writing.
    """
    path = Path(path).expanduser()
    check_place(path)
    if path.is_dir():
        with Store(path) as store:
            store.seal(state, description)
        return path
    blob, sealed = serialised(state, description)
    fresh: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        write_synced(fresh / TENSORS, blob)
        write_synced(fresh / DESCRIPTION, description_text(sealed))
        os.chmod(fresh, 0o777 & ~_umask())
        os.rename(fresh, path)
        sync_folder(path.parent)
    except OSError as error:
        raise AdapterError(f"the adapter cannot be written to {path}: {error}; what was there is unchanged") from error
    finally:
        if fresh is not None and fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)
    return path


class Store:
    """An adapter folder open for writing: a snapshot, and a log of the changes committed since.

    Once :meth:`append` or :meth:`seal` returns, its change is on disk. If it raises, or the process ends inside it, the folder
    keeps its old content (or, at the very end of :meth:`seal`, holds the same edits in the new snapshot).

    Args:
        path: an adapter folder, an empty folder, or a path that does not exist yet and is created.

    Attributes:
        fresh: whether the folder held no adapter when it was opened.
        log_bytes: length of the log in bytes.

    Raises:
        AdapterError: ``path`` is a file, or a folder that holds something else.
        StoreError: another process has the folder open, it cannot be written to, or its log is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        check_place(self.path)
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written to: {error}; give another folder") from error
        self._lock = FolderLock(self.path)
        try:
            self.fresh = not (self.path / DESCRIPTION).is_file()
            self._snapshot = "" if self.fresh else self._finish_sealing()
            log = checked_log(self.path, self._snapshot)
        except BaseException:
            self._lock.release()
            raise
        self.log_bytes, self._number = log.end, log.records[-1].number + 1 if log.records else 0

    def _finish_sealing(self) -> str:
        """Rename the snapshot's tensors if the last writer could not; return the snapshot's seal."""
        try:
            description = json.loads((self.path / DESCRIPTION).read_bytes())
            waiting = self.path / (TENSORS + NEXT)
            if waiting.is_file():
                if hashlib.sha256(waiting.read_bytes()).hexdigest() == description["tensors_sha256"]:
                    os.replace(waiting, self.path / TENSORS)
                else:
                    waiting.unlink()
            return str(description["seal"])
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written to: {error}; give another folder") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            raise AdapterError(f"{self.path / DESCRIPTION} is truncated or not the description of an adapter") from None

    def append(
        self,
        remove: Sequence[str] = (),
        add: Sequence[Mapping[str, Any]] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Commit one change, completely or not at all: remove edits, then add edits.

        Args:
            remove: ids of the edits to remove.
            add: summaries of the edits to add.
            tensors: tensors of the added edits, ``layers.<n>.edits.<name> (E, ...)``.

        Raises:
            StoreError: the change cannot be written and is not in the log.
        """
        begin = self.mark()
        data = b""
        if self._number == 0:
            data, self._number = encode(0, {"snapshot": self._snapshot}, {}), 1
        data += encode(self._number, {"remove": list(remove), "add": list(add)}, tensors or {})
        self._write(data, begin)

    def mark(self) -> tuple[int, int]:
        """The current end of the log, to pass to :meth:`rollback`."""
        return self.log_bytes, self._number

    def rollback(self, mark: tuple[int, int]) -> None:
        """Remove the changes appended since ``mark``; the snapshot must still be the same."""
        if mark != self.mark():
            self.log_bytes, self._number = mark
            self._write(b"", mark)

    def _write(self, data: bytes, begin: tuple[int, int]) -> None:
        """Write ``data`` after the last intact record, and wait until it is on disk."""
        path = self.path / LOG
        try:
            new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(file).st_size < self.log_bytes:
                    raise OSError("another process has shortened or removed it since it was opened")
                os.ftruncate(file, self.log_bytes)
                os.lseek(file, self.log_bytes, os.SEEK_SET)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
                if new:
                    sync_folder(self.path)
            except BaseException:
                with contextlib.suppress(OSError):  # if this fails, the next write truncates the log
                    os.ftruncate(file, self.log_bytes)
                raise
            finally:
                os.close(file)
        except BaseException as error:
            self.log_bytes, self._number = begin
            if isinstance(error, OSError):
                raise StoreError(
                    f"the change cannot be written to {path}: {error}; it is not committed, and the folder is unchanged"
                ) from error
            raise
        self.log_bytes += len(data)
        self._number += bool(data)

    def seal(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Replace the snapshot and the log by one new snapshot.

        Raises:
            AdapterError: the snapshot cannot be written; the folder keeps its old edits.
        """
        blob, sealed = serialised(state, description)
        if self._number:  # tells a later reader that the new snapshot contains this log, should the log survive
            self._write(encode(self._number, {"snapshot": sealed["seal"]}, {}), self.mark())
        replace_snapshot(self.path, blob, sealed)
        self._snapshot = sealed["seal"]
        with contextlib.suppress(OSError):
            (self.path / LOG).unlink(missing_ok=True)
            self.log_bytes = self._number = 0

    def close(self, *, discard: bool = False) -> None:
        """Release the folder; with ``discard``, empty it again if it held no adapter when it was opened."""
        if discard and self.fresh:
            for name in (LOG, DESCRIPTION, TENSORS, DESCRIPTION + NEXT, TENSORS + NEXT):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        if discard and self.fresh and self._made:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MainStore:
    """A :class:`Store` that several processes share: rank 0 writes, and its errors are raised on every rank.

    All ranks call the same methods in the same order. :meth:`seal` and :meth:`close` act on rank 0 alone, and their errors
    are raised only there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._store: Store | None = None

        def opened() -> tuple[Path, bool, int]:
            self._store = store = Store(path)
            return store.path, store.fresh, store.log_bytes

        self.path, self.fresh, self.log_bytes = from_main(opened)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and description of the adapter; see :func:`~baft_intervention.storage.exchange.read_directory`."""
        return from_main(lambda: read_directory(self.path))

    def append(
        self,
        remove: Sequence[str] = (),
        add: Sequence[Mapping[str, Any]] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._on_main(lambda store: store.append(remove, add, tensors))

    def mark(self) -> Any:
        return self._store and self._store.mark()

    def rollback(self, mark: Any) -> None:
        self._on_main(lambda store: store.rollback(mark))

    def _on_main(self, change: Callable[[Store], None]) -> None:
        def changed() -> int:
            assert self._store is not None
            change(self._store)
            return self._store.log_bytes

        self.log_bytes = from_main(changed)

    def seal(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        if self._store is not None:
            self._store.seal(state, description)
        self.log_bytes = 0

    def close(self, *, discard: bool = False) -> None:
        if self._store is not None:
            self._store.close(discard=discard)


def open_store(path: str | os.PathLike[str]) -> Store | MainStore:
    """Open an adapter folder for writing. With several processes, rank 0 writes. Raises what :class:`Store` raises."""
    return Store(path) if world_size() == 1 else MainStore(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
