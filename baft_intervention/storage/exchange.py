"""Writing and reading an adapter directory, so that nothing half-written, foreign or altered is ever loaded.

The snapshot is two files, ``adapter.safetensors`` and ``adapter.json``. What was committed since stands in ``adapter.log``
(:mod:`~.edit_log`), which is there only while a folder is being added to. Each way of writing has one moment at
which it is done: a new folder is renamed into place; a snapshot in a folder that is there is replaced by the renaming of
``adapter.json``, whose digest says which tensors are its own (those of ``adapter.safetensors.next``, should the process
end before they have their name); a record of the log counts once it is whole.
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
from .edit_log import Reading, Record, read_log

logger = logging.getLogger(__name__)
SCHEMA = 1
TENSORS, DESCRIPTION, LOG = "adapter.safetensors", "adapter.json", "adapter.log"
NEXT = ".next"  # ends the name of what is going to take a file's place
_READINGS = 5  # how often a folder is read again that is written to meanwhile
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
    """sha256 over the description without its seal."""
    text = json.dumps({k: v for k, v in description.items() if k != "seal"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def serialised(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The tensor file's bytes, and the description with their digest and its own seal."""
    blob = save_tensors(dict(state), metadata={"format": "pt"})
    sealed = {"schema": SCHEMA, **description, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    sealed["seal"] = _seal(sealed)
    return blob, sealed


def description_text(sealed: Mapping[str, Any]) -> bytes:
    return json.dumps(sealed, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")


def replace_snapshot(path: Path, blob: bytes, sealed: Mapping[str, Any]) -> None:
    """Put a new snapshot into a folder, in place of the old one if there is one; the renaming of the description does it.

    Raises:
        AdapterError: it cannot be written; the old one is unchanged.
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
    with contextlib.suppress(OSError):  # the new snapshot is there already: whoever opens the folder can finish this
        sync_folder(path)
        os.replace(tensors, path / TENSORS)
        sync_folder(path)


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put names on the disk; does nothing where folders cannot be opened (Windows)."""
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
    """Read and check an adapter directory, log included: ``(state, description)``.

    Args:
        path: the folder; it may be in use by a writer.
        recover: leave out damaged records of the log, with a warning for each, instead of refusing the whole.

    Raises:
        AdapterError: no such folder, a file that is missing, truncated or altered, or another schema.
        StoreError: the log is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise AdapterError(f"there is no adapter folder {path}")
    for attempt in range(_READINGS):
        raw = _read(path, DESCRIPTION)
        try:
            state, description = _read_snapshot(path, raw)
            reading = checked_log(path, description["seal"], recover=recover)
        except AdapterError:
            if attempt + 1 < _READINGS and _read(path, DESCRIPTION) != raw:
                continue
            raise
        if _read(path, DESCRIPTION) == raw:  # not replaced meanwhile by a writer
            break
    else:
        raise StoreError(f"{path} is being replaced all the time; read it when its writer is done")
    changes = _changes_since(reading, description["seal"])
    return _applied(path / LOG, state, description, changes, recover=recover) if changes else (state, description)


def _read(path: Path, name: str) -> bytes:
    file = path / name
    if file.is_symlink() and path.resolve() not in file.resolve().parents:
        raise AdapterError(f"{file} is a link out of the adapter folder; copy the file itself")
    if not file.is_file():
        raise AdapterError(f"folder {path} has no {name}; it is no adapter, or a damaged one")
    try:
        return file.read_bytes()
    except OSError as error:
        raise AdapterError(f"the adapter in {path} cannot be read: {error}") from error


def _read_snapshot(path: Path, raw: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        description = json.loads(raw.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of 5000 digits
        raise AdapterError(f"{path / DESCRIPTION} is truncated or no JSON: {error}") from None
    _check_description(path / DESCRIPTION, description)
    blob = b""
    for name in [n for n in (TENSORS, TENSORS + NEXT) if (path / n).is_file()] or [TENSORS]:
        blob = _read(path, name)
        if hashlib.sha256(blob).hexdigest() == description["tensors_sha256"]:
            break
    else:
        raise AdapterError(f"{path / TENSORS} is truncated or altered: its sha256 is not the one in {DESCRIPTION}")
    try:
        return load_tensors(blob), description
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path / TENSORS} is no safetensors file: {error}") from None


def checked_log(path: Path, snapshot: str, *, recover: bool = False) -> Reading:
    """The log of a folder whose snapshot has this seal; what is cut off at its end is told."""
    file = path / LOG
    if file.is_symlink():
        raise AdapterError(f"{file} is a link; copy the file itself")
    try:
        reading = read_log(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    mend = f"put back a copy of the file, or keep what is whole: baft recover --adapter {path} --out NEW"
    for text in reading.damage:
        if not recover:
            count = f"{len(reading.records)} other records are whole" if reading.records else "no other record is whole"
            raise StoreError(f"{file}: {text}; {count}, and nothing was loaded; {mend}")
        logger.warning("%s: %s; what it said is lost", file, text)
    if (
        reading.records
        and not reading.damage
        and not any(r.change.get("snapshot") == snapshot for r in reading.records)
    ):
        raise StoreError(
            f"{file} belongs to another snapshot than the {DESCRIPTION} beside it; put back the files that belong together"
        )
    if reading.tail:
        logger.warning("%s: %s: it was not committed, and is dropped", file, reading.tail)
    return reading


def _changes_since(reading: Reading, snapshot: str) -> list[Record]:
    """What the log says since the snapshot of this seal; a log in recovery may have lost the record that names it."""
    named = [i for i, record in enumerate(reading.records) if record.change.get("snapshot") == snapshot]
    return [r for r in reading.records[named[-1] + 1 if named else 0 :] if "snapshot" not in r.change]


def _applied(
    file: Path, state: Mapping[str, Tensor], description: Mapping[str, Any], changes: Iterable[Record], *, recover: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Snapshot and changes as one state."""
    rows: dict[str, tuple[Mapping[str, Any], dict[str, Tensor]]] = {}  # id -> summary, and its row of each tensor

    def add(summaries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        for i, summary in enumerate(summaries):
            if summary["id"] in rows and not recover:
                raise ValueError(f"there is an edit {summary['id']!r} already")
            rows[summary["id"]] = summary, {name: tensor[i] for name, tensor in tensors.items()}

    where = f"{file.parent / DESCRIPTION}"
    try:
        add(description["edits"], {name: tensor for name, tensor in state.items() if ".edits." in name})
        for record in changes:
            where = f"{file}: record {record.number} at byte {record.offset}"
            for name in record.change["remove"]:
                if rows.pop(name, None) is None and not recover:
                    raise ValueError(f"there is no edit {name!r} to be removed")
            add(record.change["add"], record.tensors)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise StoreError(f"{where} does not fit: {error!r}") from None
    merged = {name: tensor for name, tensor in state.items() if ".edits." not in name}
    names = {name for _, own in rows.values() for name in own}
    try:
        merged |= {name: torch.stack([own[name] for _, own in rows.values()]) for name in sorted(names)}
    except (KeyError, RuntimeError) as error:
        raise StoreError(f"{file}: its records' tensors do not fit together: {error}") from None
    return merged, {**description, "edits": [summary for summary, _ in rows.values()]}


def _check_description(file: Path, description: Any) -> None:
    if not isinstance(description, dict):
        raise AdapterError(f"{file} must hold an object, not {type(description).__name__}")
    schema = description.get("schema")
    if schema != SCHEMA:
        raise AdapterError(f"{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    for name, kind in _REQUIRED.items():
        if not isinstance(description.get(name), kind):
            raise AdapterError(f"{file}: field {name!r} is {description.get(name)!r}; it is missing or of another type")
    if description.get("seal") != _seal(description):
        raise AdapterError(f"{file} was altered after it was written: its seal does not fit its content")
    # a seal is no signature: somebody who knows the format can seal anything
    _check_fields(f"{file}: base_model", description["base_model"], _BASE_MODEL)
    for i, edit in enumerate(description["edits"]):
        check_summary(edit, f"{file}: edits[{i}]")


def check_summary(summary: Any, where: str) -> None:
    """The types of what is said about an edit.

    Raises:
        AdapterError: no object, a field that is missing or of another type, a request that is none.
    """
    _check_fields(where, summary, _SUMMARY)
    for request in summary["requests"]:
        try:
            EditRequest.from_dict(request)
        except RequestError as error:
            raise AdapterError(f"{where}: {error}") from None


def _check_fields(where: str, value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(value, dict):
        raise AdapterError(f"{where} must be an object, not {type(value).__name__}")
    for name, kind in fields.items():
        found = value.get(name)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise AdapterError(f"{where}: field {name!r} is {found!r}; it is missing or of another type")
