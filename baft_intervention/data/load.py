"""``load_requests``: read edit requests from any source in any format, and record where they came from."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, RequestError
from ..requests import EditRequest
from .files import RawRecord, Table, read_file, rows_of_values, sha256_of_rows
from .hub import hub_split, is_dataset, is_hub_id, read_dataset, read_hub
from .record import Record
from .registry import Format, choose_format, record_requests, resolve_options
from .splits import Split, split_of
from .unrelated import GROUP, Texts, attach_unrelated, choose_questions, normalised, pool_table

logger = logging.getLogger(__name__)

# questions that all requests of a run share: enough for a mean, and the model answers them in seconds
UNRELATED_POOL = 256


@dataclass(frozen=True)
class LoadedData:
    """Requests, and what a result file must record about them.

    Args:
        requests: in the source's order; their ids are unique.
        task: the benchmark, e.g. ``zsre``.
        format: its format, e.g. ``zsre_mend``.
        path: the path or hub id as given; empty for records passed in memory.
        sha256: of the file's bytes; without a file, of the canonical JSON of the records.
        split: train, validation or test, if the file's name says so.
        options: every option in force: the format's (MEND's ``target``, ConvSent's ``direction``), limit, seed, unrelated pool.
        records: number of usable records in the source, before ``limit``.
        bad: error messages of the skipped records.
        notes: counts of oddities that are not errors (probes without an answer, subjects that are not in the prompt).
    """

    requests: tuple[EditRequest, ...]
    task: str
    format: str
    path: str = ""
    sha256: str = ""
    split: Split | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    records: int = 0
    bad: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def bad_count(self) -> int:
        return len(self.bad)

    @property
    def cases(self) -> tuple[tuple[EditRequest, ...], ...]:
        """Requests that are applied together, see :func:`case_indices`."""
        return tuple(tuple(self.requests[i] for i in case) for case in case_indices(self.requests))

    def probe_counts(self) -> dict[str, int]:
        """Probes by ``kind/group``, sorted."""
        return probe_counts(self.requests)

    def without(self, other: LoadedData | Iterable[str]) -> LoadedData:
        """The data without the cases that share a prompt, a rephrase or a subject with ``other``.

        Use it before choosing settings on a file that has questions in common with the test file, see ``splits.py``.

        Args:
            other: another data set, or a list of prompts.
        """
        if isinstance(other, LoadedData):
            prompts = [prompt for request in other.requests for prompt in _wordings(request)]
            subjects = {normalised(request.subject) for request in other.requests if request.subject}
        else:
            prompts, subjects = list(other), set()
        known = {normalised(prompt) for prompt in prompts}

        def shared(request: EditRequest) -> bool:
            same_subject = bool(request.subject) and normalised(request.subject or "") in subjects
            return same_subject or any(normalised(prompt) in known for prompt in _wordings(request))

        kept = [case for case in self.cases if not any(map(shared, case))]
        requests = tuple(request for case in kept for request in case)
        options = {**self.options, "left_out": self.options.get("left_out", 0) + len(self.cases) - len(kept)}
        return replace(self, requests=requests, options=options)

    def describe(self) -> dict[str, Any]:
        """What a result file records, as plain JSON values: of the requests only their number and the hash of their ids."""
        ids = hashlib.sha256(
            "\n".join(request.id for request in self.requests).encode("utf-8", "surrogatepass")
        ).hexdigest()
        return {
            "task": self.task,
            "format": self.format,
            "path": self.path,
            "sha256": self.sha256,
            "split": self.split,
            "options": {key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()},
            "records": self.records,
            "bad": self.bad_count,
            "bad_messages": list(self.bad),
            "notes": dict(self.notes),
            "requests": len(self.requests),
            "requests_sha256": ids,
            "probes": self.probe_counts(),
        }


def probe_counts(requests: Iterable[EditRequest]) -> dict[str, int]:
    """Number of probes by ``kind/group``, sorted."""
    return dict(sorted(Counter(f"{p.kind}/{p.group}" for r in requests for p in r.probes).items()))


def case_indices(requests: Sequence[EditRequest]) -> list[tuple[int, ...]]:
    """Indices of the requests that are applied together: neighbours with the same non-empty ``case_id``, or single ones."""
    cases: list[list[int]] = []
    for i, request in enumerate(requests):
        if cases and request.case_id and requests[cases[-1][-1]].case_id == request.case_id:
            cases[-1].append(i)
        else:
            cases.append([i])
    return [tuple(case) for case in cases]


def _wordings(request: EditRequest) -> tuple[str, ...]:
    return (request.prompt, *(probe.prompt for probe in request.probes_of("rephrase")))


def load_requests(
    source: Any,
    task: str | None = None,
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
    unrelated: Texts | None = None,
    unrelated_per_record: int = 2,
    unrelated_pool: int = UNRELATED_POOL,
    unrelated_exclude: Iterable[str] = (),
    hub: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadedData:
    """Read edit requests from a file, a data set or a list.

    Args:
        source: a path (JSON, JSON Lines, CSV), a ``datasets.Dataset``, a hub id (``owner/name`` or ``hub:name``), or a
            list of objects or :class:`EditRequest`.
        task: the benchmark (``zsre``, ``counterfact``, …) or a format's name; by default recognised by the records' fields.
        limit: how many records (MQuAKE: cases) to take: the first ones, or with a seed a random subset in the file's
            order. The whole file is checked either way; a smaller subset is part of a larger one.
        seed: draws that subset, what the format draws (ConvSent's direction), and the unrelated pool; None counts as 0
            for the last two.
        skip_bad: skip malformed records, with a warning for each, instead of raising at the first.
        unrelated: a file or list of questions that have nothing to do with the edits, see ``unrelated.py``.
        unrelated_per_record: number of these questions for each request.
        unrelated_pool: number of these questions that the whole run shares, at most all.
        unrelated_exclude: questions to leave out because training has seen them.
        hub: keyword arguments of ``datasets.load_dataset`` for a hub id: ``split``, ``name``, ``revision``, ``data_files``.
        **options: the format's own options, e.g. ``target="answers"`` for ZsRE in MEND's form.

    Raises:
        DataError: the source cannot be read, the task or an option is unknown, a record is malformed (without
            ``skip_bad``), or no record is usable. Messages name file, record or line, and field.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit is {limit!r}; it must be a whole number of at least 1, or None for all records")
    table = read_table(source, hub)
    parsed = parse_table(table, task, options, seed=seed, skip_bad=skip_bad)
    chosen = _choose_records(parsed.records, limit, seed)
    requests = tuple(request for record in chosen for request in record)
    in_force: dict[str, Any] = {**parsed.options, "limit": limit, "seed": seed}
    if hub:
        in_force["hub"] = {
            key: value if isinstance(value, (str, int, bool, type(None))) else str(value) for key, value in hub.items()
        }
    if unrelated is not None:
        questions = pool_table(unrelated)
        exclude = {*unrelated_exclude, *(request.prompt for record in parsed.records for request in record)}
        pool = choose_questions(questions, None, exclude, seed or 0, GROUP)[:unrelated_pool]
        requests = attach_unrelated(requests, pool, unrelated_per_record)
        in_force |= {
            "unrelated": questions.origin,
            "unrelated_sha256": questions.sha256,
            "unrelated_per_record": unrelated_per_record,
            "unrelated_pool": len(pool),
        }
    if parsed.bad:
        logger.warning(
            "%s: %d of %d records are malformed and were skipped",
            table.name,
            len(parsed.bad),
            len(parsed.bad) + len(parsed.records),
        )
    return LoadedData(
        requests=requests,
        task=parsed.task,
        format=parsed.format.name,
        path=table.path or (table.name if not table.name.startswith("<") else ""),
        sha256=table.sha256,
        split=split_of(table.path) if table.path else hub_split(hub),
        options=in_force,
        records=len(parsed.records),
        bad=parsed.bad,
        notes=dict(sorted(parsed.notes.items())),
    )


def load_facts() -> tuple[EditRequest, ...]:
    """A few everyday facts with probes that come with the library, for a first try and for tests."""
    table = replace(read_file(Path(__file__).with_name("facts.json")), name="facts.json", path="")
    parsed = parse_table(table, "own", {}, seed=None, skip_bad=False)
    return tuple(request for record in parsed.records for request in record)


@dataclass(frozen=True)
class ParsedTable:
    """All records of a source, each as its requests, before ``limit``."""

    records: tuple[tuple[EditRequest, ...], ...]
    task: str
    format: Format
    options: Mapping[str, Any]
    bad: tuple[str, ...]
    notes: Mapping[str, int]


def read_table(source: Any, hub: Mapping[str, Any] | None = None) -> Table:
    """Any source as rows; see :func:`load_requests` for what a source may be."""
    if isinstance(source, Table):
        return source
    if isinstance(source, str) and is_hub_id(source):
        return read_hub(source, hub)
    if hub:
        raise DataError(f"hub options {sorted(hub)} were given, but the source is not a hub id: {str(source)[:80]!r}")
    if isinstance(source, (str, Path)):
        return read_file(source)
    if is_dataset(source):
        return read_dataset(source)
    if isinstance(source, Mapping):
        return Table("<object>", "<object>", (), document=source, sha256=sha256_of_rows([source]))
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DataError(
            f"a source must be a path, a datasets.Dataset, a hub id or a list of records, got {type(source).__name__}"
        )
    values = [item.to_dict() if isinstance(item, EditRequest) else item for item in source]
    return Table("<list>", "<list>", rows_of_values(values), sha256=sha256_of_rows(values))


def parse_table(
    table: Table, task: str | None, options: Mapping[str, Any], *, seed: int | None, skip_bad: bool
) -> ParsedTable:
    """Read every record of a table with its format, and make the ids unique over the whole table."""
    if not table.rows and table.document is None:
        raise DataError(f"{table.name} holds no records")
    raw = [row.value for row in table.rows]
    fmt, name = choose_format(task, raw, table.document, table.name)
    rows = table.rows
    if table.document is not None:
        inner = fmt.rows(table.document)
        rows = rows_of_values(inner) if inner is not None else (RawRecord(table.document, "record 0"),)
        raw = [row.value for row in rows]
        if not rows:
            raise DataError(f"{table.name} holds no records")
    values = resolve_options(fmt, options)
    if "seed" in values and "seed" not in options:
        values["seed"] = seed or 0
    notes: Counter[str] = Counter()
    found: list[list[EditRequest]] = []
    bad: list[str] = []
    for position, row in enumerate(rows):
        try:
            found.append(_read_row(fmt, table, row, position, raw, values, notes))
        except DataError as error:
            if not skip_bad:
                raise
            logger.warning("skipped: %s", error)
            bad.append(str(error))
    if not found:
        raise DataError(f"{table.name}: none of its {len(bad)} records can be used; the first error: {bad[0]}")
    return ParsedTable(_unique_ids(found, notes), name, fmt, values, tuple(bad), notes)


def _read_row(
    fmt: Format,
    table: Table,
    row: RawRecord,
    position: int,
    raw: Sequence[Any],
    options: Mapping[str, Any],
    notes: Counter[str],
) -> list[EditRequest]:
    own_notes: Counter[str] = Counter()  # those of a bad record do not count
    record = Record.of_row(table, row, position, raw, own_notes)
    try:
        requests = record_requests(fmt, record, options)
    except DataError:
        raise
    except RequestError as error:
        raise record.wrapped(error) from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # in a user's reader
        raise DataError(
            f"{record.place}: the reader of format {fmt.name!r} failed: {type(error).__name__}: {error}"
        ) from error
    notes.update(own_notes)
    return requests


def _unique_ids(records: Sequence[Sequence[EditRequest]], notes: Counter[str]) -> tuple[tuple[EditRequest, ...], ...]:
    """Append ``-2``, ``-3``, … to ids that occur again, in the source's order: some benchmarks hold an edit twice."""
    seen: set[str] = set()
    last: Counter[str] = Counter()
    found = []
    for record in records:
        renamed = []
        for request in record:
            name = request.id
            if name in seen:
                notes["repeated edit, id numbered"] += 1
                number = last[name] or 1
                while f"{name}-{(number := number + 1)}" in seen:
                    pass
                last[name] = number
                request = replace(request, id=f"{name}-{number}")
            seen.add(request.id)
            renamed.append(request)
        found.append(tuple(renamed))
    return tuple(found)


def _choose_records(
    records: Sequence[tuple[EditRequest, ...]], limit: int | None, seed: int | None
) -> Sequence[tuple[EditRequest, ...]]:
    if limit is None or limit >= len(records):
        return records
    if seed is None:
        return records[:limit]

    def rank(i: int) -> bytes:
        key = records[i][0].id if records[i] else str(i)
        return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()

    return [records[i] for i in sorted(sorted(range(len(records)), key=rank)[:limit])]
