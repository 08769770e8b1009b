"""The metrics of one record, from its scores and generated texts.

The metrics of a group have its name after a slash, e.g. ``portability/Reasoning``:

=============================================  ============================================================================
``reliability`` ``generality``                 token accuracy on the edit's prompt, and on rephrases (mean over probes)
``portability``                                the same on consequences; by group as ``portability/<group>``
``locality`` ``unrelated``                     share of argmax tokens that did not change, along the data set's answer
``<name>_easyedit``                            any of these including leading white-space tokens, as in EasyEdit
``<name>_exact``                               all tokens right (reliability, generality, portability)
``locality_kl`` ``unrelated_kl``               KL(unedited || edited) in nats, mean over positions
``efficacy`` ``paraphrase`` ``neighbourhood``  ROME's probability success, and ``_magnitude``
``perplexity``                                 of the target after the edit's prompt
``convsent``                                   SERAC's score on the reworded question
``generation_em`` ``_f1``                      greedy text up to the end of sequence, on the edit's prompt
``generation_em_sentence``                     the same for the text's first sentence or line
``generation_prefix``                          the text begins with the answer
``rephrase_generation_*``                      the same on rephrases
``multi_hop``                                  MQuAKE's accuracy of the case: generated text that begins with the answer
``fluency``                                    n-gram entropy (bits) of a sampled continuation of the edit's prompt
=============================================  ============================================================================

To add a metric::

    @register_metric("answer_length")
    def answer_length(record, scores, texts):
        text = texts.get(record.request.prompt)
        return None if text is None else float(len(text.split()))
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..registry import registrar
from . import metrics as m
from .queries import Question, RecordQueries
from .scoring import QueryScore

ACCURACY = {"edit": "reliability", "rephrase": "generality", "portability": "portability"}
STILL = {"locality": "locality", "unrelated": "unrelated"}
SUCCESS = {"edit": "efficacy", "rephrase": "paraphrase", "locality": "neighbourhood"}
# value of a question -> what its name adds to the record's metric
_SUFFIXES = {"accuracy": "", "accuracy_easyedit": "_easyedit", "exact": "_exact", "kl": "_kl"}
_SENTENCE = re.compile(r"\n|[.!?](\s|$)")

RecordMetric = Callable[[RecordQueries, Sequence[QueryScore], Mapping[str, str]], float | None]
_REGISTRY: dict[str, RecordMetric] = {}


def register_metric(name: str) -> Callable[[RecordMetric], RecordMetric]:
    """Decorator: add a metric of a record to every evaluation, under ``name`` in its records and summary.

    The function takes the record's :class:`~.queries.RecordQueries`, the scores of its queries in order (argmax ids and
    log-probabilities of the edited and the unedited model), and the generated texts by prompt. It returns a number, or None if
    the record has no value; a summary has the mean over the records that have one.

    Raises:
        ConfigError: the name is taken by another function.
    """
    return registrar(_REGISTRY, name, "metric")


def record_metrics(
    record: RecordQueries,
    scores: Sequence[QueryScore],
    texts: Mapping[str, str] | None = None,
    sample: str | None = None,
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The metrics of a record and of each of its probes.

    Args:
        record: the questions and queries.
        scores: scores of the record's queries, in order.
        texts: generated texts by prompt; prompts that are not in it have no generation metrics.
        sample: the text whose fluency is measured.

    Returns:
        ``(metrics, probes)``; a probe's dict holds ``kind``, ``group`` and its values.
    """
    values: dict[str, list[float | None]] = defaultdict(list)
    probes = []
    for question in record.questions:
        found = question_metrics(question, [scores[i] for i in question.wanted], [scores[i] for i in question.against])
        if texts is not None and question.prompt in texts:
            found |= text_metrics(texts[question.prompt], question)
        probes.append({"kind": question.kind, "group": question.group} | found)
        for name, value in found.items():
            _collect(values, question, name, value)
    hops = [p.get("generation_prefix") for p in probes if p["group"] == "multi_hop"]
    table = {name: m.mean(column) for name, column in values.items()}
    if any(h is not None for h in hops):
        table["multi_hop"] = m.multi_hop_accuracy(hops)
    if sample is not None:
        table["fluency"] = m.ngram_entropy(sample)
    for name, metric in _REGISTRY.items():
        if name in table:
            raise ConfigError(f"the metric {name!r} has the name of a metric of the library; choose another name")
        table[name] = metric(record, scores, texts or {})
    return dict(sorted(table.items())), probes


def _collect(values: dict[str, list[float | None]], question: Question, name: str, value: float | None) -> None:
    if name.startswith("generation"):
        if question.kind == "edit":
            values[name].append(value)
        elif question.kind == "rephrase":
            values["rephrase_" + name].append(value)
        return
    if question.kind == "edit" and name not in ("accuracy", "accuracy_easyedit", "exact"):
        values[name].append(value)
        return
    if name in _SUFFIXES:
        name_of_record = (ACCURACY | STILL)[question.kind] + _SUFFIXES[name]
        values[name_of_record].append(value)
        if question.kind in ("portability", *STILL) and question.group and name in ("accuracy", "kl"):
            values[f"{name_of_record}/{question.group}"].append(value)
    elif question.kind in SUCCESS or name == "convsent":
        values[name].append(value)


def question_metrics(
    question: Question, wanted: Sequence[QueryScore], against: Sequence[QueryScore]
) -> dict[str, float | None]:
    """Teacher-forced values of one question, under the keys that apply: ``accuracy``, ``kl``, ``efficacy``, …"""
    found: dict[str, float | None] = {}
    if not wanted:
        return found
    if question.kind in STILL:
        found["accuracy"] = m.mean(m.token_match(s.before, s.predicted, s.query.lead) for s in wanted)
        found["accuracy_easyedit"] = m.mean(m.token_match(s.before, s.predicted) for s in wanted)
        found["kl"] = m.mean(m.mean(s.divergence) for s in wanted)
    else:
        first = wanted[0]
        target = first.query.target_ids
        found["accuracy"] = m.token_accuracy(first.predicted, target, first.query.lead)
        found["accuracy_easyedit"] = m.token_accuracy_easyedit(first.predicted, target)
        found["exact"] = m.all_tokens_right(first.predicted, target, first.query.lead)
        if question.kind == "edit":
            found["perplexity"] = m.perplexity(first.log_probs)
    if against and question.group == "sentiment":
        found["convsent"] = m.convsent_score(
            [x for s in wanted for x in s.log_probs],
            [x for s in against for x in s.log_probs],
            [x for s in wanted for x in s.log_probs_before],
        )
    elif against and question.kind in SUCCESS and wanted[0].log_probs:
        name = SUCCESS[question.kind]
        likely = math.fsum(wanted[0].log_probs) / len(wanted[0].log_probs)
        others = [math.fsum(s.log_probs) / len(s.log_probs) for s in against if s.log_probs]
        found[name] = m.probability_success(likely, others)
        found[f"{name}_magnitude"] = m.probability_magnitude(likely, others)
    return found


def text_metrics(text: str, question: Question) -> dict[str, float | None]:
    """Free-generation values of one question."""
    return {
        "generation_em": m.exact_match(text, question.answers),
        "generation_em_sentence": m.exact_match(first_sentence(text), question.answers),
        "generation_f1": m.answer_f1(text, question.answers),
        "generation_prefix": m.begins_with_answer(text, question.answers),
    }


def first_sentence(text: str) -> str:
    """The first line or sentence of a text, whichever ends first."""
    return _SENTENCE.split(text.strip(), maxsplit=1)[0]
