"""The log of an adapter folder: what was committed since the snapshot, one record after another.

``adapter.log`` is only ever written at its end. A record is a header and a payload:

=========  ======  =======================================================================================
bytes      type    what
=========  ======  =======================================================================================
4          bytes   ``BaFT``, by which the next record is found again behind a damaged one
8          uint64  number of the record, from 0
8          uint64  length of the payload in bytes
32         bytes   sha256 of the payload
4          uint32  crc32 of the 52 bytes above
...        bytes   the payload: safetensors, with JSON under ``change`` in its metadata
=========  ======  =======================================================================================

(integers are little-endian). A change is one of

- ``{"snapshot": seal}``: what the log says up to here is contained in the snapshot of this seal. Record 0 is of this kind;
- ``{"remove": [id, ...], "add": [summary, ...]}``: edits taken out, then edits put in; these have their tensors in the payload,
  stacked as in a snapshot. One record holds or does not: an edit and what it supersedes change together.

A record that is cut off at the end of the file was never committed, and is left out with a warning. Anything else that does not
fit its checksums is damage: it is never loaded, and never skipped unless somebody asks for what is whole.
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
class Record:
    """A whole record.

    Args:
        number: from 0.
        offset: where it begins in the file, in bytes.
        change: what it says, see the module.
        tensors: of the edits that it adds, ``name -> (E, ...)``.
    """

    number: int
    offset: int
    change: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What is in a log.

    Args:
        records: the whole ones, in order.
        end: where the last whole record ends, in bytes.
        tail: what was cut off at the end, for people; empty where nothing was.
        damage: what does not fit its checksums, for people, each with its offset.
    """

    records: tuple[Record, ...]
    end: int
    tail: str
    damage: tuple[str, ...]


def encode(number: int, change: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """One record."""
    payload = save_tensors(dict(tensors), metadata={"change": json.dumps(change, sort_keys=True)})
    header = _HEADER.pack(_MARK, number, len(payload), hashlib.sha256(payload).digest())
    return header + _CRC.pack(zlib.crc32(header)) + payload


def read_log(path: Path) -> Reading:
    """Read a log and check every record; a missing file is an empty log.

    Raises:
        OSError: the file cannot be read.
    """
    records: list[Record] = []
    damage: list[str] = []
    tail, end = "", 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return Reading((), 0, "", ())
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
                until = "the end of the file" if following is None else f"byte {following}"
                damage.append(f"record {expected}, from byte {offset} to {until}, is damaged ({reason})")
                if following is None:
                    break
                offset, expected = following, -1  # more than one record may be gone
                continue
            if found is None:
                break
            record, offset = found
            if record.number != expected >= 0:
                damage.append(f"record {expected} is not there: record {record.number} stands at byte {record.offset}")
            records.append(record)
            expected, end = record.number + 1, offset
    return Reading(tuple(records), end, tail, tuple(damage))


class _Cut(Exception):
    """The file ends before the record does."""


class _Damage(Exception):
    """A record does not fit its checksums."""


def _read_record(file: BinaryIO, offset: int) -> tuple[Record, int] | None:
    """The record at ``offset`` and where the next one begins; None at the end of the file."""
    left = file.seek(0, 2) - offset
    file.seek(offset)
    head = file.read(HEADER_BYTES)
    if not head:
        return None
    if len(head) < HEADER_BYTES:
        raise _Cut(f"{left} bytes of its header are there")
    mark, number, length, digest = _HEADER.unpack_from(head)
    if mark != _MARK or not _fits(head):
        if not any(head) and not any(file.read()):  # a power cut can leave zeros where a file had grown
            raise _Cut("nothing but zeros is there")
        raise _Damage("its header does not fit its checksum")
    if left < HEADER_BYTES + length:
        raise _Cut(f"{left} of {HEADER_BYTES + length} bytes are there")
    payload = file.read(length)
    if hashlib.sha256(payload).digest() != digest:
        raise _Damage("its content does not fit its checksum")
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        change = json.loads(header["__metadata__"]["change"])
        if not isinstance(change, dict):
            raise ValueError("no object")
        return Record(number, offset, change, load_tensors(payload)), offset + HEADER_BYTES + length
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damage(f"its content is no change of an adapter: {error!r}") from None


def _fits(head: bytes) -> bool:
    return _CRC.unpack_from(head, _HEADER.size)[0] == zlib.crc32(head[: _HEADER.size])


def _next_record(file: BinaryIO, offset: int) -> int | None:
    """Where the next header that fits its checksum begins, at or behind ``offset``."""
    file.seek(offset)
    rest = file.read()
    at = rest.find(_MARK)
    while at >= 0:
        head = rest[at : at + HEADER_BYTES]
        if len(head) == HEADER_BYTES and _fits(head):
            return offset + at
        at = rest.find(_MARK, at + 1)
    return None
