"""WikiBigEdit (Thede et al. 2025, arXiv 2503.05683): real changes of Wikidata as questions, in EasyEdit's flat form.

    {"prompt": "What position does Stefan Mair hold within the organization?", "target_new": "head coach",
     "subject": "Stefan Mair", "rephrase_prompt": "…", "locality_prompt": "What role did Stefan Mautner have …?",
     "locality_ground_truth": "Holocaust victim"}

The facts are true and new, so a record has no old answer (``target_true``).

Traps:
    * ``locality_prompt`` asks the same kind of question about a subject with a similar name. It becomes a ``locality`` probe
      (group ``near_subject``). The same field holds a neighbour with the old answer in CounterFact's flat form, and
      unrelated text in WISE's form.
    * WISE's ``hallucination`` has the same fields except ``rephrase_prompt``, which tells the two formats apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..requests import EditRequest
from .record import Record
from .registry import register_format


def _is_wikibigedit(row: Mapping[str, Any]) -> bool:
    fields = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    return all(name in row for name in fields) and "ground_truth" not in row


@register_format("wikibigedit", matches=_is_wikibigedit)
def read_wikibigedit(record: Record) -> EditRequest:
    """WikiBigEdit in EasyEdit's flat form (rephrase_prompt, locality_prompt; no ground_truth)."""
    target, near = record.text("target_new"), record.answers("locality_ground_truth")
    probes = [
        *record.probes("rephrase_prompt", "rephrase", (target,), group="rephrase"),
        *record.probes("locality_prompt", "locality", near, group="near_subject"),
    ]
    return record.request(
        prompt=record.text("prompt"),
        target_new=target,
        subject=record.optional_text("subject"),
        probes=tuple(probes),
    )
