"""The registry of data formats: which records each matches, its reader, and the benchmark tasks it serves.

A *format* is a shape of records (``zsre_mend``: ``src``, ``alt``, …). A *task* is a benchmark (``zsre``), which may
come in several formats. A format is chosen by the task's name or, without one, by the *fields* of the records;
never by the file's name. To add a format::

    @register_format("trivia", matches=("q", "a"))
    def read_trivia(record, *, lower: bool = False):
        \"\"\"Trivia questions.\"\"\"
        target = record.text("a")
        return record.request(prompt=record.text("q"), target_new=target.lower() if lower else target)

    load_requests("trivia.json", lower=True)

The reader's keyword-only parameters are the format's options. Their types and ``Literal`` choices are checked before the
first record is read, and :func:`load_requests` records the values in force.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError
from ..registry import did_you_mean
from ..requests import EditRequest
from .record import Record, shown

Reader = Callable[..., EditRequest | Iterable[EditRequest]]
Matcher = Callable[[Mapping[str, Any]], bool]

# other spellings of a task's name -> the one that a format registers
TASK_ALIASES = {
    "wiki_counterfact": "wikidata_counterfact",
    "wikidata_cf": "wikidata_counterfact",
    "wiki_recent": "wikidata_recent",
    "wiki_bio": "wikibio",
    "sentiment": "convsent",
    "sanitization": "sanitation",
    "known_1000": "known",
    "mend": "zsre_mend",
    "facts": "own",
    "csv": "own",
}


@dataclass(frozen=True)
class Option:
    """An option of a reader: its default, and the values it may take (empty: any of the default's type).

    If the default is a tuple, ``choices`` are the values of its items.
    """

    default: Any
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Format:
    """A registered format.

    Args:
        name: unique; give it as ``task`` to choose the format.
        read: turns one :class:`Record` into one or several requests.
        matches: whether a raw record has this format's fields.
        tasks: the benchmark tasks that come in it.
        task_of: which of them a raw record belongs to.
        rows: gives the list of records in a top-level object, or None if the object is not of this format.
        options: the options of ``read``.
    """

    name: str
    read: Reader
    matches: Matcher
    tasks: tuple[str, ...]
    task_of: Callable[[Mapping[str, Any]], str]
    rows: Callable[[Mapping[str, Any]], Sequence[Any] | None]
    options: Mapping[str, Option]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.read) or self.name).split("\n", 1)[0]


_FORMATS: dict[str, Format] = {}


def register_format(
    name: str,
    *,
    matches: Matcher | Sequence[str],
    tasks: Sequence[str] = (),
    task_of: Callable[[Mapping[str, Any]], str] | None = None,
    rows: Callable[[Mapping[str, Any]], Sequence[Any] | None] | None = None,
    replace: bool = False,
) -> Callable[[Reader], Reader]:
    """Register a reader; use as a decorator, or call the result with a function.

    Args:
        name: the format's name.
        matches: field names that a record must all have, or a function of the raw record. The format registered last is
            tried first, so yours takes precedence over a shipped one.
        tasks: benchmark tasks that come in this format; by default the format's name.
        task_of: which of several tasks a raw record belongs to; by default the first.
        rows: for files whose top level is an object: gives the list of records, or None.
        replace: replace a format of the same name.

    Raises:
        DataError: the name is taken, or an option of the reader is not keyword-only with a default.
    """
    fields = None if callable(matches) else tuple(matches)

    def has_fields(row: Mapping[str, Any]) -> bool:
        return all(field in row for field in fields or ())

    def register(read: Reader) -> Reader:
        if name in _FORMATS and not replace:
            raise DataError(f"format {name!r} is registered already; choose another name or pass replace=True")
        _FORMATS.pop(name, None)  # so that a replacement, too, is tried first
        _FORMATS[name] = Format(
            name=name,
            read=read,
            matches=typing.cast(Matcher, matches) if fields is None else has_fields,
            tasks=tuple(tasks) or (name,),
            task_of=task_of or (lambda row: (tuple(tasks) or (name,))[0]),
            rows=rows or (lambda document: None),
            options=_options_of(read, name),
        )
        return read

    return register


def unregister_format(name: str) -> None:
    """Remove a format; an unknown name is an error."""
    format_named(name)
    del _FORMATS[name]


def formats() -> tuple[Format, ...]:
    """All formats, the latest first, which is the order in which they are tried."""
    return tuple(reversed(_FORMATS.values()))


def tasks() -> tuple[str, ...]:
    """All task names, sorted."""
    return tuple(sorted({task for fmt in _FORMATS.values() for task in fmt.tasks}))


def format_named(name: str) -> Format:
    if name not in _FORMATS:
        raise DataError(f"unknown format {name!r}; known formats: {', '.join(sorted(_FORMATS))}")
    return _FORMATS[name]


def _options_of(read: Reader, name: str) -> dict[str, Option]:
    try:
        hints = typing.get_type_hints(read)
    except (NameError, TypeError):  # annotations that cannot be resolved are not checked
        hints = {}
    options = {}
    for parameter in list(inspect.signature(read).parameters.values())[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise DataError(
                f"format {name!r}: option {parameter.name!r} of the reader must be keyword-only and have a default"
            )
        hint = hints.get(parameter.name)
        if typing.get_origin(hint) is tuple:  # tuple[Literal["a", "b"], ...]
            hint = typing.get_args(hint)[0]
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        options[parameter.name] = Option(parameter.default, choices)
    return options


def resolve_options(fmt: Format, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in force: the defaults and the given ones, checked and, if text, converted.

    Raises:
        DataError: an option is unknown or has a value that it cannot take.
    """
    values = {name: option.default for name, option in fmt.options.items()}
    for name, value in given.items():
        if name not in values:
            known = ", ".join(values) or "none"
            raise DataError(
                f"format {fmt.name!r} has no option {name!r}; its options: {known}{did_you_mean(name, values)}"
            )
        values[name] = _checked(fmt, name, value)
    return values


def _checked(fmt: Format, name: str, value: Any) -> Any:
    option = fmt.options[name]
    default = option.default
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        items = tuple(part.strip() if isinstance(part, str) else part for part in parts)
        for item in items:
            if option.choices and item not in option.choices:
                known = ", ".join(map(str, option.choices))
                raise DataError(f"option {name!r} of format {fmt.name!r} holds {item!r}; it may hold {known}")
        return items
    if option.choices:
        if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in option.choices):
            raise DataError(
                f"option {name!r} of format {fmt.name!r} is {value!r}; it must be one of {', '.join(map(repr, option.choices))}"
            )
        return value
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        value = words.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise DataError(f"option {name!r} of format {fmt.name!r} is {value!r}; it must be true or false")
    elif isinstance(default, int):
        if isinstance(value, str) and value.lstrip("-").isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"option {name!r} of format {fmt.name!r} is {value!r}; it must be a whole number")
    return value


def canonical_task(task: str) -> str:
    """The registered name of a task or format from any of its spellings.

    Raises:
        DataError: the task is unknown; the message lists the known ones and suggests the nearest.
    """
    name = str(task).strip().lower().replace("-", "_")
    name = TASK_ALIASES.get(name, name)
    if name not in tasks() and name not in _FORMATS:
        raise DataError(f"unknown task {task!r}; known tasks: {', '.join(tasks())}{did_you_mean(name, tasks())}")
    return name


def choose_format(task: str | None, rows: Sequence[Any], document: Any, name: str) -> tuple[Format, str]:
    """The format and task of a source's records.

    Without a task it is the format that most of the first records match. With a task it is one of the task's formats;
    records that match another task's format are one error instead of a missing field in each record.

    Raises:
        DataError: the task is unknown, no format matches, or a format of another task does.
    """
    found = _recognise(rows, document)
    if task is None:
        if found is None:
            fields = _fields(rows, document)
            known = "; ".join(f"{fmt.name}: {fmt.summary}" for fmt in reversed(formats()))
            raise DataError(
                f"{name}: the records match no known format (their fields: {fields}). "
                f"Name a task, or register a format. Known: {known}"
            )
        return found[0], found[0].task_of(found[1])
    wanted = canonical_task(task)
    candidates = [fmt for fmt in formats() if wanted in fmt.tasks] or [format_named(wanted)]
    if found is not None and found[0] in candidates:
        return found[0], wanted if wanted in found[0].tasks else found[0].task_of(found[1])
    first = _first_mapping(rows, document)
    for fmt in candidates:  # a record may match several formats
        if first is not None and fmt.matches(first):
            return fmt, wanted if wanted in fmt.tasks else fmt.task_of(first)
    if found is not None and found[0].name != "own":
        raise DataError(
            f"{name}: task {task!r} comes in the format {' or '.join(fmt.name for fmt in candidates)}, but the records "
            f"are {found[0].name} (fields: {_fields(rows, document)}); give task={found[0].task_of(found[1])!r} or leave it out"
        )
    fmt = candidates[0]
    return fmt, wanted if wanted in fmt.tasks else fmt.tasks[0]


def _recognise(rows: Sequence[Any], document: Any) -> tuple[Format, Mapping[str, Any]] | None:
    if isinstance(document, Mapping):
        for fmt in formats():
            if (inner := fmt.rows(document)) is not None:
                return fmt, _first_mapping(inner, None) or {}
        rows = [document]
    votes: dict[str, tuple[int, Format, Mapping[str, Any]]] = {}
    for row in rows[:50]:
        if not isinstance(row, Mapping):
            continue
        for fmt in formats():
            if fmt.matches(row):
                count, _, first = votes.get(fmt.name, (0, fmt, row))
                votes[fmt.name] = (count + 1, fmt, first)
                break
    if not votes:
        return None
    _, fmt, first = max(votes.values(), key=lambda vote: vote[0])
    return fmt, first


def _first_mapping(rows: Sequence[Any], document: Any) -> Mapping[str, Any] | None:
    if isinstance(document, Mapping):
        return document
    return next((row for row in rows[:50] if isinstance(row, Mapping)), None)


def _fields(rows: Sequence[Any], document: Any) -> str:
    first = _first_mapping(rows, document)
    return (
        shown(list(first)) if first is not None else f"none, the first record is {shown(rows[0])}" if rows else "none"
    )


def record_requests(fmt: Format, record: Record, options: Mapping[str, Any]) -> list[EditRequest]:
    """The requests that a format's reader makes from one record.

    Raises:
        DataError: the record is malformed, or the reader returned something other than requests.
    """
    result = fmt.read(record, **options)
    requests = [result] if isinstance(result, EditRequest) else list(result)
    for item in requests:
        if not isinstance(item, EditRequest):
            raise DataError(
                f"{record.place}: the reader of format {fmt.name!r} returned a {type(item).__name__}, not EditRequest"
            )
    return requests
