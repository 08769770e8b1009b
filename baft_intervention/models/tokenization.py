"""Tokenisation of prompt and answer with a fixed boundary between them.

At inference a model sees exactly ``tokenizer(prompt)``, so the edited position must be a position in these ids.
``tokenizer(prompt + " " + target)`` may begin with other ids: many byte-pair encoders merge the last characters of the
prompt with the first ones of the answer. This module therefore encodes the two parts apart and concatenates their *ids*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RequestError

IGNORE_INDEX = -100  # the label that torch's cross entropy ignores


def joint_text(prompt: str, target: str) -> str:
    """Prompt and answer, joined by one space unless either already has white space there."""
    glue = "" if not prompt or prompt[-1].isspace() or target[:1].isspace() else " "
    return prompt + glue + target


def check_text(text: str, what: str) -> None:
    """Check that a text is valid Unicode. JSON can hold half a surrogate pair, but no tokenizer can read it.

    Args:
        text: the text.
        what: name of the text in the error message.

    Raises:
        RequestError: the text cannot be written as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} {text!r} is not valid Unicode: character {error.start} is half a surrogate pair; correct it in the input"
        ) from None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that the model sees for ``prompt``, with the special tokens that the tokenizer adds.

    Raises:
        RequestError: the tokenizer gives no tokens for the prompt, or the prompt is not valid Unicode.
    """
    check_text(prompt, "the prompt")
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise RequestError(f"the tokenizer gives no tokens for the prompt {prompt!r}; give a longer prompt")
    return ids


def encode_pair(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """``(prompt_ids, target_ids)``, always with ``prompt_ids == encode_prompt(prompt)``.

    If the joint tokenisation begins with the prompt's ids, the rest of it is the target's ids. If a byte-pair merge changes
    the prompt's ids, the target is tokenised after a short anchor text instead, as in the middle of a sentence. A leading
    space token is kept (``" 2006"`` is ``Ġ 2 0 0 6`` for many tokenizers), because the model must generate it. Metrics do not
    count such tokens; see ``evaluation/metrics.py``.

    Raises:
        RequestError: the tokenizer gives no tokens for the prompt or the target, or one of them is not valid Unicode.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    check_text(target, "the target")
    text = joint_text(prompt, target)
    target_ids = _continuation(tokenizer(text)["input_ids"], prompt_ids)
    if not target_ids:
        answer = text[len(prompt) :]
        for anchor in ("a", ":", ""):
            anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
            target_ids = _continuation(tokenizer(anchor + answer, add_special_tokens=False)["input_ids"], anchor_ids)
            if target_ids:
                break
    if not target_ids or not tokenizer.decode(target_ids).strip():
        raise RequestError(
            f"the tokenizer gives no tokens for the target {target!r} after {prompt!r}; give a non-empty target"
        )
    return prompt_ids, target_ids


def answer_spellings(tokenizer: Any, target: str) -> list[tuple[int, ...]]:
    """The ids of an answer behind a word, and behind white space or a chat template's header."""
    spaced = encode_pair(tokenizer, "a", target)[1]
    bare = encode_pair(tokenizer, "a\n", target.lstrip())[1]
    return list(dict.fromkeys((tuple(spaced), tuple(bare))))


def _continuation(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """The ids after ``prefix``; empty if ``ids`` does not begin with it."""
    return list(ids[len(prefix) :]) if list(ids[: len(prefix)]) == list(prefix) else []


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "right", width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged id rows as ``(input_ids, attention_mask)``, both ``(B, T)`` int64, padded on ``side``; T at least ``width``."""
    width = max([width or 0, *(len(row) for row in rows)])
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(list(row), dtype=torch.long)
        mask[i, place] = 1
    return ids, mask


def pad_token_id(tokenizer: Any, model: Any = None) -> int:
    """The padding id: the tokenizer's own, else its end-of-sequence id, else 0. Padding is always masked out."""
    for value in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            return int(value)
    return 0
