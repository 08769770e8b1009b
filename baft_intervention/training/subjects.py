"""The subject of a request: checked against its prompt, or proposed from it."""

from __future__ import annotations

import dataclasses
import difflib
import re

from ..errors import RequestError
from ..requests import EditRequest
from ..runtime.subject_index import surface_forms

_WORD = r"[^\W\d_a-z][\w'’&-]*(?:\.(?=\w)[\w'’&-]*)*"
_NAME = re.compile(rf"{_WORD}(?:\.? (?:(?:van|von|de|da|di|del|der|la|le|al|bin) )*{_WORD}| \d[\w'’.-]*)*")
# capitalised at the start of a sentence, and no name
_NO_NAME = frozenset(
    {"a", "an", "and", "are", "at", "by", "can", "did", "do", "does", "for", "from", "give", "had", "has", "have",
     "her", "his", "how", "i", "in", "is", "it", "its", "list", "my", "name", "of", "on", "one", "our", "q",
     "question", "say", "tell", "that", "the", "their", "these", "this", "those", "to", "under", "was", "we", "were",
     "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "you", "your"}
)  # fmt: skip


def with_subject(request: EditRequest) -> EditRequest:
    """The request with its subject as its prompt writes it; where none is given, with the longest name of the prompt.

    The case does not matter, nor an article or a parenthesis that the prompt leaves out. Without any name the request stays
    without a subject.

    Raises:
        RequestError: the subject is not in the prompt; the message proposes one that is.
    """
    text = " ".join([*(message.content for message in request.messages)]) or request.prompt
    if not request.subject:
        found = max(names_in(text), key=len, default=None)
        return request if found is None else dataclasses.replace(request, subject=found)
    for form in surface_forms(request.subject.strip()):
        pattern = rf"(?<!\w){re.escape(form)}(?!\w)"
        if found := re.search(pattern, text) or re.search(pattern, text, re.IGNORECASE):
            return dataclasses.replace(request, subject=found[0])
    names = names_in(text)
    near = difflib.get_close_matches(request.subject, names, 1, 0.5) or sorted(names, key=len)[-1:]
    hint = f"did you mean {near[0]!r}?" if near else "give the words that name it there, or leave subject out"
    raise RequestError(f"{request.where}: the subject {request.subject!r} is not in the prompt; {hint}")


def names_in(text: str) -> list[str]:
    """Runs of capitalised words, without those that only begin a sentence: "What is the capital of Japan?" has "Japan"."""
    found = []
    for match in _NAME.finditer(text):
        words = match[0].removesuffix("'s").removesuffix("’s").split(" ")
        while words and words[0].lower() in _NO_NAME:
            words = words[1:]
        if words:
            found.append(" ".join(words))
    return found
