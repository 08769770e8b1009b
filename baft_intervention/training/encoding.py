"""From a request to the token ids that training reads."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..config import BaftConfig
from ..core.positions import prompt_positions
from ..errors import RequestError
from ..models.chat import chat_marks, render_chat, render_request
from ..models.tokenization import IGNORE_INDEX, encode_pair
from ..requests import EditRequest, Message
from .subjects import with_subject
from .types import EncodedRequest, TrainingRow

_COPULA_FIRST = re.compile(r"(?:what|who|which) (is|are|was|were) (.+?)\s*\?", re.IGNORECASE)
_COPULA_LAST = re.compile(r"(.+) (is|are|was|were)")


def encode_requests(tokenizer: Any, requests: Sequence[EditRequest], config: BaftConfig) -> list[EncodedRequest]:
    """Render each request with the chat template, where it is a conversation, and encode it.

    For a gate that reads tokens, the subject is checked or proposed, see :func:`~.subjects.with_subject`.

    Raises:
        RequestError, PositionError: see :func:`encode_request` and :func:`~.subjects.with_subject`.
    """
    rendered = [render_request(tokenizer, request) for request in requests]
    if config.reads_tokens:
        rendered = [with_subject(request) for request in rendered]
    return [EncodedRequest(request, encode_request(tokenizer, request, config)) for request in rendered]


def encode_request(tokenizer: Any, request: EditRequest, config: BaftConfig) -> TrainingRow:
    """The ids, labels and edited columns of a rendered request.

    A gate that reads tokens lets the edit act where the answer begins and on the answer's own tokens; in a conversation the end
    of the turn is trained behind it. Otherwise the position rule says where, and the settings what follows.

    Raises:
        RequestError: the tokenizer makes no token of the target.
        PositionError: the position rule finds no token. Both messages begin with the request's source.
    """
    try:
        prompt_ids, target_ids = encode_pair(tokenizer, request.prompt, request.target_new)
        ending = ending_ids(tokenizer, request, target_ids, config)
        n, total = len(prompt_ids), len(target_ids) + len(ending)
        if config.reads_tokens:
            positions = list(range(n - 1, n - 1 + total))
        else:
            positions = prompt_positions(config.rule, tokenizer, request.prompt, prompt_ids, request.subject, total)
    except ValueError as error:
        raise type(error)(f"{request.where}: {error}") from None
    labels = [IGNORE_INDEX] * n + [*target_ids, *ending]
    return TrainingRow([*prompt_ids, *target_ids, *ending], labels, positions, len(ending), config.ending_coefficient)


def ending_ids(tokenizer: Any, request: EditRequest, target_ids: Sequence[int], config: BaftConfig) -> list[int]:
    """The ids that end the target: the end of the turn in a conversation, else those of the settings.

    The settings' text is left out where the target ends in punctuation, or where it would change the target's last token.
    """
    if config.reads_tokens and request.messages:
        end = chat_marks(tokenizer)[1]
        return [] if end is None else [end]
    if config.append_eos and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if not config.ending or unicodedata.category(request.target_new.rstrip()[-1]).startswith("P"):
        return []
    _, ids = encode_pair(tokenizer, request.prompt, request.target_new.rstrip() + config.ending)
    return ids[len(target_ids) :] if ids[: len(target_ids)] == list(target_ids) else []


def other_forms(tokenizer: Any, request: EditRequest) -> list[EditRequest]:
    """The same request as people put it elsewhere: as a question, as an unfinished statement, and in chat.

    A tokenizer without a chat template has no chat.
    """
    said = request.question.strip()
    asks = said.endswith("?")
    question = said if asks else as_question(said)
    texts = [as_statement(said) if asks else question]
    if request.messages:
        texts.append(said)
    forms = [dataclasses.replace(request, prompt=text, messages=(), chat_template="") for text in texts]
    if not request.messages:
        messages = (Message("user", question),)
        with contextlib.suppress(RequestError):
            forms.append(dataclasses.replace(request, prompt=render_chat(tokenizer, messages), messages=messages))
    return forms


def as_statement(question: str) -> str:
    """An unfinished statement that the question's answer completes.

    "What is the capital of Japan?" becomes "The capital of Japan is"; a question of another build is followed by "The answer is".
    """
    if found := _COPULA_FIRST.fullmatch(question):
        verb, rest = found.groups()
        return f"{rest[:1].upper()}{rest[1:]} {verb.lower()}"
    return f"{question} The answer is"


def as_question(statement: str) -> str:
    """A question whose answer completes the unfinished statement.

    "The capital of Japan is" becomes "What is the capital of Japan?", "Leo was born in" becomes "Leo was born in what?".
    """
    if found := _COPULA_LAST.fullmatch(statement):
        rest, verb = found.groups()
        article = rest.partition(" ")[0] in ("The", "A", "An")
        return f"What {verb} {rest[:1].lower() if article else rest[:1]}{rest[1:]}?"
    return f"{statement.rstrip(' :')} what?"
