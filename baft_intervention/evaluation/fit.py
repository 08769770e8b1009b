"""The optimiser loop that the rival methods share, so that they differ only in what they train.

The loss is the mean over requests of the mean cross entropy over target tokens (EasyEdit's FT-M). Blocks below the first
trained one are computed once, and logits only at target positions; neither changes a gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import EditError
from ..models.tokenization import encode_pair, pad_rows, pad_token_id
from ..requests import EditRequest
from .forward import BlockInput, LogitReader, capture_block_input, resume_at

_CHUNK_TOKENS = 4096  # padded tokens in one forward pass; larger batches accumulate gradients


@dataclass(frozen=True)
class Fitting:
    """Settings of the loop.

    Args:
        learning_rate: learning rate of AdamW.
        steps: maximum number of steps.
        loss_target: stop when the loss (nats per token) is below; 0 never stops early.
        weight_decay: weight decay of AdamW.
        append_eos: also train the end-of-sequence token after the target.
        max_grad_norm: clip the gradient to this norm; 0 does not clip.
    """

    learning_rate: float
    steps: int
    loss_target: float = 0.02
    weight_decay: float = 0.0
    append_eos: bool = False
    max_grad_norm: float = 0.0


@dataclass
class TrainingBatch:
    """Right-padded rows of prompt and target, and the positions that predict target tokens.

    Args:
        ids, mask: ``(B, T)``.
        lengths: lengths of the prompts.
        rows, columns, targets, weights: ``(N,)``; the weights of a request's tokens sum to its share in the batch.
        start: input of the first block that each step computes.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    start: BlockInput | None = None


def training_batches(
    requests: Sequence[EditRequest],
    model: Any,
    tokenizer: Any,
    *,
    append_eos: bool = False,
    prompt_last: bool = False,
    rewrite: Callable[[str], str] = lambda prompt: prompt,
) -> list[TrainingBatch]:
    """Rows of the requests, in chunks of a few thousand padded tokens.

    Args:
        requests: the edits.
        model: the model, for its device.
        tokenizer: the model's tokenizer.
        append_eos: add the end-of-sequence token to each target.
        prompt_last: predict *all* target tokens from the last prompt token (FT-L's objective); the target is not input.
        rewrite: changes a prompt before it is encoded.
    """
    device = model.get_input_embeddings().weight.device
    pairs = []
    for request in requests:
        prompt, target = encode_pair(tokenizer, rewrite(request.prompt), request.target_new)
        if append_eos and tokenizer.eos_token_id is not None:
            target = [*target, tokenizer.eos_token_id]
        pairs.append((prompt, target))
    chunks: list[list[tuple[list[int], list[int]]]] = [[]]
    for pair in pairs:
        longest = max(len(p) + len(t) for p, t in [*chunks[-1], pair])
        if chunks[-1] and longest * (len(chunks[-1]) + 1) > _CHUNK_TOKENS:
            chunks.append([])
        chunks[-1].append(pair)
    batches = []
    for chunk in chunks:
        inputs = [p if prompt_last else p + t[:-1] for p, t in chunk]
        ids, mask = pad_rows(inputs, pad_token_id(tokenizer))
        at = [
            (b, len(p) - 1 + (0 if prompt_last else j), t[j], len(t))
            for b, (p, t) in enumerate(chunk)
            for j in range(len(t))
        ]
        rows, columns, targets, sizes = (torch.tensor(x, device=device) for x in zip(*at, strict=True))
        lengths = [len(p) for p, _ in chunk]
        batches.append(
            TrainingBatch(
                ids.to(device), mask.to(device), lengths, rows, columns, targets, 1.0 / (sizes * len(requests))
            )
        )
    return batches


def fit(
    model: Any,
    reader: LogitReader,
    batches: Sequence[TrainingBatch],
    parameters: Sequence[nn.Parameter],
    settings: Fitting,
    *,
    first_block: int = 0,
    at_prompt: Callable[[list[int]], contextlib.AbstractContextManager[Any]] | None = None,
    after_step: Callable[[], None] | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> tuple[int, float]:
    """Train ``parameters`` until the loss target or the last step: ``(steps taken, loss of the trained parameters)``.

    Args:
        model: the model, with the edit on it.
        reader: reader of the same model.
        batches: from :func:`training_batches`.
        parameters: the trained parameters; all others are frozen meanwhile.
        settings: learning rate, number of steps, stopping rule.
        first_block: blocks below it are not trained.
        at_prompt: the edit's context manager for prompt lengths.
        after_step: called after each step (constraints).
        penalty: a further term to minimise; the returned loss, and the one compared with the target, leave it out.

    Raises:
        EditError: a loss is not finite. The caller must restore the parameters.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps, loss = 0, math.nan
    try:
        for batch in batches:
            batch.start = capture_block_input(model, first_block, batch.ids, batch.mask)
        for step in range(settings.steps + 1):
            optimizer.zero_grad(set_to_none=True)
            last = step == settings.steps
            loss = 0.0
            for batch in batches:
                with torch.set_grad_enabled(not last):
                    part = _loss(model, reader, batch, at_prompt)
                loss += part.item()
                if not last and not (len(batches) == 1 and part.item() < settings.loss_target):
                    part.backward()
            if not math.isfinite(loss):
                raise EditError(
                    f"the loss is {loss} after {steps} steps; lower the learning rate ({settings.learning_rate:g})"
                )
            if loss < settings.loss_target or last:
                break
            if penalty:
                penalty().backward()
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            steps += 1
            if after_step:
                after_step()
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
        for p in frozen:
            p.requires_grad_(True)
        for batch in batches:
            batch.start = None
    return steps, loss


def _loss(model: Any, reader: LogitReader, batch: TrainingBatch, at_prompt: Callable[..., Any] | None) -> torch.Tensor:
    context = at_prompt(batch.lengths) if at_prompt else contextlib.nullcontext()
    with context, resume_at(model, batch.start):
        logits, _, _ = reader(batch.ids, batch.mask, batch.rows, batch.columns)
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.weights).sum()
