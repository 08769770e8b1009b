"""Result files that survive a kill: JSON Lines in an order that is known beforehand.

A killed run may leave half a line, or a part of a group of lines. :class:`RecordFile` removes half a line when it opens the
file; :meth:`RecordFile.truncate` removes the lines of an incomplete group. Nothing that differs between two runs (times,
hosts) may be written here.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError


class RecordFile:
    """A JSON Lines file to which groups of lines are appended.

    Args:
        path: the file; its folder is created.
        expected: identities of all lines of the run, in order.
        identify: gives the identity of a line's record.

    Raises:
        DataError: a line is not the expected one, so the file belongs to another run.
    """

    def __init__(self, path: str | Path, expected: Sequence[Any], identify: Any) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._ends = [0]  # byte offsets of line ends
        data = self.path.read_bytes() if self.path.is_file() else b""
        for number, line in enumerate(data.split(b"\n")[:-1]):  # what follows the last newline is half a line
            try:
                record = json.loads(line)
            except ValueError:
                break  # damaged by a crash of the file system; the run repeats everything from here on
            name = identify(record)
            if number >= len(expected) or name != expected[number]:
                wanted = expected[number] if number < len(expected) else "the end"
                raise DataError(
                    f"{self.path}:{number + 1}: record {name} where {wanted} was expected; give another --out"
                )
            self._ends.append(self._ends[-1] + len(line) + 1)
        self._file = open(self.path, "ab")  # noqa: SIM115
        self.truncate(len(self))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def truncate(self, lines: int) -> None:
        """Keep the first ``lines`` lines."""
        del self._ends[lines + 1 :]
        self._file.truncate(self._ends[-1])
        self._file.seek(0, os.SEEK_END)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write a group and wait until it is on disk."""
        for record in records:
            line = dump_line(record)
            self._file.write(line)
            self._ends.append(self._ends[-1] + len(line))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dump_line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of JSON with sorted keys and eight significant digits."""
    return (json.dumps(_rounded(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "surrogatepass"
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON Lines file, without half a line at the end.

    Raises:
        DataError: a line is not a JSON object.
    """
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: a record must be an object, got {type(record).__name__}")
        yield record


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
