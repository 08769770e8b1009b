"""Text generation with an edited model, from prompts or conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import RequestError
from ..models.chat import is_conversation, render_chat
from ..models.structure import compute_device, context_length
from ..models.tokenization import encode_prompt, pad_rows, pad_token_id
from .adapter import BaftAdapter

Prompts = str | Sequence[str | Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]]


@torch.no_grad()
def generate_texts(
    adapter: BaftAdapter, prompts: Prompts, *, max_new_tokens: int, batch_size: int, **options: Any
) -> Any:
    """The model's continuation of each prompt, with the adapter's edits active; see :meth:`BaftEditor.generate`.

    Raises:
        RequestError: a prompt has no tokens or is too long for the model.
    """
    model: Any = adapter.model
    tokenizer = adapter.tokenizer
    single = isinstance(prompts, str) or is_conversation(prompts)
    items: list[Any] = [prompts] if single else list(prompts)
    texts = [item if isinstance(item, str) else render_chat(tokenizer, item) for item in items]
    options = {"do_sample": False, **options}
    if not options["do_sample"]:  # a model's own sampling settings only cause warnings in greedy search
        options = {"temperature": None, "top_p": None, "top_k": None, **options}
    several = options.get("num_return_sequences") or 1
    answers: list[Any] = []
    device, context = compute_device(model), context_length(model)
    for begin in range(0, len(texts), batch_size):
        rows = [encode_prompt(tokenizer, text) for text in texts[begin : begin + batch_size]]
        if context and (longest := max(map(len, rows))) + max_new_tokens > context:
            raise RequestError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones, but the model reads {context}; shorten the "
                "prompt, or lower max_new_tokens"
            )
        ids, mask = pad_rows(rows, pad_token_id(tokenizer), side="left")
        with adapter.prompts([len(row) for row in rows]):
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id(tokenizer), **options,
            )  # fmt: skip
        sequences = getattr(out, "sequences", out)
        decoded = tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
        if several > 1:
            answers += [decoded[i : i + several] for i in range(0, len(decoded), several)]
        else:
            answers += decoded
    return answers[0] if single else answers
