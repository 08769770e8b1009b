"""known_1000: facts that GPT-2 XL knew (Meng et al. 2022, ROME's causal tracing, arXiv 2202.05262).

    {"known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica", "template": "{} is located in the continent",
     "prediction": " of Antarctica. It is the largest of the three", "relation_id": "P30",
     "prompt": "Vinson Massif is located in the continent of"}

The file proposes no edits. It is a pool of statements that a model may already complete, for calibration, causal tracing
and edits of known facts. The option ``target`` chooses what a request edits to:

* ``known``: ``target_new`` is the true ``attribute`` (an edit that should change nothing);
* ``counterfactual``: ``target_new`` is the attribute of another record with the same relation, drawn by ``seed``, and
  ``target_true`` is the true one.

``template`` is the beginning of ``prompt``, not another wording of it, so requests have no probes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from ..requests import EditRequest
from .record import Record
from .registry import register_format


@register_format("known", matches=("subject", "attribute", "template", "prediction"))
def read_known(record: Record, *, target: Literal["known", "counterfactual"] = "known", seed: int = 0) -> EditRequest:
    """ROME's known_1000 (subject, attribute, template, prediction).

    Args:
        record: the record.
        target: ``known`` trains the true attribute, ``counterfactual`` another one of the same relation.
        seed: draws that other attribute.
    """
    subject, attribute, prompt = record.text("subject"), record.text("attribute"), record.text("prompt")
    new, true = attribute, ()
    if target == "counterfactual":
        new, true = _other_attribute(record, attribute, seed), (attribute,)
    return record.request(prompt=prompt, target_new=new, subject=subject, target_true=true)


def _other_attribute(record: Record, attribute: str, seed: int) -> str:
    relation = record.data.get("relation_id")
    found = {
        text.strip()
        for row in record.siblings
        if isinstance(row, Mapping)
        and row.get("relation_id") == relation
        and isinstance(text := row.get("attribute"), str)
    }
    found -= {attribute, ""}
    if not found:
        raise record.error(
            "relation_id", f"is {relation!r}, and no record with it has another attribute; load with target='known'"
        )
    key = f"{seed}\0{record.text('prompt')}\0"
    return min(found, key=lambda text: hashlib.sha256((key + text).encode("utf-8", "surrogatepass")).digest())
