"""Bytes to rows: JSON, JSON Lines and CSV files, whatever the benchmark.

A file becomes a :class:`Table`: its rows in order, each a raw value and its place for messages, and the SHA-256 of the
bytes, which result files record.

Traps handled here:
    * a byte order mark; UTF-16 saved by a spreadsheet; bytes that are not UTF-8;
    * JSON *Lines* in a file that ends in ``.json`` (ConvSent): the content decides, not the name;
    * a truncated file: the message gives line and column;
    * raw U+2028 inside a JSON string, where ``str.splitlines`` would cut a JSON line in two;
    * an unquoted comma in a CSV cell: the row has too many cells and is reported, not shifted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".json", *JSON_LINES_SUFFIXES, *CSV_SUFFIXES)


@dataclass(frozen=True)
class RawRecord:
    """One raw record: its value, and its place (``record 3`` counts from 0, ``line 4`` from 1).

    If the row could not be parsed (a broken JSON line), ``error`` says why and ``value`` is ``None``.
    """

    value: Any
    place: str
    error: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Args:
        name: the source in messages: the path as given, a hub id, ``<list>``.
        origin: the short form that requests keep: a file's name without its folder, so that results do not depend on
            where the file is.
        rows: the records in the file's order; empty for a top-level object, which a format unwraps.
        document: the parsed value if the top level is an object, else ``None``.
        sha256: of the file's bytes; without a file, of the canonical JSON of the rows.
        path: the path as given; empty without a file.
    """

    name: str
    origin: str
    rows: tuple[RawRecord, ...]
    document: Any = None
    sha256: str = ""
    path: str = ""


def sha256_of_rows(rows: Iterable[Any]) -> str:
    """SHA-256 of in-memory records as canonical JSON Lines; ``str`` writes what JSON cannot."""
    digest = hashlib.sha256()
    for row in rows:
        try:
            line = json.dumps(row, sort_keys=True, default=str)
        except (TypeError, ValueError, RecursionError):  # keys of several types; a record that contains itself
            line = f"<{type(row).__name__}>"
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def read_file(path: str | Path) -> Table:
    """Read a JSON, JSON Lines or CSV file.

    Raises:
        DataError: the file does not exist, is empty, not UTF-8, not JSON (with line and column), or has a broken CSV header.
    """
    name = str(path)
    path = Path(path)
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; give one file ({', '.join(SUFFIXES)})") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path (relative paths start at {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{name}: cannot be read ({error})") from None
    digest = hashlib.sha256(raw).hexdigest()
    text = decode(raw, name)
    if not text.strip():
        raise DataError(f"{name} is empty; it must hold records as JSON, JSON Lines or CSV")
    suffix = path.suffix.lower()
    document = None
    if suffix in CSV_SUFFIXES:
        rows = _csv_rows(text, name, "\t" if suffix == ".tsv" else None)
    elif suffix in JSON_LINES_SUFFIXES:
        rows = _line_rows(text)
    else:
        rows, document = _json_rows(text, name)
    return Table(name=name, origin=path.name, rows=rows, document=document, sha256=digest, path=name)


def decode(raw: bytes, name: str) -> str:
    """Decode UTF-8 and remove a byte order mark."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{name}, line {line}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _loads(text: str) -> Any:
    """``json.loads`` with its other failures (deep nesting, a number of 5,000 digits) as ``JSONDecodeError``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), text, 0) from None


def _json_rows(text: str, name: str) -> tuple[tuple[RawRecord, ...], Any]:
    try:
        document = _loads(text)
    except json.JSONDecodeError as error:
        if _looks_like_lines(text):
            return _line_rows(text), None
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        advice = "the file seems truncated: it ends inside a value; download it again" if cut else "correct it there"
        place = f"{name}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}); {advice}") from None
    if isinstance(document, list):
        return tuple(RawRecord(value, f"record {i}") for i, value in enumerate(document)), None
    if isinstance(document, dict):
        return (), document
    raise DataError(
        f"{name}: the top level is {kind_of(document)}; expected a list of records, one object, or JSON Lines (one object a line)"
    )


def _looks_like_lines(text: str) -> bool:
    lines = [line for line in text.split("\n", 64) if line.strip()]
    if len(lines) < 2:
        return False
    try:
        return isinstance(_loads(lines[0]), dict)
    except json.JSONDecodeError:
        return False


def _line_rows(text: str) -> tuple[RawRecord, ...]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(RawRecord(_loads(line), f"line {number}"))
        except json.JSONDecodeError as error:
            problem = f"column {error.colno}: not valid JSON ({error.msg}); each line must be one complete object"
            rows.append(RawRecord(None, f"line {number}", problem))
    return tuple(rows)


def _csv_rows(text: str, name: str, delimiter: str | None) -> tuple[RawRecord, ...]:
    if delimiter is None:  # spreadsheets write semicolons where the decimal separator is a comma
        head = text.lstrip("\r\n").split("\n", 1)[0]
        delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[RawRecord] = []
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = cells
                if "" in header:
                    raise DataError(
                        f"{name}, line {number}: column {header.index('') + 1} has no name; name every column"
                    )
                if twice := [cell for i, cell in enumerate(header) if cell in header[:i]]:
                    raise DataError(
                        f"{name}, line {number}: column {twice[0]!r} occurs twice; rename one, e.g. {twice[0]}_2"
                    )
            elif len(cells) > len(header):
                problem = f"{len(cells)} cells, but {len(header)} columns; quote each text that contains {delimiter!r}"
                rows.append(RawRecord(None, f"line {number}", problem))
            else:
                values = [cell or None for cell in cells] + [None] * (len(header) - len(cells))
                rows.append(RawRecord(dict(zip(header, values, strict=True)), f"line {number}"))
    except csv.Error as error:
        raise DataError(
            f"{name}, line {start}: not valid CSV ({error}); close every quote, or save the file as JSON"
        ) from None
    return tuple(rows)


def rows_of_values(values: Iterable[Any]) -> tuple[RawRecord, ...]:
    return tuple(RawRecord(value, f"record {i}") for i, value in enumerate(values))


def kind_of(value: object) -> str:
    """A JSON value's type for messages, e.g. "an object"."""
    names = {type(None): "null", bool: "a boolean", str: "a text", list: "a list", tuple: "a list"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")
