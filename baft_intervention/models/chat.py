"""Conversations as prompts: messages put into a model's own chat template.

An instruction-tuned model has seen conversations in one fixed form, its tokenizer's chat template. An edit of such a model
should sit where its users ask, at the end of that form. Here messages become a *plain text* whose tokenisation is exactly
that of the template, so that all that follows (positions, padding, training, generation) needs to know nothing of chats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..requests import EditRequest, Message, read_messages


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is one conversation: a list of messages, not a text and not a list of prompts."""
    if isinstance(prompt, (str, bytes, Mapping)) or not isinstance(prompt, Sequence):
        return False
    return bool(prompt) and all(isinstance(item, (Message, Mapping)) for item in prompt)


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's default chat template, as Jinja source.

    Raises:
        RequestError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        raise RequestError(
            "the tokenizer has no chat template, so messages cannot be a prompt; set tokenizer.chat_template, or give the "
            "prompt as text"
        ) from None


def render_chat(
    tokenizer: Any, messages: Sequence[Message | Mapping[str, str]], template: str | None = None, *, where: str = ""
) -> str:
    """The text after which the model writes its answer; ``tokenizer(text)`` gives the template's own ids.

    Args:
        tokenizer: of the model.
        messages: the conversation so far; the last turn is not the assistant's.
        template: Jinja source; the tokenizer's own where left out.
        where: begins an error message.

    Raises:
        RequestError: messages that are no conversation, no template, one that refuses these messages, or a tokenizer that
            puts tokens of its own around the rendered text.
    """
    turns = [message.to_dict() for message in read_messages(messages, where)]
    source = template or chat_template(tokenizer)
    try:
        text = str(
            tokenizer.apply_chat_template(turns, chat_template=source, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # a template is foreign code: it raises what it likes
        raise RequestError(f"{where}the chat template does not take these messages: {error}") from None
    wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token", None)
    if list(tokenizer(text)["input_ids"]) != wanted and bos and text.startswith(bos):
        text = text[len(bos) :]  # the tokenizer puts it there itself
    if not wanted or list(tokenizer(text)["input_ids"]) != wanted:
        raise RequestError(
            f"{where}the tokenizer adds special tokens to the rendered conversation {text[:60]!r}, which has its own; load it "
            "with add_bos_token=False and add_eos_token=False"
        )
    return text


def render_request(tokenizer: Any, request: EditRequest) -> EditRequest:
    """A request whose ``prompt`` is a text: itself, or its conversation rendered and the template recorded.

    Raises:
        RequestError: see :func:`render_chat`; the message begins with where the request stood.
    """
    if not request.messages:
        return request
    where = f"{request.where}: "
    try:
        source = request.chat_template or chat_template(tokenizer)
    except RequestError as error:
        raise RequestError(f"{where}{error}") from None
    text = render_chat(tokenizer, request.messages, source, where=where)
    return dataclasses.replace(request, prompt=text, chat_template=source)


def around_question(request: EditRequest) -> tuple[str, str]:
    """What stands before and behind the last message's text in a rendered prompt; two empty texts for a plain one."""
    if not request.chat_template:
        return "", ""
    before, found, behind = request.prompt.rpartition(request.messages[-1].content.strip())
    return (before, behind) if found else ("", "")
