"""HalluEditBench (Huang et al. 2025, arXiv 2410.16251): facts that a chat model gets wrong, asked in many forms.

One CSV file for each topic (``places_city.csv``). The columns that are read, with an example and what each becomes:

======================================  ============================================  ==============================
column                                  example                                       becomes
======================================  ============================================  ==============================
``question``, ``object``, ``subject``   Who is the head of government of Toronto?     the request
``output_llama_2_7b_chat_hf``           John Tory (the model's wrong answer)          ``target_true``
``paraphrased_question``                Who governs Toronto?                          rephrase / paraphrase
``multiple_choice_with_letters``        A. Doug Ford  B. … (right: the labels' D)     rephrase / multiple_choice
``yes_question``, ``no_question``       Is Olivia Chow the head …? Is John Tory …?    rephrase / yes, rephrase / no
``reversed_relation_question``          Which city is governed by Olivia Chow?        portability / reversed
``question_2hop`` to ``question_6hop``  Which party is the head of … member of?       portability / 2hop to 6hop
``locality_question``                   What is a famous landmark in Toronto?         locality / same_subject
======================================  ============================================  ==============================

The benchmark scores free generation in chat and counts the reversed question as generality. ``target_true`` holds the
answer of *that* model; another model may answer differently.

Traps:
    * ``multiple_choice_with_letters`` holds the choices alone, so the probe puts the question before them.
    * The answer to a yes/no or multiple-choice probe is not the target but ``Yes``, ``No`` or a letter. Chance accuracy is
      50 or 25 %, so read these groups apart from ``paraphrase``.
    * The locality question has no answer in the file; the probe compares with the unedited model.
    * Some locality questions are about the answer, not the subject ("a popular product developed by Apple").
    * A topic may hold several facts of one subject.
"""

from __future__ import annotations

from ..requests import EditRequest, Probe, ProbeKind
from .knowedit import without
from .record import Record
from .registry import register_format

HOPS = range(2, 7)


@register_format("hallueditbench", matches=("question", "object", "paraphrased_question", "locality_question"))
def read_hallueditbench(record: Record) -> EditRequest:
    """HalluEditBench (question, object, paraphrased_question, yes_question, locality_question, question_2hop, ...)."""
    question, target = record.text("question"), record.text("object")
    subject = record.optional_text("subject")
    probes: list[Probe] = []

    def ask(name: str, kind: ProbeKind, group: str, answers: tuple[str, ...] = (), before: str = "") -> None:
        if prompt := record.optional_text(name):
            probes.extend(record.probe(before + prompt, kind, answers, group=group))

    ask("paraphrased_question", "rephrase", "paraphrase", (target,))
    letter = record.answers("multiple_choice_labels")
    ask("multiple_choice_with_letters", "rephrase", "multiple_choice", letter, before=f"{question} ")
    ask("yes_question", "rephrase", "yes", ("Yes",))
    ask("no_question", "rephrase", "no", ("No",))
    ask("reversed_relation_question", "portability", "reversed", (subject,) if subject else ())
    for hop in HOPS:
        ask(f"question_{hop}hop", "portability", f"{hop}hop", record.answers(f"answer_{hop}hop"))
    ask("locality_question", "locality", "same_subject")
    return record.request(
        prompt=question,
        target_new=target,
        subject=subject,
        target_true=without(record.answers("output_llama_2_7b_chat_hf"), target),
        probes=tuple(probes),
    )
