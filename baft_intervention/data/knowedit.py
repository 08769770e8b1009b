"""KnowEdit: ZsRE, WikiData_counterfact, WikiData_recent, WikiBio, Sanitation (Zhang et al. 2024, arXiv 2401.01286).

The common record::

    {"subject": "…", "prompt": "…", "target_new": "…", "ground_truth": …, "rephrase_prompt": "…",
     "portability": {"Reasoning": [{"prompt": "…", "ground_truth": …}], "Subject_Aliasing": […], "Logical_Generalization": […]},
     "locality":    {"Relation_Specificity": […], "Forgetfulness": […]}}

``rephrase_prompt`` (ZsRE only) becomes a ``rephrase`` probe. Each group under ``portability`` or ``locality`` becomes probes
of that kind and keeps the file's group name:

* ``Subject_Aliasing``: the same question with another name of the subject; KnowEdit counts it as portability.
* ``Reasoning``, ``Logical_Generalization``: one hop further; a consequence such as the inverse relation.
* ``Relation_Specificity``: the same subject, another relation; its answer must stay.
* ``Forgetfulness``: a relation with several values ("… which is not *new* …"); the old values must stay.

Traps:
    * ``ground_truth`` is a text, a list, or a list of alias lists, which differs between files and items; some alias lists
      are empty. EasyEdit scores ``ground_truth[0][0]``, which is the first of ``answers``.
    * WikiData_recent's facts are true and new, so the edit has no ``ground_truth``.
    * Some ZsRE prompts occur twice, and a few do not contain their subject literally.
    * About 20 portability questions of WikiData have no answer; they are dropped and counted.
    * WikiBio's prompt is a passage whose continuation is the target; its subject is lower-case, from the URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..requests import EditRequest, Probe, ProbeKind
from .files import kind_of
from .record import Record, shown
from .registry import register_format


def read_groups(record: Record, name: str, kind: ProbeKind) -> list[Probe]:
    """Probes of ``{"group": [{"prompt", "ground_truth"}, …], …}``; absent and null groups give none."""
    if not record.has(name):
        return []
    groups = record.child(name)
    probes: list[Probe] = []
    for group in groups.data:
        group_name = groups.as_text(group, shown(group))
        for prompt, answers in groups.question_items(group):
            probes += record.probe(prompt, kind, answers, group=group_name)
    return probes


def without(answers: tuple[str, ...], target: str) -> tuple[str, ...]:
    """Old answers without the new one: some records edit a fact to what is already true."""
    return tuple(answer for answer in answers if answer != target)


def _is_knowedit(row: Mapping[str, Any]) -> bool:
    groups = [row[name] for name in ("locality", "portability") if row.get(name) is not None]
    return (
        "prompt" in row
        and "target_new" in row
        and bool(groups)
        and all(isinstance(g, Mapping) and "prompt" not in g for g in groups)
    )


def _task(row: Mapping[str, Any]) -> str:
    if row.get("rephrase_prompt") is not None:
        return "zsre"
    return "wikidata_counterfact" if "ground_truth" in row else "wikidata_recent"


@register_format(
    "knowedit", matches=_is_knowedit, tasks=("zsre", "wikidata_counterfact", "wikidata_recent"), task_of=_task
)
def read_knowedit(record: Record) -> EditRequest:
    """KnowEdit's ZsRE, WikiData_counterfact and WikiData_recent (prompt, target_new, locality, portability)."""
    prompt, target = record.text("prompt"), record.text("target_new")
    rephrase = record.first_of("rephrase_prompt", "rephrase")
    probes = [
        *record.probes(rephrase, "rephrase", (target,), group="rephrase"),
        *read_groups(record, "portability", "portability"),
        *read_groups(record, "locality", "locality"),
    ]
    return record.request(
        prompt=prompt,
        target_new=target,
        subject=record.optional_text("subject"),
        target_true=without(record.answers("ground_truth"), target),
        probes=tuple(probes),
    )


@register_format("wikibio", matches=("text", "labels"))
def read_wikibio(record: Record) -> EditRequest:
    """KnowEdit's WikiBio (text, labels, concept): the next sentence of a biography, hallucinated before the edit."""
    probes = [*read_groups(record, "portability", "portability"), *read_groups(record, "locality", "locality")]
    return record.request(
        prompt=record.text("text"),
        target_new=record.text("labels"),
        subject=record.optional_text("concept"),
        probes=tuple(probes),
    )


# (edits, other questions): the test file's names and the training file's
_SANITATION_PARTS = (("success", "locality"), ("K_F", "K_R"))


def _sanitation_rows(document: Mapping[str, Any]) -> list[Any] | None:
    for edits, others in _SANITATION_PARTS:
        if isinstance(document.get(edits), list) and others in document:
            return document[edits]
    return None


@register_format("sanitation", matches=("question", "target_new"), rows=_sanitation_rows)
def read_sanitation(record: Record) -> EditRequest:
    """KnowEdit's Sanitation ({"success": [...], "locality": [...]}): TriviaQA answers to be forgotten.

    Each question under ``success`` is a request with the file's target ("I don't know."); its old answer is
    ``target_true``. Records have no subject and no paraphrase. The questions under ``locality`` are about other things, so
    they become ``unrelated`` probes (group ``trivia_qa``): record ``i`` of ``n`` gets every ``n``-th from ``i`` on, so the
    whole file asks each once. The prompt is the bare question; EasyEdit wraps it in a template that depends on the
    model. The training file names the two parts ``K_F`` and ``K_R``.
    """
    target = record.text("target_new")
    probes: list[Probe] = []
    for other in _other_questions(record):
        probes += record.probe(other.text("question"), "unrelated", other.answers("ground_truth"), group="trivia_qa")
    return record.request(
        prompt=record.text("question"),
        target_new=target,
        target_true=without(record.answers("ground_truth"), target),
        probes=tuple(probes),
    )


def _other_questions(record: Record) -> list[Record]:
    """This record's share of the questions whose answers must stay."""
    if not isinstance(record.document, Mapping):
        return []
    name = next(
        (others for edits, others in _SANITATION_PARTS if edits in record.document and others in record.document),
        "locality",
    )
    document = replace(record, data=record.document)
    items = record.document.get(name)
    if not isinstance(items, list):
        raise document.error(name, "must be a list of questions")
    share = []
    for i in range(record.position, len(items), max(len(record.siblings), 1)):
        if not isinstance(items[i], Mapping):
            raise document.error(f"{name}[{i}]", f"must be an object with a question, got {kind_of(items[i])}")
        share.append(replace(record, data=items[i], path=f"{name}[{i}]."))
    return share
