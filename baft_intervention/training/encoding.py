"""From a request to the token ids that training reads."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from ..config import BaftConfig
from ..core.positions import prompt_positions
from ..models.chat import render_request
from ..models.tokenization import IGNORE_INDEX, encode_pair
from ..requests import EditRequest
from .types import EncodedRequest, TrainingRow


def encode_requests(tokenizer: Any, requests: Sequence[EditRequest], config: BaftConfig) -> list[EncodedRequest]:
    """Render each request with the chat template, where it is a conversation, and encode it.

    Raises:
        RequestError, PositionError: see :func:`encode_request`.
    """
    rendered = [render_request(tokenizer, request) for request in requests]
    return [EncodedRequest(request, encode_request(tokenizer, request, config)) for request in rendered]


def encode_request(tokenizer: Any, request: EditRequest, config: BaftConfig) -> TrainingRow:
    """The ids, labels and edited columns of a rendered request.

    Raises:
        RequestError: the tokenizer makes no token of the target.
        PositionError: the position rule finds no token. Both messages begin with the request's source.
    """
    try:
        prompt_ids, target_ids = encode_pair(tokenizer, request.prompt, request.target_new)
        ending = ending_ids(tokenizer, request, target_ids, config)
        target_ids = [*target_ids, *ending]
        positions = prompt_positions(
            config.rule, tokenizer, request.prompt, prompt_ids, request.subject, len(target_ids)
        )
    except ValueError as error:
        raise type(error)(f"{request.where}: {error}") from None
    labels = [IGNORE_INDEX] * len(prompt_ids) + target_ids
    return TrainingRow(prompt_ids + target_ids, labels, positions, len(ending), config.ending_coefficient)


def ending_ids(tokenizer: Any, request: EditRequest, target_ids: Sequence[int], config: BaftConfig) -> list[int]:
    """The ids that end the target: none where it ends in punctuation, or where they would change its last token."""
    if config.append_eos and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if not config.ending or unicodedata.category(request.target_new.rstrip()[-1]).startswith("P"):
        return []
    _, ids = encode_pair(tokenizer, request.prompt, request.target_new.rstrip() + config.ending)
    return ids[len(target_ids) :] if ids[: len(target_ids)] == list(target_ids) else []
