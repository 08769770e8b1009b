"""The log of an adapter folder: the changes committed since the snapshot, one record each.

``adapter.log`` is append-only. A record is a header and a payload:

=========  ======  =======================================================================================
bytes      type    content
=========  ======  =======================================================================================
4          bytes   ``BaFT``; a reader searches for it to find the next record after a damaged one
8          uint64  number of the record, counted from 0
8          uint64  length of the payload in bytes
32         bytes   sha256 of the payload
4          uint32  crc32 of the 52 bytes above
...        bytes   the payload: safetensors, with JSON under ``change`` in its metadata
=========  ======  =======================================================================================

Integers are little-endian. A change has one of two forms:

- ``{"snapshot": seal}``: the snapshot with this seal contains every change before this record. Record 0 has this form.
- ``{"remove": [id, ...], "add": [summary, ...]}``: remove edits, then add edits. The payload holds the tensors of the added
  edits, stacked as in a snapshot. A record applies as a whole, so an edit and the one that it replaces change together.

A record cut off at the end of the file was never committed; readers drop it with a warning. Any other record that does not
match its checksums is damaged. Readers refuse a damaged log, and skip damaged records only in recovery.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_MARK = b"BaFT"
_HEADER = struct.Struct("<4sQQ32s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


@dataclass(frozen=True)
class LogRecord:
    """One intact record of a log.

    Args:
        number: position in the log, counted from 0.
        offset: first byte of the record in the file.
        change: the change that it commits; the module describes both forms.
        tensors: tensors of the edits that it adds, ``name -> (E, ...)``.
    """

    number: int
    offset: int
    change: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LogContents:
    """Everything that a log holds: intact records, a cut-off end and damage.

    Args:
        records: the intact records, in order.
        end: number of bytes up to the end of the last intact record.
        tail: message about a record that is cut off at the end; empty if there is none.
        damage: one message for each damaged or missing stretch, with its offset.
    """

    records: tuple[LogRecord, ...]
    end: int
    tail: str
    damage: tuple[str, ...]


def encode(number: int, change: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of one record."""
    payload = save_tensors(dict(tensors), metadata={"change": json.dumps(change, sort_keys=True)})
    header = _HEADER.pack(_MARK, number, len(payload), hashlib.sha256(payload).digest())
    return header + _CRC.pack(zlib.crc32(header)) + payload


def read_log(path: Path) -> LogContents:
    """Read a log and check every record. A missing file counts as an empty log.

    Raises:
        OSError: the file cannot be read.
    """
    records: list[LogRecord] = []
    damage: list[str] = []
    tail, end = "", 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return LogContents((), 0, "", ())
    with file:
        offset = expected = 0
        while True:
            try:
                found = _read_record(file, offset)
            except _Cut as cut:
                tail = f"the last record, at byte {offset}, is cut off ({cut})"
                break
            except _Damage as reason:
                following = _next_record(file, offset + 1)
                until = "the end of the file" if following is None else f"byte {following[0]}"
                damage.append(f"record {expected}, from byte {offset} to {until}, is damaged ({reason})")
                if following is None:
                    break
                offset, expected = following  # several records may be lost between
                continue
            if found is None:
                break
            record, offset = found
            if record.number != expected:
                damage.append(f"record {expected} is missing: byte {record.offset} holds record {record.number}")
            records.append(record)
            expected, end = record.number + 1, offset
    return LogContents(tuple(records), end, tail, tuple(damage))


class _Cut(Exception):
    """The file ends inside a record."""


class _Damage(Exception):
    """A record does not match its checksums or its format."""


def _read_record(file: BinaryIO, offset: int) -> tuple[LogRecord, int] | None:
    """The record at ``offset`` and the offset of the next one; None at the end of the file."""
    left = file.seek(0, 2) - offset
    file.seek(offset)
    head = file.read(HEADER_BYTES)
    if not head:
        return None
    if len(head) < HEADER_BYTES:
        raise _Cut(f"only {left} bytes of its header were written")
    mark, number, length, digest = _HEADER.unpack_from(head)
    if mark != _MARK or not _crc_matches(head):
        if not any(head) and not any(file.read()):  # a power cut can leave zeros at the end of a growing file
            raise _Cut("only zeros were written")
        raise _Damage("its header does not match its checksum")
    if left < HEADER_BYTES + length:
        raise _Cut(f"{left} of {HEADER_BYTES + length} bytes were written")
    payload = file.read(length)
    if hashlib.sha256(payload).digest() != digest:
        raise _Damage("its payload does not match its checksum")
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        change = json.loads(header["__metadata__"]["change"])
        if not isinstance(change, dict):
            raise ValueError("not a JSON object")
        return LogRecord(number, offset, change, load_tensors(payload)), offset + HEADER_BYTES + length
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damage(f"its payload is not a change of an adapter: {error!r}") from None


def _crc_matches(head: bytes) -> bool:
    return _CRC.unpack_from(head, _HEADER.size)[0] == zlib.crc32(head[: _HEADER.size])


def _next_record(file: BinaryIO, offset: int) -> tuple[int, int] | None:
    """Offset and record number of the first header at or after ``offset`` that matches its checksum."""
    file.seek(offset)
    rest = file.read()
    at = rest.find(_MARK)
    while at >= 0:
        head = rest[at : at + HEADER_BYTES]
        if len(head) == HEADER_BYTES and _crc_matches(head):
            return offset + at, _HEADER.unpack_from(head)[1]
        at = rest.find(_MARK, at + 1)
    return None
