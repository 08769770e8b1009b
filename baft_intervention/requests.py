"""Edit requests, and the probes that evaluate them.

An :class:`EditRequest` gives a prompt and the answer that the edited model must give. A :class:`Probe` is a question for the
edited model: does the edit hold under a paraphrase, do consequences follow, did anything else change?
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import RequestError

ProbeKind = Literal["rephrase", "portability", "locality", "unrelated"]
PROBE_KINDS: tuple[str, ...] = get_args(ProbeKind)


def _text(value: object, name: str, source: str, *, empty_ok: bool = False) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{source}{name} must be a string, got {type(value).__name__}: {value!r}")
    if not empty_ok and not value.strip():
        raise RequestError(f"{source}{name} is empty; give a non-empty text")
    return value


def _texts(value: object, name: str, source: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise RequestError(f"{source}{name} must be a list of strings, got {value!r}")
    return tuple(_text(item, f"{name}[{i}]", source) for i, item in enumerate(value))


def _reject_unknown(data: Mapping[str, Any], cls: type, source: str) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(map(str, data)) - known):
        raise RequestError(f"{source}unknown field {unknown[0]!r}; known fields: {', '.join(sorted(known))}")


@dataclass(frozen=True)
class Probe:
    """One question about an edit.

    Args:
        prompt: the question, as text.
        kind: ``rephrase`` (the edit must hold), ``portability`` (a consequence must follow), ``locality``
            (near the edit, must not change) or ``unrelated`` (far from it, must not change).
        answers: accepted answers with every alias; teacher forcing scores the first. For ``locality`` and ``unrelated``
            its length is the number of tokens to compare with the unedited model; it may be empty.
        contrast: answers that must be less likely than ``answers`` (ROME's probability success, ConvSent's
            opposite replies); empty if the metric does not apply.
        group: the data set's name for the sub-group, e.g. ``Relation_Specificity``, ``neighborhood``.
    """

    prompt: str
    kind: ProbeKind
    answers: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        _text(self.prompt, "probe.prompt", "")
        if self.kind not in PROBE_KINDS:
            raise RequestError(f"probe.kind is {self.kind!r}; it must be one of {', '.join(PROBE_KINDS)}")
        object.__setattr__(self, "answers", _texts(self.answers, "probe.answers", ""))
        object.__setattr__(self, "contrast", _texts(self.contrast, "probe.contrast", ""))
        _text(self.group, "probe.group", "", empty_ok=True)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "") -> Probe:
        if not isinstance(data, Mapping):
            raise RequestError(f"{source}a probe must be an object, got {type(data).__name__}: {data!r}")
        _reject_unknown(data, cls, source)
        for name in ("prompt", "kind"):
            if name not in data:
                raise RequestError(f"{source}field {name!r} is missing in the probe")
        try:
            return cls(**data)
        except RequestError as error:
            raise RequestError(f"{source}{error}") from None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: the speaker, as the model's chat template names it: ``system``, ``user``, ``assistant``.
        content: the text.

    Raises:
        RequestError: an empty or non-text role or content.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        _text(self.role, "message.role", "")
        _text(self.content, "message.content", "")

    def to_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


def read_messages(value: object, source: str = "") -> tuple[Message, ...]:
    """A conversation that ends before the answer, from ``{"role", "content"}`` objects or :class:`Message`.

    Raises:
        RequestError: no message, an unknown or missing field, or a last turn that is the assistant's.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise RequestError(f"{source}messages must be a list of objects with role and content, got {value!r}")
    found = []
    for i, item in enumerate(value):
        place = f"{source}messages[{i}]: "
        if isinstance(item, Message):
            found.append(item)
            continue
        if not isinstance(item, Mapping):
            raise RequestError(f"{place}a message must be an object with role and content, got {item!r}")
        _reject_unknown(item, Message, place)
        if missing := [name for name in ("role", "content") if name not in item]:
            raise RequestError(f"{place}field {missing[0]!r} is missing")
        try:
            found.append(Message(item["role"], item["content"]))
        except RequestError as error:
            raise RequestError(f"{place}{error}") from None
    if found[-1].role == "assistant":
        raise RequestError(f"{source}the last message is the assistant's; leave it out, its answer is target_new")
    return tuple(found)


@dataclass(frozen=True)
class EditRequest:
    """One fact to be changed: after ``prompt`` the model must answer ``target_new``.

    Args:
        prompt: the text before the answer, e.g. ``"The capital of Japan is"``; or a conversation, a list of
            ``{"role": "user", "content": "What is the capital of Japan?"}``, which the editor puts into the model's own
            chat template. ``prompt`` is the last message's text before that, and the whole rendered text after it.
        target_new: the wanted answer, e.g. ``"Osaka"``. A space separates prompt and answer if neither has one there.
        subject: the entity that the fact is about; it must occur in ``prompt`` if a ``subject`` position is edited.
        target_true: the answers before the edit (every alias), if the source gives them.
        probes: questions for the evaluation; training never looks at them.
        id: unique in an adapter; by default a hash of prompt, subject and target.
        case_id: requests of one case are applied together (MQuAKE); empty if a request stands alone.
        origin: where the request was read, for messages: ``"edits.json, record 3"``.
        messages: the conversation, if ``prompt`` was one.
        chat_template: the template (Jinja source) that renders ``messages`` to ``prompt``; the editor records it. A template
            that you give replaces the tokenizer's.

    Raises:
        RequestError: an empty or non-text field, a probe of the wrong type, messages that are not a conversation.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    target_true: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    id: str = ""
    case_id: str = ""
    origin: str = field(default="", compare=False)
    messages: tuple[Message, ...] = ()
    chat_template: str = ""

    def __post_init__(self) -> None:
        source = f"{self.origin}: " if isinstance(self.origin, str) and self.origin else ""
        if isinstance(self.prompt, (list, tuple)):
            if self.messages:
                raise RequestError(f"{source}prompt is a conversation, and messages are given too; give one of them")
            object.__setattr__(self, "messages", read_messages(self.prompt, source))
            object.__setattr__(self, "prompt", self.messages[-1].content)
        elif self.messages != ():
            object.__setattr__(self, "messages", read_messages(self.messages, source) if self.messages else ())
        _text(self.chat_template, "chat_template", source, empty_ok=True)
        if self.chat_template and not self.messages:
            raise RequestError(f"{source}chat_template is given, but the prompt is not a conversation; give messages")
        _text(self.prompt, "prompt", source)
        _text(self.target_new, "target_new", source)
        if self.subject is not None:
            _text(self.subject, "subject", source)
        object.__setattr__(self, "target_true", _texts(self.target_true, "target_true", source))
        if not isinstance(self.probes, (list, tuple)):
            raise RequestError(f"{source}probes must be a list of Probe, got {self.probes!r}")
        for i, probe in enumerate(self.probes):
            if not isinstance(probe, Probe):
                raise RequestError(f"{source}probes[{i}] must be a Probe, got {type(probe).__name__}: {probe!r}")
        object.__setattr__(self, "probes", tuple(self.probes))
        _text(self.id, "id", source, empty_ok=True)
        _text(self.case_id, "case_id", source, empty_ok=True)
        if not self.id:
            object.__setattr__(self, "id", self._made_id())

    def _made_id(self) -> str:
        asked = [m.to_dict() for m in self.messages] or self.prompt
        key = json.dumps([asked, self.subject, self.target_new], ensure_ascii=False)
        return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    @property
    def where(self) -> str:
        """Prefix of error messages: ``origin``, id and question."""
        return f"{self.origin + ': ' if self.origin else ''}edit {self.id!r} ({self.question!r})"

    @property
    def question(self) -> str:
        """The prompt as a person reads it: for a conversation its last message, without the template."""
        return self.messages[-1].content if self.messages else self.prompt

    def probes_of(self, kind: ProbeKind) -> tuple[Probe, ...]:
        return tuple(p for p in self.probes if p.kind == kind)

    def as_chat(self, system: str | None = None) -> EditRequest:
        """The same request as a conversation: the user says the prompt, after an optional ``system`` message.

        Probes stay plain texts.

        Raises:
            RequestError: the request is a conversation already.
        """
        if self.messages:
            raise RequestError(f"{self.where}: the request is a conversation already")
        first = [] if system is None else [Message("system", system)]
        messages = (*first, Message("user", self.prompt))
        name = "" if self.id == self._made_id() else self.id
        return dataclasses.replace(self, messages=messages, id=name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``messages`` and ``chat_template`` only for a conversation."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["target_true"] = list(self.target_true)
        data["probes"] = [p.to_dict() for p in self.probes]
        data["messages"] = [m.to_dict() for m in self.messages]
        return {k: v for k, v in data.items() if v or k not in ("messages", "chat_template")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "") -> EditRequest:
        """Read a request from a plain object; an unknown or missing field is an error that names it."""
        source = f"{origin}: " if origin else ""
        if not isinstance(data, Mapping):
            raise RequestError(f"{source}a request must be an object, got {type(data).__name__}: {data!r}")
        _reject_unknown(data, cls, source)
        for name in ("prompt", "target_new"):
            if name not in data:
                raise RequestError(f"{source}field {name!r} is missing; a request needs prompt and target_new")
        values = dict(data)
        probes = values.pop("probes", ())
        if not isinstance(probes, (list, tuple)):
            raise RequestError(f"{source}probes must be a list, got {probes!r}")
        values["probes"] = tuple(
            p if isinstance(p, Probe) else Probe.from_dict(p, source=f"{source}probes[{i}]: ")
            for i, p in enumerate(probes)
        )
        if origin:
            values["origin"] = origin
        return cls(**values)
