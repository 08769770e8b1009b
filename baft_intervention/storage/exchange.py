"""Writing and reading an adapter folder, so that nothing half-written, foreign or altered is ever loaded.

The snapshot is two files, ``adapter.safetensors`` and ``adapter.json``. ``adapter.log`` (:mod:`~.edit_log`) holds the changes
committed since; it exists only while an editor adds to the folder. Every write takes effect at one moment:

- a new folder, when it is renamed into place;
- a new snapshot in an existing folder, when ``adapter.json`` is renamed. Its digest says which tensors belong to it: if the
  process ends before they are renamed too, they are those in ``adapter.safetensors.next``;
- a change in the log, when its record is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import AdapterError, RequestError, StoreError
from ..requests import EditRequest
from .edit_log import LogContents, LogRecord, read_log

logger = logging.getLogger(__name__)
SCHEMA = 1
TENSORS, DESCRIPTION, LOG = "adapter.safetensors", "adapter.json", "adapter.log"
NEXT = ".next"  # suffix of a file that is about to replace another
_READ_ATTEMPTS = 5  # how often to read a folder whose snapshot is replaced during the read
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema": int, "base_model": dict, "config": dict, "layers": list, "edits": list, "tensors_sha256": str,
}  # fmt: skip

_BASE_MODEL: dict[str, type | tuple[type, ...]] = {
    "name": str, "revision": (str, type(None)), "dtype": (str, type(None)), "fingerprint": str, "config_hash": str,
}  # fmt: skip
_SUMMARY: dict[str, type | tuple[type, ...]] = {
    "id": str, "requests": list, "loss": (int, float), "steps": int, "reached": bool,
}  # fmt: skip


def _seal(description: Mapping[str, Any]) -> str:
    """sha256 (hex) of the description without its seal."""
    text = json.dumps({k: v for k, v in description.items() if k != "seal"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def serialised(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the tensor file, and the description with their digest and its own seal."""
    blob = save_tensors(dict(state), metadata={"format": "pt"})
    sealed = {"schema": SCHEMA, **description, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    sealed["seal"] = _seal(sealed)
    return blob, sealed


def description_text(sealed: Mapping[str, Any]) -> bytes:
    return json.dumps(sealed, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")


def replace_snapshot(path: Path, blob: bytes, sealed: Mapping[str, Any]) -> None:
    """Write a snapshot into a folder; it replaces the old one at the moment when the description is renamed.

    Raises:
        AdapterError: the snapshot cannot be written; the old one is unchanged.
    """
    tensors, description = path / (TENSORS + NEXT), path / (DESCRIPTION + NEXT)
    try:
        write_synced(tensors, blob)
        write_synced(description, description_text(sealed))
        sync_folder(path)
        os.replace(description, path / DESCRIPTION)
    except OSError as error:
        for left in (description, tensors):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        raise AdapterError(f"the adapter cannot be written to {path}: {error}; what was there is unchanged") from error
    with contextlib.suppress(OSError):  # the new snapshot is in force already; the next writer can finish the renaming
        sync_folder(path)
        os.replace(tensors, path / TENSORS)
        sync_folder(path)


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's file names to disk; does nothing if a folder cannot be opened (Windows)."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------------- reading


def read_directory(path: str | os.PathLike[str], *, recover: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check an adapter folder, log included: ``(state, description)``.

    Args:
        path: the folder; a writer may have it open.
        recover: skip damaged records of the log, with a warning for each, instead of refusing the adapter.

    Raises:
        AdapterError: the folder does not exist, a file is missing, truncated or altered, or the schema is another one.
        StoreError: the log is damaged, or a writer keeps replacing the snapshot.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise AdapterError(f"there is no adapter folder {path}")
    for attempt in range(_READ_ATTEMPTS):
        raw = _read(path, DESCRIPTION)
        try:
            state, description = _read_snapshot(path, raw)
            log = checked_log(path, description["seal"], recover=recover)
        except AdapterError:
            if attempt + 1 < _READ_ATTEMPTS and _read(path, DESCRIPTION) != raw:
                continue
            raise
        if _read(path, DESCRIPTION) == raw:  # no writer replaced the snapshot meanwhile
            break
    else:
        raise StoreError(f"a writer keeps replacing {path}; read it once the writer is done")
    changes = _changes_since(log, description["seal"])
    return _applied(path / LOG, state, description, changes, recover=recover) if changes else (state, description)


def _read(path: Path, name: str) -> bytes:
    file = path / name
    if file.is_symlink() and path.resolve() not in file.resolve().parents:
        raise AdapterError(f"{file} is a link out of the adapter folder; copy the file itself")
    if not file.is_file():
        raise AdapterError(f"folder {path} has no {name}; it is not an adapter, or it is damaged")
    try:
        return file.read_bytes()
    except OSError as error:
        raise AdapterError(f"the adapter in {path} cannot be read: {error}") from error


def _read_snapshot(path: Path, raw: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        description = json.loads(raw.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise AdapterError(f"{path / DESCRIPTION} is truncated or not JSON: {error}") from None
    _check_description(path / DESCRIPTION, description)
    blob = b""
    for name in [n for n in (TENSORS, TENSORS + NEXT) if (path / n).is_file()] or [TENSORS]:
        blob = _read(path, name)
        if hashlib.sha256(blob).hexdigest() == description["tensors_sha256"]:
            break
    else:
        raise AdapterError(
            f"{path / TENSORS} is truncated or altered: its sha256 differs from the one in {DESCRIPTION}"
        )
    try:
        return load_tensors(blob), description
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path / TENSORS} is not a safetensors file: {error}") from None


def checked_log(path: Path, snapshot: str, *, recover: bool = False) -> LogContents:
    """Read the log of a folder whose snapshot has the seal ``snapshot``; warn if its last record is cut off.

    Raises:
        AdapterError: the log is a symbolic link.
        StoreError: the log cannot be read, is damaged (unless ``recover``), or belongs to another snapshot.
    """
    file = path / LOG
    if file.is_symlink():
        raise AdapterError(f"{file} is a link; copy the file itself")
    try:
        log = read_log(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    remedy = f"restore the file from a copy, or save the intact records: baft recover --adapter {path} --out NEW"
    for text in log.damage:
        if not recover:
            count = f"{len(log.records)} other records are intact" if log.records else "no other record is intact"
            raise StoreError(f"{file}: {text}; {count}, and nothing was loaded; {remedy}")
        logger.warning("%s: %s; the changes it held are lost", file, text)
    if log.records and not log.damage and not any(r.change.get("snapshot") == snapshot for r in log.records):
        raise StoreError(f"{file} does not belong to the {DESCRIPTION} beside it; restore both from the same copy")
    if log.tail:
        logger.warning("%s: %s; it was never committed and is dropped", file, log.tail)
    return log


def _changes_since(log: LogContents, snapshot: str) -> list[LogRecord]:
    """The changes committed since the snapshot with this seal; all, if damage destroyed the record that names it."""
    named = [i for i, record in enumerate(log.records) if record.change.get("snapshot") == snapshot]
    return [r for r in log.records[named[-1] + 1 if named else 0 :] if "snapshot" not in r.change]


def _applied(
    file: Path,
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    changes: Iterable[LogRecord],
    *,
    recover: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Apply changes to a snapshot: ``(state, description)`` of the result."""
    rows: dict[str, tuple[Mapping[str, Any], dict[str, Tensor]]] = {}  # id -> summary, and its row of each tensor

    def add(summaries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        for i, summary in enumerate(summaries):
            if summary["id"] in rows and not recover:
                raise ValueError(f"edit {summary['id']!r} already exists")
            rows[summary["id"]] = summary, {name: tensor[i] for name, tensor in tensors.items()}

    source = f"{file.parent / DESCRIPTION}"
    try:
        add(description["edits"], {name: tensor for name, tensor in state.items() if ".edits." in name})
        for record in changes:
            source = f"{file}: record {record.number} at byte {record.offset}"
            for name in record.change["remove"]:
                if rows.pop(name, None) is None and not recover:
                    raise ValueError(f"there is no edit {name!r} to remove")
            add(record.change["add"], record.tensors)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise StoreError(f"{source} is inconsistent: {error!r}") from None
    merged = {name: tensor for name, tensor in state.items() if ".edits." not in name}
    names = {name for _, own in rows.values() for name in own}
    try:
        merged |= {name: torch.stack([own[name] for _, own in rows.values()]) for name in sorted(names)}
    except (KeyError, RuntimeError) as error:
        raise StoreError(f"{file}: the tensors of its records do not fit together: {error}") from None
    return merged, {**description, "edits": [summary for summary, _ in rows.values()]}


def _check_description(file: Path, description: Any) -> None:
    if not isinstance(description, dict):
        raise AdapterError(f"{file} must hold an object, not {type(description).__name__}")
    schema = description.get("schema")
    if schema != SCHEMA:
        raise AdapterError(f"{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    for name, kind in _REQUIRED.items():
        if not isinstance(description.get(name), kind):
            raise AdapterError(
                f"{file}: field {name!r} is {description.get(name)!r}; it is missing or has the wrong type"
            )
    if description.get("seal") != _seal(description):
        raise AdapterError(f"{file} was altered after it was written: its seal does not match its content")
    # a seal is not a signature: anyone who knows the format can seal anything
    _check_fields(f"{file}: base_model", description["base_model"], _BASE_MODEL)
    for i, edit in enumerate(description["edits"]):
        check_summary(edit, f"{file}: edits[{i}]")


def check_summary(summary: Any, source: str) -> None:
    """Check the types of an edit's summary.

    Args:
        summary: entry of ``edits`` in a description.
        source: prefix of error messages.

    Raises:
        AdapterError: it is not an object, a field is missing or has the wrong type, or a request is invalid.
    """
    _check_fields(source, summary, _SUMMARY)
    for request in summary["requests"]:
        try:
            EditRequest.from_dict(request)
        except RequestError as error:
            raise AdapterError(f"{source}: {error}") from None


def _check_fields(source: str, value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(value, dict):
        raise AdapterError(f"{source} must be an object, not {type(value).__name__}")
    for name, kind in fields.items():
        found = value.get(name)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise AdapterError(f"{source}: field {name!r} is {found!r}; it is missing or has the wrong type")
