"""ZsRE in MEND's form (Mitchell et al. 2022, arXiv 2110.11309), also used by MEMIT, WISE and EasyEdit.

    {"subject": "…", "src": "question", "rephrase": "question", "alt": "…", "answers": ["…"], "pred": "…",
     "loc": "nq question: …", "loc_ans": "…", "cond": "…", "portability": {"Recalled Relation", "New Question", "New Answer"}}

EasyEdit's portability files add ``alternative_subject`` and ``alter_subject_question`` (the question under another name of the
subject; group ``subject_alias``) or ``inverse question`` (asks for the subject, given the new answer; group ``inverse``).

**Two targets.** MEND, EasyEdit and WISE edit to ``alt``, a counterfactual that a model proposed; MEMIT and its successors
edit to ``answers[0]``, the true answer. Their results cannot be compared, so the option ``target`` chooses one and the loaded
data records it. With ``alt``, ``answers`` are the old answers (``target_true``); in some records ``alt`` *is* one of them.
With ``answers``, several right answers are kept as aliases and there is no old answer (``pred`` is what a BART model said).

**``loc`` is a Natural-Questions question** about something else, so it becomes an ``unrelated`` probe (group ``nq``).
``loc="question"`` removes the prefix ``nq question:`` and adds the missing question mark; ``loc="verbatim"`` keeps the text,
as EasyEdit does.

Traps: some ``alt`` begin with a space; MEND silently skips records with an empty ``alt``, which are bad records here;
the published ``zsre_mend_eval.json`` shares questions with each of the test files, see ``splits.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..requests import EditRequest
from .counterfact import one_hop
from .knowedit import without
from .record import Record
from .registry import register_format

NQ_PREFIX = "nq question:"


def plain_question(text: str) -> str:
    """``nq question: who wrote it`` as ``who wrote it?``; other texts are only stripped."""
    text = text.strip()
    if not text.lower().startswith(NQ_PREFIX):
        return text
    text = text[len(NQ_PREFIX) :].strip()
    return text if not text or text[-1] in "?.!" else text + "?"


def _is_mend(row: Mapping[str, Any]) -> bool:
    return "src" in row and ("alt" in row or "answers" in row)


@register_format("zsre_mend", matches=_is_mend, tasks=("zsre",))
def read_zsre_mend(
    record: Record, *, target: Literal["alt", "answers"] = "alt", loc: Literal["question", "verbatim"] = "question"
) -> EditRequest:
    """ZsRE in MEND's form (src, alt, answers, rephrase, loc, loc_ans).

    Args:
        record: the record.
        target: ``alt`` (MEND, EasyEdit, WISE) or ``answers`` (MEMIT).
        loc: ``question`` strips the prefix "nq question:" and adds the question mark, ``verbatim`` keeps the text.
    """
    answers = record.answers("answers")
    if target == "alt":
        wanted: tuple[str, ...] = (record.text("alt"),)
        true = without(answers, wanted[0])
    else:
        if not answers:
            raise record.error("answers", "holds no answer; give one, or load with target='alt'")
        wanted, true = answers, ()
    probes = [*record.probes("rephrase", "rephrase", wanted, group="rephrase"), *one_hop(record)]
    if question := record.optional_text("alter_subject_question"):
        probes += record.probe(question, "portability", wanted, group="subject_alias")
    if target == "alt" and (question := record.optional_text("inverse question")):  # it names ``alt``
        probes += record.probe(question, "portability", record.answers("subject"), group="inverse")
    if question := record.optional_text("loc"):
        question = plain_question(question) if loc == "question" else question
        if not question:
            raise record.error("loc", f"holds no question after {NQ_PREFIX!r}")
        probes += record.probe(question, "unrelated", record.answers("loc_ans"), group="nq")
    return record.request(
        prompt=record.text("src"),
        target_new=wanted[0],
        subject=record.optional_text("subject"),
        target_true=true,
        probes=tuple(probes),
    )
