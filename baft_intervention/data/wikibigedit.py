"""WikiBigEdit (Thede et al. 2025, arXiv 2503.05683): real changes of Wikidata as questions, in EasyEdit's flat form.

    {"prompt": "What position does Stefan Mair hold within the organization?", "target_new": "head coach",
     "subject": "Stefan Mair", "rephrase_prompt": "…", "locality_prompt": "What role did Stefan Mautner have …?",
     "locality_ground_truth": "Holocaust victim"}

The facts are true and new, so a record has no old answer (``target_true``).

Traps:
    * ``locality_prompt`` is a *near* neighbour: the same kind of question about a subject with a similar name. It becomes a
      ``locality`` probe (group ``near_subject``). In CounterFact's flat form the neighbour shares the old answer; in
      WISE's form, which has the same field names, the text is unrelated.
    * WISE's ``hallucination`` has the same fields except ``rephrase_prompt``, which tells the two formats apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..requests import EditRequest, Probe
from .record import Record
from .registry import register_format


def _is_wikibigedit(row: Mapping[str, Any]) -> bool:
    fields = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    return all(name in row for name in fields) and "ground_truth" not in row


@register_format("wikibigedit", matches=_is_wikibigedit)
def read_wikibigedit(record: Record) -> EditRequest:
    """WikiBigEdit in EasyEdit's flat form (rephrase_prompt, locality_prompt; no ground_truth)."""
    target = record.text("target_new")
    probes: list[Probe] = []
    for prompt in record.texts("rephrase_prompt"):
        probes += record.probe(prompt, "rephrase", (target,), group="rephrase")
    for prompt in record.texts("locality_prompt"):
        probes += record.probe(prompt, "locality", record.answers("locality_ground_truth"), group="near_subject")
    return record.request(
        prompt=record.text("prompt"),
        target_new=target,
        subject=record.optional_text("subject"),
        probes=tuple(probes),
    )
