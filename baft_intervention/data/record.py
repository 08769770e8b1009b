"""One raw record, read field by field; every problem is a :class:`DataError` that names the record and the field.

The reader of a format asks a :class:`Record` for what it needs::

    record.text("prompt")                 # a non-empty text, stripped; else DataError
    record.answers("ground_truth")        # all aliases, flat, in order; () where there are none
    record.child("portability").text("New Answer")
    record.request(prompt=..., target_new=..., probes=[*record.probe(...), ...])

Rules that hold for every format:
    * Texts are stripped at both ends. A trailing space would become the last token of the prompt, which is where edits
      act. One space joins prompt and answer later.
    * An answer may be a number (a year); it becomes text. ``null`` means "not given". A boolean is an error.
    * Answers may be a text, a list of texts, or a list of alias lists (Wikidata: several right values, each with
      its aliases). They become one flat tuple in the file's order, without empty and repeated ones. Teacher forcing scores
      the first; metrics that match text accept any.
    * A rephrase or portability question without an answer cannot be scored: it is dropped and counted in
      ``notes``. A locality question without one stays, since it is compared with the unedited model.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from ..errors import DataError, RequestError
from ..requests import EditRequest, Probe, ProbeKind
from .files import RawRecord, Table, kind_of

DROPPED_PROBE = "probe without an answer dropped"
SUBJECT_ABSENT = "subject not in prompt"
_SHOWN = 80  # characters of an offending value that a message shows
_REPR = reprlib.Repr()  # a plain repr of a deeply nested value would exhaust the stack
_REPR.maxstring = _REPR.maxother = _SHOWN


@dataclass(frozen=True)
class Record:
    """A raw record.

    Args:
        data: the record's fields.
        place: file and record, the prefix of messages: ``data/edits.json, record 3``.
        origin: the same without the folder; requests keep it.
        position: the record's index in the source, counted from 0.
        siblings: the raw values of all records of the source, for formats whose records refer to others.
        document: the top-level object if the source is one (Sanitation), else ``None``.
        path: the fields that lead to a nested record, for messages: ``requested_rewrite.target_new.``
        notes: counts of oddities that are not errors, shared by all records of a source.
    """

    data: Mapping[str, Any]
    place: str
    origin: str = ""
    position: int = 0
    siblings: Sequence[Any] = ()
    document: Any = None
    path: str = ""
    notes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_row(
        cls, table: Table, row: RawRecord, position: int, siblings: Sequence[Any], notes: Counter[str]
    ) -> Record:
        """The record of one row.

        Raises:
            DataError: the row could not be parsed, or is not an object.
        """
        place = f"{table.name}, {row.place}"
        if row.error:
            raise DataError(f"{place}: {row.error}")
        if not isinstance(row.value, Mapping):
            raise DataError(
                f"{place}: a record must be an object with named fields, got {kind_of(row.value)}: {shown(row.value)}"
            )
        origin = f"{table.origin}, {row.place}"
        return cls(row.value, place, origin, position, siblings, table.document, notes=notes)

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.place}: field {self.path + name!r} {problem}")

    def wrapped(self, error: Exception) -> DataError:
        """An error as a :class:`DataError` whose message starts with this record's place."""
        text = str(error)
        return DataError(text if text.startswith(self.place) else f"{self.place}: {text}")

    def has(self, name: str) -> bool:
        """Whether the field exists and is not null (a ``datasets.Dataset`` fills absent fields with null)."""
        return self.data.get(name) is not None

    def first_of(self, *names: str) -> str:
        """The first of several field names that the record has; the first name if it has none."""
        return next((name for name in names if self.has(name)), names[0])

    # texts

    def text(self, name: str, *, strip: bool = True) -> str:
        """A required, non-empty text; a number counts as text."""
        if name not in self.data:
            raise self.error(name, f"is missing; the record has {', '.join(map(repr, self.data)) or 'no fields'}")
        if self.data[name] is None:
            raise self.error(name, "is null; give a text")
        value = self.as_text(self.data[name], name)
        if not value.strip():
            raise self.error(name, "is empty; give a non-empty text")
        return value.strip() if strip else value

    def optional_text(self, name: str, *, strip: bool = True) -> str | None:
        """A text; None if it is absent, null or blank."""
        if not self.has(name):
            return None
        value = self.as_text(self.data[name], name)
        return (value.strip() if strip else value) if value.strip() else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts, without blank ones; an absent field gives ``()``."""
        value = self.data.get(name)
        if value is None:
            return ()
        if not _is_list(value):
            value = [value]
        found = [self.as_text(item, f"{name}[{i}]").strip() for i, item in enumerate(value)]
        return tuple(item for item in found if item)

    def answers(self, name: str, *, exact: bool = False) -> tuple[str, ...]:
        """All answers under a field, flat, in order, each once; ``exact`` neither strips them nor drops repetitions."""
        found = [item for item in self._flat(self.data.get(name), name, 0) if item.strip()]
        return tuple(found) if exact else tuple(dict.fromkeys(item.strip() for item in found))

    def _flat(self, value: Any, name: str, depth: int) -> Iterator[str]:
        if value is None:
            return
        if not _is_list(value):
            yield self.as_text(value, name)
            return
        if depth == 2:
            raise self.error(
                name, f"is nested too deeply; give a text, a list of texts or a list of alias lists: {shown(value)}"
            )
        for i, item in enumerate(value):
            yield from self._flat(item, f"{name}[{i}]", depth + 1)

    def as_text(self, value: Any, name: str) -> str:
        """A text or a finite number as text that UTF-8 can encode; anything else is an error that names the field."""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.error(name, f"must be a text, got {kind_of(value)}: {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(name, f"is {value}, which is not an answer; write the text that the model must give")
        if not isinstance(value, str):
            try:
                return str(value)
            except ValueError:  # an int of more than 4,300 digits
                raise self.error(name, "is a number with too many digits; write it as text") from None
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise self.error(
                    name, f"holds half of a surrogate pair at character {error.start}, which UTF-8 cannot encode"
                ) from None
        return value

    # nested objects

    def child(self, name: str) -> Record:
        """A required field that is an object."""
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            problem = (
                "is missing; it must be an object"
                if value is None
                else f"must be an object, got {kind_of(value)}: {shown(value)}"
            )
            raise self.error(name, problem)
        return replace(self, data=value, path=f"{self.path}{name}.")

    def children(self, name: str) -> list[Record]:
        """A field that is a list of objects; an absent field gives ``[]``."""
        value = self.data.get(name)
        if value is None:
            return []
        if not _is_list(value):
            raise self.error(name, f"must be a list of objects, got {kind_of(value)}: {shown(value)}")
        found = []
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{name}[{i}]", f"must be an object, got {kind_of(item)}: {shown(item)}")
            found.append(replace(self, data=item, path=f"{self.path}{name}[{i}]."))
        return found

    # requests and probes

    def request(self, *, prompt: Any, target_new: str, subject: str | None = None, **more: Any) -> EditRequest:
        """An :class:`EditRequest`; its errors name this record."""
        if subject is not None and isinstance(prompt, str) and subject not in prompt:
            self.notes[SUBJECT_ABSENT] += 1
        try:
            return EditRequest(prompt=prompt, target_new=target_new, subject=subject, origin=self.origin, **more)
        except RequestError as error:
            raise DataError(f"{self.place}: {str(error).removeprefix(self.origin + ': ')}") from None

    def probe(
        self, prompt: str, kind: ProbeKind, answers: Sequence[str] = (), contrast: Sequence[str] = (), group: str = ""
    ) -> tuple[Probe, ...]:
        """One probe, or none if it could not be scored; ``contrast`` loses what is also an answer."""
        if not answers and kind in ("rephrase", "portability"):
            self.notes[DROPPED_PROBE] += 1
            return ()
        contrast = tuple(text for text in contrast if text not in answers)
        try:
            return (Probe(prompt=prompt, kind=kind, answers=tuple(answers), contrast=contrast, group=group),)
        except RequestError as error:
            raise DataError(f"{self.place}: {error}") from None

    def probes(
        self, name: str, kind: ProbeKind, answers: Sequence[str], contrast: Sequence[str] = (), *, group: str
    ) -> list[Probe]:
        """One :meth:`probe` for each text under a field."""
        return [probe for text in self.texts(name) for probe in self.probe(text, kind, answers, contrast, group)]

    def question_items(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """``(prompt, answers)`` of every question under a field.

        The field holds a list of objects, one object, or an object of two lists (``{"prompt": [...], "ground_truth":
        [...]}``, as in EasyEdit and old versions of ``datasets``). The prompt may be a list of wordings of one question; the
        answers are under ``ground_truth``, ``answers`` or ``answer``.
        """
        value = self.data.get(name)
        if isinstance(value, Mapping):
            items = list(self.child(name)._columns(name))
        else:
            items = self.children(name)
        for item in items:
            key = item.first_of("prompt", "question")
            prompts = item.texts(key)
            if not prompts:
                raise item.error(key, "is missing or empty; give the question")
            answers = item.answers(item.first_of("ground_truth", "answers", "answer"))
            for prompt in prompts:
                yield prompt, answers

    def _columns(self, name: str) -> Iterator[Record]:
        prompts = self.data.get("prompt")
        if not _is_list(prompts):
            yield self
            return
        key = self.first_of("ground_truth", "answers", "answer")
        answers = self.data.get(key)
        if answers is None:
            answers = [None] * len(prompts)
        if not _is_list(answers) or len(answers) != len(prompts):
            raise self.error(key, f"must be a list as long as 'prompt' ({len(prompts)}): {shown(answers)}")
        for prompt, answer in zip(prompts, answers, strict=True):
            yield replace(self, data={"prompt": prompt, key: answer})


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))


def shown(value: object) -> str:
    """A value for a message, shortened."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an int of more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
