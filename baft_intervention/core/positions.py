"""Which tokens are edited.

===============  =====================================================================================
rule             edited tokens
===============  =====================================================================================
``last``         the last token of the prompt (the default)
``subject``      the last token of the subject
``subject_all``  every token of the subject
``prompt``       every token of the prompt
``all``          every token of prompt and answer, generated ones included
``f3+l2``        the first three and the last two tokens of the prompt (``f3`` or ``l2`` alone too)
===============  =====================================================================================

A rule of your own is one function and one line::

    @register_positions("second")
    def second(index, length):
        return index == 1

In training a position is found from the character offsets of the prompt (:func:`prompt_positions`). At inference
there is a batch of ids, padded on either side, and perhaps a cache of earlier tokens: :meth:`PositionRule.mask` works in
absolute positions, so padding and caching change nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, PositionError
from ..models.tokenization import check_text
from ..registry import registrar

_NAMED = ("last", "subject", "subject_all", "prompt", "all")
_FIRST_LAST = re.compile(r"(?:f(?P<first>\d+))?\+?(?:l(?P<last>\d+))?")
_MOST = 10**6  # more tokens than any prompt has; a longer number is a slip

Chooser = Callable[[Tensor, Tensor], Tensor]
_REGISTRY: dict[str, Chooser] = {}


def register_positions(name: str) -> Callable[[Chooser], Chooser]:
    """Decorator: make a rule known as ``name`` to configs, adapters and the command line.

    The function gets ``index (B, T)``, each token's index in its prompt (negative before it, at least ``length`` after it),
    and ``length (B, 1)``, the number of tokens of each prompt. It returns ``(B, T)`` bool; tokens outside the prompt are
    ignored. It must not depend on T, because a prompt may come alone, padded, or in pieces.

    Args:
        name: letters, digits and ``_``, beginning with a letter; not used by another rule.

    Raises:
        ConfigError: the name is taken or not an identifier.
    """
    taken = name in _NAMED or name.startswith("subject") or _FIRST_LAST.fullmatch(name) is not None
    if not re.fullmatch(r"[a-z]\w*", name) or taken:
        raise ConfigError(f"{name!r} cannot name a position rule: it is no identifier, or taken; choose another name")

    return registrar(_REGISTRY, name, "position rule")


@dataclass(frozen=True)
class PositionRule:
    """A parsed rule. Build it with :meth:`parse`.

    Args:
        kind: one of ``last``, ``subject``, ``subject_all``, ``prompt``, ``all``, ``first_last``, or a registered name.
        first, last: counts of ``first_last``.
    """

    kind: str
    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> PositionRule:
        """Read a rule.

        Raises:
            PositionError: not a rule; the message lists the known ones.
        """
        if isinstance(text, str):
            if text in _NAMED or text in _REGISTRY:
                return cls(text)
            match = _FIRST_LAST.fullmatch(text)
            if match and (match["first"] or match["last"]) and ("+" in text) == bool(match["first"] and match["last"]):
                first, last = (
                    int(match[name] or 0) if len(match[name] or "") < 8 else _MOST for name in ("first", "last")
                )
                if 0 < first + last < _MOST:
                    return cls("first_last", first, last)
        known = ", ".join((*_NAMED, *sorted(_REGISTRY)))
        raise PositionError(f"positions is {text!r}; it must be one of {known}, or f<n>+l<n>, e.g. 'f3+l3'")

    def __str__(self) -> str:
        if self.kind != "first_last":
            return self.kind
        return "+".join(part for n, part in ((self.first, f"f{self.first}"), (self.last, f"l{self.last}")) if n)

    @property
    def needs_subject(self) -> bool:
        return self.kind.startswith("subject")

    def mask(self, starts: Tensor, lengths: Tensor, columns: Tensor, subjects: Tensor | None = None) -> Tensor:
        """Edited positions of a batch.

        Args:
            starts: ``(B,)`` absolute position of each prompt's first token (the amount of left padding).
            lengths: ``(B,)`` number of the prompt's tokens.
            columns: ``(T,)`` absolute position of each column: ``past + arange(T)``.
            subjects: ``(B, T)`` bool, tokens of a subject (see :class:`IdSequences`), for the subject rules.

        Returns:
            ``(B, T)`` bool.
        """
        relative = columns.unsqueeze(0) - starts.unsqueeze(1)  # (B, T)
        length = lengths.unsqueeze(1)
        inside = (relative >= 0) & (relative < length)
        if self.kind == "all":
            return relative >= 0
        if self.kind == "prompt":
            return inside
        if self.kind == "last":
            return relative == length - 1
        if self.kind == "first_last":
            return inside & ((relative < self.first) | (relative >= length - self.last))
        if self.kind in _REGISTRY:
            return inside & _REGISTRY[self.kind](relative, length)
        if subjects is None:
            return torch.zeros_like(inside)
        if self.kind == "subject":  # the last token of each run
            following = torch.cat([subjects[:, 1:], torch.zeros_like(subjects[:, :1])], dim=1)
            subjects = subjects & ~following
        return inside & subjects


def prompt_positions(
    rule: PositionRule,
    tokenizer: Any,
    prompt: str,
    prompt_ids: Sequence[int],
    subject: str | None = None,
    target_len: int = 0,
) -> list[int]:
    """Indices into ``prompt_ids`` (for ``all``: into prompt and target) that the rule edits; sorted, at least one.

    Raises:
        PositionError: a subject rule without a subject, with one that does not occur exactly once in the prompt, or with a
            tokenizer that gives no offsets.
    """
    n = len(prompt_ids)
    if rule.needs_subject:
        span = _subject_span(tokenizer, prompt, prompt_ids, subject)
        return [span[-1]] if rule.kind == "subject" else span
    total = n + target_len
    found = rule.mask(torch.tensor([0]), torch.tensor([n]), torch.arange(total))[0].nonzero().flatten().tolist()
    if not found:
        raise PositionError(f"the position rule {str(rule)!r} finds no token in the prompt {prompt!r} ({n} tokens)")
    return found


def _subject_span(tokenizer: Any, prompt: str, prompt_ids: Sequence[int], subject: str | None) -> list[int]:
    if not subject:
        raise PositionError(f"the prompt {prompt!r} has no subject, and the position rule needs one; give subject=")
    count = len(re.findall(f"(?={re.escape(subject)})", prompt))
    if count != 1:
        found = "does not occur" if count == 0 else f"occurs {count} times"
        raise PositionError(
            f"the subject {subject!r} {found} in the prompt {prompt!r}; "
            "write it exactly once, as it stands in the prompt, or use the positions 'last' or 'prompt'"
        )
    begin = prompt.index(subject)
    end = begin + len(subject)
    try:
        encoded = tokenizer(prompt, return_offsets_mapping=True)
    except NotImplementedError:
        raise PositionError(
            f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer (use_fast=True) or use "
            "the positions 'last' or 'prompt'"
        ) from None
    if list(encoded["input_ids"]) != list(prompt_ids):
        raise PositionError(f"the ids given are not those of the prompt {prompt!r}; encode it with encode_prompt")
    # a byte-level token may carry the space before the word in its span: overlap, not containment
    span = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin]
    if not span:
        raise PositionError(f"no token of the prompt {prompt!r} covers the subject {subject!r}")
    return span


def subject_variants(tokenizer: Any, subjects: Sequence[str]) -> list[list[int]]:
    """Token ids of the subjects at the start of a text and after a space."""
    variants = []
    for subject in dict.fromkeys(subjects):
        check_text(subject, "the subject")
        for text in (subject, " " + subject):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in variants:
                variants.append(ids)
    return variants


class IdSequences:
    """A set of token id sequences to find in texts, in a few look-ups a token however many there are.

    A sequence that was added twice is found until it is removed twice.
    """

    def __init__(self, sequences: Iterable[Sequence[int]] = ()):
        self._heads: dict[
            int, dict[int, Counter[tuple[int, ...]]]
        ] = {}  # first id -> length -> how often each is there
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: Sequence[int]) -> None:
        """Add ``sequence``, of at least one id."""
        self._heads.setdefault(sequence[0], {}).setdefault(len(sequence), Counter())[tuple(sequence)] += 1

    def remove(self, sequence: Sequence[int]) -> None:
        """Undo one :meth:`add` of the same sequence."""
        lengths = self._heads[sequence[0]]
        found = lengths[len(sequence)]
        found[tuple(sequence)] -= 1
        if not found[tuple(sequence)]:
            del found[tuple(sequence)]
        if not found:
            del lengths[len(sequence)]

    def mask(self, ids: Tensor) -> Tensor:
        """``(B, T)`` bool: tokens of ``ids (B, T)`` that belong to any of the sequences."""
        rows = ids.tolist()
        inside = [[False] * len(row) for row in rows]
        for row, marked in zip(rows, inside, strict=True):
            for begin, first in enumerate(row):
                for length, known in self._heads.get(first, {}).items():
                    if tuple(row[begin : begin + length]) in known:
                        marked[begin : begin + length] = [True] * length
        return torch.tensor(inside, dtype=torch.bool).reshape(ids.shape)


def pad_locations(locations: Sequence[int], width: int, filler: int) -> list[int]:
    """``locations`` filled up to ``width`` with ``filler``, which must be a padding column.

    pyvene takes one list of equal length a row. Repeating a location would give the same value and a wrong
    gradient, because a position that is written twice is differentiated twice.
    """
    return [*locations, *[filler] * (width - len(locations))]
