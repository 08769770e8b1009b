"""Conversations as prompts: rendering messages with a model's own chat template.

An instruction-tuned model has seen conversations in one fixed format, its tokenizer's chat template. An edit of such a model
should act where users ask their question, at the end of that format. This module renders messages as a *plain text* whose
token ids are exactly those of the template. The rest of the code (positions, padding, training, generation) therefore needs
no special case for chats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..requests import EditRequest, Message, read_messages


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is one conversation, that is a list of messages rather than a text or a list of prompts."""
    if isinstance(prompt, (str, bytes, Mapping)) or not isinstance(prompt, Sequence):
        return False
    return bool(prompt) and all(isinstance(item, (Message, Mapping)) for item in prompt)


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's default chat template, as Jinja source.

    Raises:
        RequestError: the tokenizer has no template.
    """
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        raise RequestError(
            "the tokenizer has no chat template, so a prompt cannot be a list of messages; set tokenizer.chat_template, or give "
            "the prompt as text"
        ) from None


def render_chat(
    tokenizer: Any, messages: Sequence[Message | Mapping[str, str]], template: str | None = None, *, source: str = ""
) -> str:
    """Render a conversation as a text that the model continues with its answer.

    ``tokenizer(text)`` gives the same ids as the chat template itself.

    Args:
        tokenizer: tokenizer of the model.
        messages: the conversation so far; the last message is not the assistant's.
        template: Jinja source of the template; by default the tokenizer's own.
        source: prefix of error messages.

    Raises:
        RequestError: the messages are not a conversation, there is no template, the template rejects the messages, or the
            tokenizer adds special tokens to the rendered text.
    """
    turns = [message.to_dict() for message in read_messages(messages, source)]
    template = template or chat_template(tokenizer)
    try:
        text = str(
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # a template is foreign code and may raise anything
        raise RequestError(f"{source}the chat template rejects these messages: {error}") from None
    wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token", None)
    if list(tokenizer(text)["input_ids"]) != wanted and bos and text.startswith(bos):
        text = text[len(bos) :]  # the tokenizer adds it
    if not wanted or list(tokenizer(text)["input_ids"]) != wanted:
        raise RequestError(
            f"{source}the tokenizer adds special tokens to the rendered conversation {text[:60]!r}, which already contains "
            "them; load the tokenizer with add_bos_token=False and add_eos_token=False"
        )
    return text


def render_request(tokenizer: Any, request: EditRequest) -> EditRequest:
    """Return the request with its conversation rendered as ``prompt`` and the template recorded.

    A request without messages is returned unchanged.

    Raises:
        RequestError: see :func:`render_chat`; the message begins with the request's origin.
    """
    if not request.messages:
        return request
    source = f"{request.where}: "
    try:
        template = request.chat_template or chat_template(tokenizer)
    except RequestError as error:
        raise RequestError(f"{source}{error}") from None
    text = render_chat(tokenizer, request.messages, template, source=source)
    return dataclasses.replace(request, prompt=text, chat_template=template)


def chat_marks(tokenizer: Any) -> tuple[list[int], int | None]:
    """``(header, end)``: the ids between a user's message and the answer, and the id that ends the answer.

    Both are read off the template's own text. The header is empty and the end None without a template.
    """
    try:
        mark = "¤"
        asked = render_chat(tokenizer, [Message("user", mark)])
        whole = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}], tokenize=False
            )
        )
    except Exception:  # a template is foreign code and may raise anything
        return [], None
    header = asked.rpartition(mark)[2]
    behind = tokenizer(whole.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    end = next((i for i in behind[:1] if i in special), tokenizer.eos_token_id)
    return list(tokenizer(header, add_special_tokens=False)["input_ids"]), end
