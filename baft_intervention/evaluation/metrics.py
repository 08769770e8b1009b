"""Metrics of knowledge editing as pure functions of numbers and texts.

* *token accuracy* (teacher-forced): :func:`token_accuracy`, :func:`token_accuracy_easyedit`, :func:`all_tokens_right`;
* *free generation*: :func:`exact_match`, :func:`answer_f1`, :func:`begins_with_answer`, :func:`multi_hop_accuracy`;
* *probability success* (ROME): :func:`probability_success`, :func:`probability_magnitude`;
* *locality*: :func:`token_match` (share of argmax tokens that did not change), :func:`kl_divergence` (nats);
* *text quality*: :func:`ngram_entropy` (bits), :func:`perplexity`;
* *ConvSent*: :func:`convsent_score`.

``None`` means *no value*, e.g. the mean of an empty group; means leave it out. Sources: EasyEdit
``easyeditor/evaluate/evaluate_utils.py``; ROME ``experiments/py``; MEND/SERAC ``losses.py``; SQuAD v1.1's evaluation script.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"\w+|[^\w\s]")


def mean(values: Iterable[float | bool | None]) -> float | None:
    """Arithmetic mean of the values that are not None; None if there are none.

    Raises:
        ValueError: a value is NaN; a metric that could not be computed must be None.
    """
    present = [float(v) for v in values if v is not None]
    if any(math.isnan(v) for v in present):
        raise ValueError("a value is nan; a metric without a value must be None")
    return math.fsum(present) / len(present) if present else None


# --- token accuracy, teacher-forced -----------------------------------------------------------------------------


def token_accuracy(predicted: Sequence[int], target: Sequence[int], lead: int = 0) -> float | None:
    """Share of the target's tokens that are the model's argmax, without leading white-space tokens.

    ``mean_{j >= lead} [predicted_j == target_j]``, where ``predicted_j`` is the argmax after the prompt and
    the *target's* first ``j`` tokens. Many tokenizers encode the answer ``" 2006"`` as ``Ġ 2 0 0 6``; a lone ``Ġ`` follows
    almost any prompt, so predicting it should not count.

    Args:
        predicted: argmax ids, one per target token.
        target: the target's ids.
        lead: number of leading white-space tokens, see :func:`lead_tokens`.
    """
    _same_length(predicted, target)
    return mean(p == t for p, t in zip(predicted[lead:], target[lead:], strict=True))


def token_accuracy_easyedit(predicted: Sequence[int], target: Sequence[int]) -> float | None:
    """Token accuracy including leading white-space tokens, as EasyEdit's ``test_prediction_acc``."""
    return token_accuracy(predicted, target, 0)


def all_tokens_right(predicted: Sequence[int], target: Sequence[int], lead: int = 0) -> float | None:
    """1 if every counted target token is the argmax, else 0."""
    accuracy = token_accuracy(predicted, target, lead)
    return None if accuracy is None else float(accuracy == 1.0)


def lead_tokens(texts: Sequence[str]) -> int:
    """Number of tokens at the beginning of an answer that are white space only; never all of them.

    Args:
        texts: the answer's tokens, each decoded alone.
    """
    count = 0
    while count < len(texts) - 1 and not texts[count].strip():
        count += 1
    return count


# --- locality -----------------------------------------------------------------------------------------------------


def token_match(before: Sequence[int], after: Sequence[int], lead: int = 0) -> float | None:
    """Locality: share of positions at which the edited model's argmax is the unedited model's.

    The positions are those of the data set's answer, which sets their number and context but not what is right. With
    ``lead=0`` this is EasyEdit's locality.
    """
    return token_accuracy(after, before, lead)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``KL(p || q) = sum_v p_v (log p_v - log q_v)`` in nats, over the last dimension.

    Args:
        log_p: log-probabilities of the unedited model, ``(..., V)``.
        log_q: log-probabilities of the edited model, ``(..., V)``.

    Returns:
        ``(...)``, not below 0 (rounding is clipped).
    """
    terms = log_p.exp() * (log_p - log_q)
    return torch.nan_to_num(terms, nan=0.0).sum(-1).clamp_min(0.0)  # 0 * (-inf + inf) is 0 here


# --- probability success (ROME) ---------------------------------------------------------------------------------------


def probability_success(wanted: float, others: Sequence[float]) -> float | None:
    """1 if the wanted answer is more likely than every other, else 0.

    Args:
        wanted: mean log-probability per token of the answer that should win (ROME divides by the length).
        others: the same of the answers that should lose; without any, there is no value.
    """
    return float(wanted > max(others)) if others else None


def probability_magnitude(wanted: float, others: Sequence[float]) -> float | None:
    """ROME's magnitude ``exp(wanted) - exp(max others)``, from mean log-probabilities per token; in [-1, 1]."""
    return math.exp(wanted) - math.exp(max(others)) if others else None


# --- free generation ----------------------------------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no English article, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(generated: str, answers: Sequence[str]) -> float | None:
    """1 if the whole generated text (already cut at end of sequence) is one of the answers, normalised."""
    if not answers:
        return None
    text = normalise_answer(generated)
    return float(any(text == normalise_answer(a) for a in answers))


def begins_with_answer(generated: str, answers: Sequence[str]) -> float | None:
    """1 if the generated text *begins* with one of the answers, word by word, normalised.

    Looser than :func:`exact_match`: the model need not stop after the answer, which edits trained without an
    end-of-sequence token do not teach it.
    """
    if not answers:
        return None
    words = normalise_answer(generated).split()
    wanted = [normalise_answer(a).split() for a in answers]
    return float(any(w and words[: len(w)] == w for w in wanted))


def answer_f1(generated: str, answers: Sequence[str]) -> float | None:
    """Highest F1 of word overlap (bags of normalised words) with any of the answers, as SQuAD's."""
    return (
        max(_f1(normalise_answer(generated).split(), normalise_answer(a).split()) for a in answers) if answers else None
    )


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def multi_hop_accuracy(right: Sequence[float | bool | None]) -> float | None:
    """MQuAKE's accuracy of a case: 1 if *any* wording of its multi-hop question is answered right."""
    present = [bool(r) for r in right if r is not None]
    return float(any(present)) if present else None


# --- text quality ---------------------------------------------------------------------------------------------------


def ngram_entropy(text: str, weights: Sequence[tuple[int, float]] = ((2, 2 / 3), (3, 4 / 3))) -> float | None:
    """ROME's fluency: weighted mean of the entropies of the text's 2-gram and 3-gram frequencies, in bits.

    ``(1/2) [ (2/3) H_2 + (4/3) H_3 ]`` with ``H_n = -sum_g f_g log2 f_g``. Words are runs of letters and
    digits, and single punctuation marks (ROME uses nltk's tokenizer, which differs only at contractions). The maximum for
    ``m`` words grows like ``log2 m``, so compare only texts of equal length.

    Returns:
        ``None`` for a text with fewer words than the longest n-gram.
    """
    words = _WORDS.findall(text)
    if len(words) < max(n for n, _ in weights):
        return None
    total = 0.0
    for n, weight in weights:
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        size = sum(counts.values())
        total += weight * -math.fsum(c / size * math.log2(c / size) for c in counts.values())
    return total / len(weights)


def perplexity(log_probs: Sequence[float]) -> float | None:
    """``exp(-mean log p)`` over the tokens of a text (natural logarithms), at most 1e30."""
    average = mean(log_probs)
    return None if average is None else math.exp(min(-average, math.log(1e30)))


# --- ConvSent (SERAC) -----------------------------------------------------------------------------------------------


def convsent_score(
    desired_after: Sequence[float], opposite_after: Sequence[float], desired_before: Sequence[float]
) -> float | None:
    """``sigmoid(mean D' - mean O') * min(1, exp(mean D' - mean D))`` from log-probabilities per token.

    ``D'`` and ``O'`` belong to the desired and the opposite replies under the edited model, ``D`` to the desired
    replies under the unedited model; means over all tokens of all replies (MEND's ``es_sent``). The first
    factor measures the sentiment; the second drops if replies on the topic become less likely than before.
    """
    if not desired_after or not opposite_after or not desired_before:
        return None
    d_after, o_after, d_before = (float(mean(x) or 0.0) for x in (desired_after, opposite_after, desired_before))
    gap = d_after - o_after
    sentiment = 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))
    return sentiment * math.exp(min(0.0, d_after - d_before))


def _same_length(a: Sequence[object], b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predicted tokens for {len(b)} target tokens; give one prediction per target token")
