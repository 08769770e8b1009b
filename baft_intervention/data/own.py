"""Your own facts: plain JSON, JSON Lines or CSV.

A record needs a prompt and an answer; everything else is optional::

    [{"prompt": "The capital of Japan is", "target_new": "Osaka", "subject": "Japan", "target_true": ["Tokyo"],
      "rephrase": ["Japan's capital is"],
      "portability": [{"prompt": "The capital of Mount Fuji's country is", "answers": ["Osaka"]}],
      "locality": [{"prompt": "The capital of France is", "answers": ["Paris"]}]}]

JSON Lines has one such object on each line. CSV has a header; numbered columns repeat a field::

    prompt,target_new,subject,target_true,rephrase,rephrase_2,locality_prompt,locality_answer
    The capital of Japan is,Osaka,Japan,Tokyo,Japan's capital is,The seat of Japan's government is,The capital of France is,Paris

A prompt may be a conversation, ``[{"role": "user", "content": "What is the capital of Japan?"}]``.

What :meth:`EditRequest.to_dict` writes is read back unchanged. Unlike the benchmarks' readers, this one knows every field
that may occur, so a misspelt field is an error that names the right one, not a missing probe.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args

from ..errors import RequestError
from ..requests import EditRequest, Probe, ProbeKind
from .files import kind_of
from .record import Record
from .registry import register_format

# field -> other words for it, which the error for an unknown field recognises
SYNONYMS = {
    "target_new": (
        *("target", "new", "new_target", "answer", "new_answer", "object", "completion", "output", "label", "targets"),
        *("target_text", "response", "value"),
    ),
    "prompt": ("question", "text", "src", "input", "query", "prompts", "sentence"),
    "subject": ("entity", "ent", "concept", "name", "topic", "subjects"),
    "target_true": ("ground_truth", "true", "old", "old_answer", "old_target", "target_old", "original", "truth"),
    "rephrase": ("rephrases", "rephrase_prompt", "rephrase_prompts", "paraphrase", "paraphrases", "paraphrase_prompts"),
    "locality": ("neighbors", "neighbours", "neighborhood", "neighbourhood", "neighborhood_prompts", "localities"),
    "portability": ("consequences", "reasoning", "hops"),
    "locality_prompt": ("locality_question", "neighbor_prompt"),
    "locality_answer": ("locality_ground_truth", "locality_answers"),
    "portability_answer": ("portability_ground_truth", "portability_answers"),
}
_RIGHT_NAME = {word: name for name, words in SYNONYMS.items() for word in words}

_REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(EditRequest))
_KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
_LIST_FIELDS = ("rephrase", "portability", "locality", "unrelated")
_FLAT_FIELDS = tuple(
    f"{kind}_{part}" for kind in ("portability", "locality", "unrelated") for part in ("prompt", "answer")
)
FIELDS = (*_REQUEST_FIELDS, *_LIST_FIELDS, *_FLAT_FIELDS)
# rephrase_2, locality_prompt_3
_NUMBERED = re.compile(r"(rephrase|(?:portability|locality|unrelated)_(?:prompt|answer))(?:_(\d+))?")


def _is_own(row: Mapping[str, Any]) -> bool:
    # one of the two is enough, so that misspelling the other is an error that names it, not an unknown format
    return "prompt" in row or "target_new" in row


@register_format("own", matches=_is_own)
def read_own(record: Record) -> EditRequest:
    """A user's own facts (prompt, target_new, and optionally subject, target_true, rephrase, locality, portability, probes)."""
    numbered = _check_fields(record)
    # not stripped, so that EditRequest.to_dict is read back unchanged; CSV cells are stripped already
    prompt, target = _prompt(record), record.text("target_new", strip=False)
    probes = _given_probes(record)
    for name, _ in numbered["rephrase"]:
        for wording in record.texts(name):
            probes += record.probe(wording, "rephrase", (target,), group="rephrase")
    for kind in ("portability", "locality", "unrelated"):
        if record.has(kind):
            for question, answers in record.question_items(kind):
                probes += record.probe(question, kind, answers)
        answers_at = {number: name for name, number in numbered[f"{kind}_answer"]}
        for name, number in numbered[f"{kind}_prompt"]:
            question = record.optional_text(name)
            if question is not None:
                answer = record.answers(answers_at[number]) if number in answers_at else ()
                if not answer and kind == "portability":
                    raise record.error(
                        name.replace("_prompt", "_answer"), f"is missing; {name!r} needs the answer that must follow"
                    )
                probes += record.probe(question, kind, answer)
    return record.request(
        prompt=prompt,
        target_new=target,
        subject=record.optional_text("subject", strip=False),
        target_true=record.answers("target_true", exact=True),
        probes=tuple(probes),
        id=record.optional_text("id", strip=False) or "",
        case_id=record.optional_text("case_id", strip=False) or "",
        messages=record.data.get("messages") or (),
        chat_template=record.optional_text("chat_template", strip=False) or "",
    )


def _prompt(record: Record) -> Any:
    """A text, or a conversation (a list of messages, which the request checks)."""
    value = record.data.get("prompt")
    return value if isinstance(value, list) else record.text("prompt", strip=False)


def _check_fields(record: Record) -> dict[str, list[tuple[str, str]]]:
    """Refuse unknown fields; return the numbered ones as (name, number), ordered by number."""
    numbered: dict[str, list[tuple[str, str]]] = {name: [] for name in ("rephrase", *_FLAT_FIELDS)}
    for name, value in record.data.items():
        match = _NUMBERED.fullmatch(name) if isinstance(name, str) else None
        if match:
            numbered[match[1]].append((name, match[2] or ""))
        elif name not in FIELDS and value is not None:
            raise record.error(str(name), f"is unknown; {_suggestion(str(name))}")
    for pairs in numbered.values():
        pairs.sort(key=lambda pair: int(pair[1] or 0))
    return numbered


def _suggestion(name: str) -> str:
    bare = re.sub(r"[\s\-]+", "_", name.strip().lower())
    if bare in FIELDS:
        return f"it is written {bare!r}"
    right = _RIGHT_NAME.get(bare) or _RIGHT_NAME.get(re.sub(r"_?\d+$", "", bare))
    if right:
        return f"the field is called {right!r}"
    near = difflib.get_close_matches(bare, FIELDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known fields: {', '.join(FIELDS)}"


def _given_probes(record: Record) -> list[Probe]:
    """Probes in the form of :meth:`EditRequest.to_dict`; ``answer`` and ``ground_truth`` also name the answers."""
    probes: list[Probe] = []
    for item in record.children("probes"):
        values = dict(item.data)
        for name in ("answers", "contrast"):
            key = item.first_of("answers", "answer", "ground_truth") if name == "answers" else name
            answers = item.answers(key, exact=True)
            values.pop(key, None)
            values[name] = answers
        if values.get("group") is None:
            values["group"] = ""
        if values.get("kind") not in _KINDS:
            raise item.error(
                "kind", f"must be one of {', '.join(_KINDS)}, got {kind_of(values.get('kind'))}: {values.get('kind')!r}"
            )
        item.text("prompt")
        try:
            probes.append(Probe.from_dict(values, source=f"{record.place}: field {item.path.rstrip('.')!r}: "))
        except RequestError as error:
            raise item.wrapped(error) from None
    return probes
