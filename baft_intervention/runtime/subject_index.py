"""Finding the edits' subjects in token ids, in a few look-ups a token however many edits there are."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_ARTICLE = re.compile(r"(?i:the|a|an)\s+(?=\S)")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)\s*$")
_SPACE_MARKS = "Ġ▁"  # a leading space, in byte-level and in SentencePiece vocabularies


def surface_forms(subject: str) -> list[str]:
    """The ways a text may write the name: in another case, without its article, a parenthesis at its end, or diacritics."""
    bare = _PARENTHESIS.sub("", subject).strip() or subject
    bare = _ARTICLE.sub("", bare, count=1) if _ARTICLE.match(bare) else bare
    forms = [subject, bare]
    plain = "".join(c for c in unicodedata.normalize("NFKD", bare) if not unicodedata.combining(c))
    forms.append(plain)
    if len(bare) > 3:  # "US" is no "us", and "May" no "may"
        forms += [bare.lower(), plain.lower(), bare.upper(), bare[0].upper() + bare[1:]]
        if bare == bare.lower() or bare == bare.upper():
            forms.append(bare.title())
    return list(dict.fromkeys(forms))


class SubjectIndex:
    """Which edits' subjects end at a token.

    A name is a sequence of ids with a word's boundary at both ends. The boundary behind it shows one token later; a name that
    goes on there ("Micro" in "Microsoft") is taken back at that token.

    Args:
        tokenizer: gives the ids, with and without a space before the name, and tells which tokens begin inside a word.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._names: dict[
            int, dict[int, dict[tuple[int, ...], dict[str, int]]]
        ] = {}  # last id -> length -> name -> edits

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, edit: str, subjects: Iterable[str]) -> None:
        """Let the edit be found under these names."""
        for ids in self._sequences(subjects):
            edits = self._names.setdefault(ids[-1], {}).setdefault(len(ids), {}).setdefault(ids, {})
            edits[edit] = edits.get(edit, 0) + 1

    def remove(self, edit: str, subjects: Iterable[str]) -> None:
        """Undo :meth:`add` with the same arguments."""
        for ids in self._sequences(subjects):
            by_length = self._names[ids[-1]]
            edits = by_length[len(ids)][ids]
            edits[edit] -= 1
            if not edits[edit]:
                del edits[edit]
            if not edits:
                del by_length[len(ids)][ids]
            if not by_length[len(ids)]:
                del by_length[len(ids)]
            if not by_length:
                del self._names[ids[-1]]

    def _sequences(self, subjects: Iterable[str]) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for subject in subjects:
            for form in surface_forms(subject):
                for text in (form, " " + form):
                    if ids := tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]):
                        found[ids] = None
        return list(found)

    def mentions(self, ids: Sequence[int], begin: int = 0) -> list[tuple[int, int, str]]:
        """``(first, last, edit)`` of each name that ends in ``ids[begin:]``, in the order of the last tokens.

        What the tokens behind it say is not looked at: a name that the next one :meth:`continues` is for the caller to take back.
        """
        found = []
        for last in range(begin, len(ids)):
            for length, names in self._names.get(ids[last], {}).items():
                first = last - length + 1
                edits = names.get(tuple(ids[first : last + 1])) if first >= 0 else None
                if edits and not (first and self.continues(ids[first]) and self.ends_in_word(ids[first - 1])):
                    found += [(first, last, edit) for edit in edits]
        return found

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  an index lives as long as its adapter
    def _ends(self, token: int) -> tuple[bool, bool]:
        """Whether the token begins inside a word, and whether it ends with a letter or a digit."""
        piece = str(self._tokenizer.convert_ids_to_tokens(int(token)) or "")
        text = self._tokenizer.decode([int(token)])
        return piece[:1] not in _SPACE_MARKS and text[:1].isalnum(), text[-1:].isalnum()

    def continues(self, token: int) -> bool:
        """Whether the token goes on with the word before it."""
        return self._ends(token)[0]

    def ends_in_word(self, token: int) -> bool:
        return self._ends(token)[1]
