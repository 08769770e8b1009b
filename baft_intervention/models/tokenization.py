"""Prompt and answer as token ids, with a boundary that does not move.

A model at inference sees ``tokenizer(prompt)`` and nothing else, so the edited position must be a position of
exactly these ids. ``tokenizer(prompt + " " + target)`` need not begin with them: many byte-pair encoders join
the last characters of the prompt with the first of the answer. The two parts are therefore kept apart and
concatenated as *ids*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RequestError

IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out


def joint_text(prompt: str, target: str) -> str:
    """Prompt and answer with one space between them, unless either brings its own white space."""
    glue = "" if not prompt or prompt[-1].isspace() or target[:1].isspace() else " "
    return prompt + glue + target


def check_text(text: str, what: str) -> None:
    """Refuse what is no Unicode text: half a surrogate pair, which JSON can hold and no tokenizer reads.

    Raises:
        RequestError: the text cannot be written as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} {text!r} is no Unicode text: character {error.start} is half a surrogate pair; mend it there"
        ) from None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that the model sees for ``prompt``, special tokens as the tokenizer adds them.

    Raises:
        RequestError: the tokenizer makes no token of the prompt, or it is no Unicode text.
    """
    check_text(prompt, "the prompt")
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise RequestError(f"the tokenizer makes no token of the prompt {prompt!r}; give a longer prompt")
    return ids


def encode_pair(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """``(prompt_ids, target_ids)``, where ``prompt_ids == encode_prompt(prompt)`` always.

    The natural joint tokenisation is taken where it begins with the prompt's ids. Where a byte-pair join
    breaks that, the answer is tokenised behind a short anchor text instead, as it would stand inside a
    sentence. A leading space token (``" 2006"`` is ``Ġ 2 0 0 6`` for many tokenizers) stays: the model must
    write it. Metrics leave such tokens out of the count, see ``evaluation/metrics.py``.

    Raises:
        RequestError: the tokenizer makes no token of the prompt or of the target.
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
            f"the tokenizer makes no token of the target {target!r} after {prompt!r}; give a non-empty target"
        )
    return prompt_ids, target_ids


def _continuation(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """What follows ``prefix`` in ``ids``; empty where ``ids`` does not begin with it."""
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
    """The padding id to use: the tokenizer's, else its end-of-sequence, else 0 (masked out in any case)."""
    for value in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            return int(value)
    return 0
