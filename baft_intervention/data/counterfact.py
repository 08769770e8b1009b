"""CounterFact (Meng et al. 2022, ROME, arXiv 2202.05262), in ROME's form and in EasyEdit's flat form.

ROME's form::

    {"case_id": 0, "requested_rewrite": {"prompt": "The mother tongue of {} is", "subject": "…", "relation_id": "P103",
        "target_new": {"str": "…", "id": "Q…"}, "target_true": {"str": "…", "id": "Q…"}},
     "paraphrase_prompts": ["…", "…"], "neighborhood_prompts": [10], "attribute_prompts": [10], "generation_prompts": [10],
     "portability": {"Recalled Relation": "…", "New Question": "…", "New Answer": "…"}, "alternative_subject": "…"}

The option ``include`` chooses the prompt lists to read. They become:
    * ``paraphrase``: kind ``rephrase``; ``answers`` is the new answer, ``contrast`` the true one. ROME puts an unrelated
      sentence before each prompt.
    * ``neighborhood``: kind ``locality``; the same template with another subject that shares the *true* answer and must keep
      it: ``answers`` is the true answer, ``contrast`` the new one. The hard negatives of this benchmark.
    * ``attribute``: kind ``locality``; subjects whose real answer is the *new* one, so ``answers`` is the new answer.
      ROME's tables do not use them; not read by default.
    * ``generation``: kind ``portability``, without an answer; ROME's fluency and consistency texts start from them. Not read
      by default, since teacher-forced accuracy cannot score them.
    * ``portability``: added by EasyEdit's authors. A question one hop further (``portability``, group ``one_hop``), and the
      prompt with another name of the subject (``alternative_subject``, group ``subject_alias``).

EasyEdit's flat form has one of each: ``prompt``, ``target_new``, ``ground_truth``, ``rephrase_prompt``, ``locality_prompt``,
``locality_ground_truth``. Trap: its ``rephrase_prompt`` is often one of ROME's *generation* prompts ("Where X is from, people
speak the language of"), a consequence rather than a paraphrase, so scores of the two files differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..requests import EditRequest, Probe
from .record import Record
from .registry import register_format

Part = Literal["paraphrase", "neighborhood", "attribute", "generation", "portability"]
DEFAULT_PARTS: tuple[Part, ...] = ("paraphrase", "neighborhood", "portability")


def fill(record: Record, name: str, subject: str) -> str:
    """A template with the subject in place of ``{}``; other braces stay as they are."""
    template = record.text(name)
    if "{}" not in template:
        raise record.error(name, f"has no {{}} where the subject goes: {template!r}")
    return template.replace("{}", subject)


def answer_text(record: Record, name: str) -> str:
    """An answer, written as ``{"str": "…", "id": "Q…"}`` (ROME) or as a plain text."""
    if isinstance(record.data.get(name), Mapping):
        return record.child(name).text("str")
    return record.text(name)


def one_hop(record: Record, name: str = "portability") -> tuple[Probe, ...]:
    """EasyEdit's one-hop question, if the record has one."""
    if not record.has(name):
        return ()
    hop = record.child(name)
    return record.probe(hop.text("New Question"), "portability", hop.answers("New Answer"), group="one_hop")


def _is_rome(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("requested_rewrite"), Mapping)


@register_format("counterfact", matches=_is_rome)
def read_counterfact(record: Record, *, include: tuple[Part, ...] = DEFAULT_PARTS) -> EditRequest:
    """CounterFact in ROME's form (requested_rewrite, paraphrase_prompts, neighborhood_prompts, ...).

    Args:
        record: the record.
        include: which prompt lists become probes: paraphrase, neighborhood, attribute, generation, portability.
    """
    rewrite = record.child("requested_rewrite")
    subject = rewrite.text("subject")
    new, true = answer_text(rewrite, "target_new"), answer_text(rewrite, "target_true")
    probes: list[Probe] = []
    if "paraphrase" in include:
        probes += record.probes("paraphrase_prompts", "rephrase", (new,), (true,), group="paraphrase")
    if "neighborhood" in include:
        probes += record.probes("neighborhood_prompts", "locality", (true,), (new,), group="neighborhood")
    if "attribute" in include:
        probes += record.probes("attribute_prompts", "locality", (new,), (true,), group="attribute")
    if "generation" in include:  # has no answers by design; ROME repeats its prompts
        for prompt in dict.fromkeys(record.texts("generation_prompts")):
            probes.append(Probe(prompt=prompt, kind="portability", group="generation"))
    if "portability" in include:
        probes += one_hop(record)
        if alias := record.optional_text("alternative_subject"):
            probes += record.probe(fill(rewrite, "prompt", alias), "portability", (new,), group="subject_alias")
    return record.request(
        prompt=fill(rewrite, "prompt", subject),
        target_new=new,
        subject=subject,
        target_true=(true,) if true != new else (),
        probes=tuple(probes),
    )


_FLAT_FIELDS = ("prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt")


@register_format("counterfact_flat", matches=_FLAT_FIELDS, tasks=("counterfact",))
def read_counterfact_flat(record: Record) -> EditRequest:
    """CounterFact in EasyEdit's flat form (rephrase_prompt, locality_prompt, locality_ground_truth)."""
    new = record.text("target_new")
    true = tuple(answer for answer in record.answers("ground_truth") if answer != new)
    hop, near = record.answers("portability_ground_truth"), record.answers("locality_ground_truth")
    probes = [
        *record.probes("rephrase_prompt", "rephrase", (new,), true, group="rephrase"),
        *record.probes("portability_prompt", "portability", hop, group="one_hop"),
        *record.probes("locality_prompt", "locality", near, (new,), group="neighborhood"),
    ]
    return record.request(
        prompt=record.text("prompt"),
        target_new=new,
        subject=record.optional_text("subject"),
        target_true=true,
        probes=tuple(probes),
    )
