"""MQuAKE: do the consequences of an edit follow? (Zhong et al. 2023, arXiv 2305.14795).

    {"case_id": 7417, "requested_rewrite": [{"prompt": "{} was performed by", "subject": "Hey Jude", "question": "Who …?",
        "target_new": {"str": "…"}, "target_true": {"str": "…"}}, …],
     "questions": [3 wordings], "new_answer": "…", "new_answer_alias": […], "answer": "…", "answer_alias": […],
     "new_single_hops": [{"question", "cloze", "answer", "answer_alias"}, …], "single_hops": […]}

One record is a *case*: a chain of facts, several of which are edited, and a question that needs the whole chain. Each edit
becomes a request with the record's ``case_id``; requests of one case are applied together before any probe. The probes:

* each edit's own question and cloze (kind ``rephrase``, group ``single_hop``), with the aliases of the new chain;
* hops of the new chain that no edit touches (kind ``portability``, group ``single_hop``), on the case's last request;
* the multi-hop question in its three wordings (kind ``portability``, group ``multi_hop``), on the case's **last** request, so
  they are asked once, after all edits of the case.
  The published multi-hop accuracy counts a case as right if *any* of the three is.

Traps: edits of different cases contradict each other, so an adapter cannot hold all cases at once; MQuAKE-hard's chains all
have four edits; prompts contain typing errors ("origianl").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..requests import EditRequest, Probe
from .counterfact import answer_text, fill
from .knowedit import without
from .record import Record
from .registry import register_format


def _is_mquake(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("requested_rewrite"), (list, tuple))


def _with_aliases(record: Record, answer: str, aliases: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((record.text(answer), *record.answers(aliases))))


@register_format("mquake", matches=_is_mquake)
def read_mquake(record: Record) -> list[EditRequest]:
    """MQuAKE (requested_rewrite as a list, questions, new_answer): several edits a case, multi-hop questions."""
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.error("requested_rewrite", "is empty or missing; a case needs at least one edit")
    case_id = record.text("case_id") if record.has("case_id") else f"case-{record.position}"
    hops = {hop.text("question"): hop for hop in record.children("new_single_hops")}

    edits: list[tuple[Record, dict[str, Any], list[Probe]]] = []
    for number, rewrite in enumerate(rewrites):
        subject, new, true = (
            rewrite.text("subject"),
            answer_text(rewrite, "target_new"),
            answer_text(rewrite, "target_true"),
        )
        prompt = fill(rewrite, "prompt", subject)
        answers, wordings = (new,), rewrite.texts("question")
        hop = hops.pop(wordings[0], None) if wordings else None
        if hop is not None:
            answers = tuple(dict.fromkeys((new, *_with_aliases(hop, "answer", "answer_alias"))))
            wordings += hop.texts("cloze")
        probes: list[Probe] = []
        for wording in dict.fromkeys(wordings):
            if wording != prompt:
                probes += rewrite.probe(wording, "rephrase", answers, group="single_hop")
        values = {
            "prompt": prompt,
            "target_new": new,
            "subject": subject,
            "target_true": without((true,), new),
            "id": f"{case_id}.{number}",
            "case_id": case_id,
        }
        edits.append((rewrite, values, probes))

    last = edits[-1][2]
    for question, hop in hops.items():
        last += record.probe(question, "portability", _with_aliases(hop, "answer", "answer_alias"), group="single_hop")
    if record.texts("questions"):
        answers = _with_aliases(record, "new_answer", "new_answer_alias")
        last += record.probes("questions", "portability", answers, group="multi_hop")
    return [rewrite.request(**values, probes=tuple(probes)) for rewrite, values, probes in edits]
