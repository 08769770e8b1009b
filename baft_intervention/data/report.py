"""Validation of data files: read every record, and report all malformed ones instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import SUFFIXES
from .load import parse_table, probe_counts, read_table
from .splits import Split, split_of


@dataclass(frozen=True)
class FileReport:
    """The content of one file.

    Args:
        path: as given, or found under a given folder.
        task, format, split, sha256: see :class:`LoadedData`.
        records: number of usable records.
        requests: number of edit requests; MQuAKE has several in a record.
        bad: one message for each malformed record.
        probes: number of probes by ``kind/group``.
        notes: counts of oddities that are not errors.
        error: why the file could not be read at all; all counts are then 0.
    """

    path: str
    task: str = ""
    format: str = ""
    split: Split | None = None
    sha256: str = ""
    records: int = 0
    requests: int = 0
    bad: tuple[str, ...] = ()
    probes: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.bad and not self.error

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bad": list(self.bad), "ok": self.ok}


@dataclass(frozen=True)
class ValidationReport:
    """One :class:`FileReport` for each file, in the given order."""

    files: tuple[FileReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every file could be read and no record is malformed."""
        return all(file.ok for file in self.files)

    @property
    def records(self) -> int:
        return sum(file.records for file in self.files)

    @property
    def bad_count(self) -> int:
        return sum(len(file.bad) for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        files = [file.to_dict() for file in self.files]
        return {"ok": self.ok, "records": self.records, "bad": self.bad_count, "files": files}

    def to_text(self, *, messages: int = 5) -> str:
        """The report for a terminal, with at most ``messages`` malformed records of each file."""
        lines = []
        for file in self.files:
            if file.error:
                lines.append(f"{file.path}\n  ERROR {file.error}")
                continue
            split = f", {file.split}" if file.split else ""
            requests = f", {file.requests} requests" if file.requests != file.records else ""
            lines.append(
                f"{file.path}\n  {file.task} ({file.format}{split}): {file.records} records{requests}, {len(file.bad)} bad"
            )
            lines += [f"    {count:6d} {name}" for name, count in file.probes.items()]
            lines += [f"    {count:6d} note: {name}" for name, count in file.notes.items()]
            lines += [f"  BAD {message}" for message in file.bad[:messages]]
            if len(file.bad) > messages:
                lines.append(f"  … and {len(file.bad) - messages} more")
        return "\n".join(lines)


def validate(*paths: str | Path | Iterable[str | Path], task: str | None = None) -> ValidationReport:
    """Read every record of the given files and report what is malformed; a folder means all data files below it."""
    flat = [p for item in paths for p in ([item] if isinstance(item, (str, Path)) else item)]
    return ValidationReport(tuple(_validate_file(path, task) for item in flat for path in _expand(item)))


def _expand(path: str | Path) -> list[str | Path]:
    if not Path(path).is_dir():
        return [path]
    return sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()) or [path]


def _validate_file(path: str | Path, task: str | None) -> FileReport:
    try:
        table = read_table(Path(path))
        parsed = parse_table(table, task, {}, seed=None, skip_bad=True)
    except DataError as error:
        return FileReport(path=str(path), error=str(error))
    requests = [request for record in parsed.records for request in record]
    return FileReport(
        path=str(path),
        task=parsed.task,
        format=parsed.format.name,
        split=split_of(path),
        sha256=table.sha256,
        records=len(parsed.records),
        requests=len(requests),
        bad=parsed.bad,
        probes=probe_counts(requests),
        notes=dict(sorted(parsed.notes.items())),
    )
