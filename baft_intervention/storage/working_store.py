"""An adapter folder that is written to: every change is on the disk before the call that made it returns."""

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
    """Refuse a place where no adapter can be written, before the work is done.

    Raises:
        AdapterError: it is a file, or a folder of something else.
    """
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give the name of a folder for the adapter")
    if path.is_dir() and not (path / DESCRIPTION).is_file() and any(f.name not in _OWN for f in path.iterdir()):
        raise AdapterError(f"folder {path} is not empty and holds no adapter; choose a new folder")


def write_directory(path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write an adapter folder, or replace the adapter in one; afterwards it is all there, or all as it was.

    Raises:
        AdapterError: ``path`` is there and is no adapter directory, or cannot be written; what was there stays.
        StoreError: somebody has the folder open for writing.
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
    """An adapter folder that is open for writing: a snapshot, and a log of what was committed since.

    What :meth:`append` and :meth:`seal` have returned from is on the disk. Where they raise, or where the process ends in
    the middle of them, the folder holds what it held before (or, at the very end of :meth:`seal`, the same edits in their
    new form).

    Args:
        path: of an adapter, or of an empty folder or none, which then is made.

    Attributes:
        fresh: whether the folder held no adapter when it was opened.
        log_bytes: length of the log.

    Raises:
        AdapterError: it is a file, or a folder of something else.
        StoreError: somebody else has it open, it cannot be written to, or its log is damaged.
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
            reading = checked_log(self.path, self._snapshot)
        except BaseException:
            self._lock.release()
            raise
        self.log_bytes, self._number = reading.end, reading.records[-1].number + 1 if reading.records else 0

    def _finish_sealing(self) -> str:
        """Give the tensors of the snapshot their name, where the last writer could not; the snapshot's seal."""
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
            raise AdapterError(f"{self.path / DESCRIPTION} is truncated or no description of an adapter") from None

    def append(
        self,
        remove: Sequence[str] = (),
        add: Sequence[Mapping[str, Any]] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Commit one change, whole or not at all: take edits out, then put edits in.

        Args:
            remove: ids.
            add: summaries.
            tensors: theirs, ``layers.<n>.edits.<name> (E, ...)``.

        Raises:
            StoreError: it cannot be written; the change is not in the log.
        """
        begin = self.mark()
        data = b""
        if self._number == 0:
            data, self._number = encode(0, {"snapshot": self._snapshot}, {}), 1
        data += encode(self._number, {"remove": list(remove), "add": list(add)}, tensors or {})
        self._write(data, begin)

    def mark(self) -> tuple[int, int]:
        """Where the log is now, for :meth:`rollback`."""
        return self.log_bytes, self._number

    def rollback(self, mark: tuple[int, int]) -> None:
        """Take back what was appended since ``mark``; the snapshot must not have been replaced meanwhile."""
        if mark != self.mark():
            self.log_bytes, self._number = mark
            self._write(b"", mark)

    def _write(self, data: bytes, begin: tuple[int, int]) -> None:
        """Put ``data`` behind the last whole record, and wait until it is on the disk."""
        path = self.path / LOG
        try:
            new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(file).st_size < self.log_bytes:
                    raise OSError("somebody else has cut it off or removed it since it was opened")
                os.ftruncate(file, self.log_bytes)
                os.lseek(file, self.log_bytes, os.SEEK_SET)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
                if new:
                    sync_folder(self.path)
            except BaseException:
                with contextlib.suppress(
                    OSError
                ):  # what cannot be cut off now is cut off by the next writing or opening
                    os.ftruncate(file, self.log_bytes)
                raise
            finally:
                os.close(file)
        except BaseException as error:
            self.log_bytes, self._number = begin
            if isinstance(error, OSError):
                raise StoreError(
                    f"the change cannot be written to {path}: {error}; it is not committed, and what was there is unchanged"
                ) from error
            raise
        self.log_bytes += len(data)
        self._number += bool(data)

    def seal(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Replace snapshot and log by one new snapshot.

        Raises:
            AdapterError: it cannot be written; snapshot and log are as they were.
        """
        blob, sealed = serialised(state, description)
        if self._number:  # from now on it can be told that this log is contained in that snapshot
            self._write(encode(self._number, {"snapshot": sealed["seal"]}, {}), self.mark())
        replace_snapshot(self.path, blob, sealed)
        self._snapshot = sealed["seal"]
        with contextlib.suppress(OSError):
            (self.path / LOG).unlink(missing_ok=True)
            self.log_bytes = self._number = 0

    def close(self, *, discard: bool = False) -> None:
        """Let others write; with ``discard``, a folder that held no adapter before is left as it was then."""
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
    """A :class:`Store` that several processes have in common: rank 0 writes, and what fails there fails on every rank.

    All ranks call the same methods in the same order; :meth:`seal` and :meth:`close` are rank 0's own matter.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._store: Store | None = None

        def opened() -> tuple[Path, bool, int]:
            self._store = store = Store(path)
            return store.path, store.fresh, store.log_bytes

        self.path, self.fresh, self.log_bytes = from_main(opened)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and description of the adapter, see :func:`~baft_intervention.storage.exchange.read_directory`."""
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
    """An adapter folder for writing; of several processes rank 0 writes. Errors as :class:`Store`."""
    return Store(path) if world_size() == 1 else MainStore(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
