"""WISE's long-form tasks: hallucination and temporal (Wang et al. 2024, arXiv 2405.14768).

    hallucination: {"prompt": passage, "target_new": next sentence, "subject": "…",
                    "locality_prompt": "…", "locality_ground_truth": "…"}
    temporal:      the same plus "ood_rephrase": a passage about the same entity that was not used for the edit

Hallucination (from SelfCheckGPT, like WikiBio) is scored by perplexity of ``target_new``. Temporal edits a short prefix
(``SpaceX is``) to a long generated paragraph; ``ood_rephrase`` is a *whole passage*, not a question. EasyEdit passes it as
the rephrase prompt and reports the share of *its* tokens with a probability above 0.8, whatever ``target_new`` is.
Here the passage is split so that every metric applies: the prompt of the probe (kind ``rephrase``, group ``ood``) is the words
that passage and edit prompt share at the start, at least one; the answer is the rest.

``locality_prompt`` and its continuation are 150 + 150 characters of web text: ``unrelated`` probes, group ``web``. The cut may
fall *inside a word* (``…an antique map, historica`` | ``l print…``). EasyEdit joins the halves with a space, which asks the model
to continue a broken word; ``locality="mended"`` moves the word to the continuation, ``verbatim`` keeps the halves.
A few continuations of hallucination are empty; such a probe has no answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ..requests import EditRequest, Probe
from .record import Record
from .registry import register_format


def split_passage(prompt: str, passage: str) -> tuple[str, str]:
    """Split a passage into the words that it shares with the prompt at the start, at least one, and the rest.

    Case and punctuation are ignored: ``SpaceX is`` and ``SpaceX, officially…`` share ``SpaceX,``.
    """
    wanted, words = prompt.split(), re.findall(r"\S+\s*", passage.strip())
    shared = 0
    while shared < min(len(wanted), len(words) - 1) and _bare(wanted[shared]) == _bare(words[shared]):
        shared += 1
    shared = max(shared, 1)
    return "".join(words[:shared]).strip(), "".join(words[shared:]).strip()


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).lower()


def mend_cut(prompt: str, continuation: str) -> tuple[str, str]:
    """Move a word that was cut in two from the end of the first half of a text to the second half."""
    if not prompt or not continuation or prompt[-1].isspace() or continuation[0].isspace():
        return prompt.strip(), continuation.strip()
    head, space, torn = re.fullmatch(r"(.*?)(\s?)(\S*)", prompt, re.DOTALL).groups()  # type: ignore[union-attr]
    if not space or not head.strip():
        return prompt.strip(), continuation.strip()
    return head.strip(), (torn + continuation).strip()


_FIELDS = ("prompt", "target_new", "locality_prompt", "locality_ground_truth")


def _task(row: Mapping[str, Any]) -> str:
    return "temporal" if "ood_rephrase" in row else "hallucination"


@register_format("wise", matches=_FIELDS, tasks=("hallucination", "temporal"), task_of=_task)
def read_wise(record: Record, *, locality: Literal["mended", "verbatim"] = "mended") -> EditRequest:
    """WISE's hallucination and temporal (prompt, target_new, locality_prompt, ood_rephrase).

    Args:
        record: the record.
        locality: ``mended`` moves a word that was cut in two to the continuation; ``verbatim`` keeps the halves.
    """
    prompt = record.text("prompt")
    probes: list[Probe] = []
    for passage in record.texts("ood_rephrase"):
        head, rest = split_passage(prompt, passage)
        probes += record.probe(head, "rephrase", (rest,) if rest else (), group="ood")
    near = record.optional_text("locality_prompt", strip=False)
    if near is not None:
        rest = record.optional_text("locality_ground_truth", strip=False) or ""
        near, rest = mend_cut(near, rest) if locality == "mended" else (near.strip(), rest.strip())
        probes += record.probe(near, "unrelated", (rest,) if rest else (), group="web")
    return record.request(
        prompt=prompt,
        target_new=record.text("target_new"),
        subject=record.optional_text("subject"),
        probes=tuple(probes),
    )
