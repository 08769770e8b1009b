"""QAEdit (Yang et al. 2025, WILD, arXiv 2502.11177): real questions of Natural Questions, TriviaQA and SimpleQA.

    {"id": 1104, "source": "NQ", "prompt": "who has the most 70 point games in nba history?", "target": "Wilt Chamberlain *",
     "subject": "most 70 point games in nba history", "rephrase": "Which NBA player …?",
     "locality": [{"loc": "who is the saint that protects police officers", "loc_ans": "Michael"}, …]}

The target is the true answer, so a record has no old answer. The benchmark scores free generation; teacher-forced token
accuracy on the same records is far higher.

Traps:
    * ``locality`` holds Natural Questions about other things: ``unrelated`` probes (group ``nq``). The reader adds the
      missing question marks.
    * ``subject`` is often a whole clause rather than an entity.
    * A few targets carry marks of their web page (``Wilt Chamberlain *``); the reader keeps them, as the benchmark does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..requests import EditRequest
from .record import Record
from .registry import register_format
from .zsre_mend import NQ_PREFIX, plain_question


def _is_qaedit(row: Mapping[str, Any]) -> bool:
    items = row.get("locality")
    has_loc = isinstance(items, list) and bool(items) and isinstance(items[0], Mapping) and "loc" in items[0]
    return has_loc and "prompt" in row and "target" in row


@register_format("qaedit", matches=_is_qaedit)
def read_qaedit(record: Record) -> EditRequest:
    """QAEdit (prompt, target, subject, rephrase, locality with loc and loc_ans)."""
    target = record.text("target")
    probes = record.probes("rephrase", "rephrase", (target,), group="rephrase")
    for item in record.children("locality"):
        question = plain_question(f"{NQ_PREFIX} {item.text('loc')}")
        probes += item.probe(question, "unrelated", item.answers("loc_ans"), group="nq")
    return record.request(
        prompt=record.text("prompt"),
        target_new=target,
        subject=record.optional_text("subject"),
        probes=tuple(probes),
    )
