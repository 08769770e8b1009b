"""What an edited model looks like to the evaluation, whatever edited it.

An :class:`EditedModel` wraps a base model with edits on it. Weight edits (fine-tuning, LoRA) need nothing more than
``model``; an edit that sits at a position (ReFT, BaFT) learns through :meth:`EditedModel.prompts` where the
prompts end; an edit that lives in the text (in-context) changes prompts by :meth:`EditedModel.rewrite`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.tokenization import encode_prompt, pad_token_id
from ..requests import EditRequest
from .forward import LogitReader, decode_tokens, end_token_ids


@dataclass(frozen=True)
class EditCost:
    """What an edit took and left behind.

    Args:
        steps: optimiser steps of the last call of :meth:`EditedModel.apply`.
        final_loss: mean cross entropy (nats a target token) before the last step; ``None`` without training.
        trained_parameters: numbers that the optimiser could change.
        adapter_bytes: what must be stored to have the edit again (all edits so far), in bytes.
    """

    steps: int = 0
    final_loss: float | None = None
    trained_parameters: int = 0
    adapter_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class EditedModel:
    """A base model on which edits are put, asked about, and taken off again.

    Subclasses override what differs; as it stands this class is the unedited model.

    Args:
        model: the base model, edited in place.
        tokenizer: its tokenizer.

    Attributes:
        cost: of the edits so far.
        first_changed_block: blocks below this one compute what they compute without the edit, so their results
            may be reused.
        head_intact: whether the output head is the unedited model's.
    """

    first_changed_block: int = 0
    head_intact: bool = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cost = EditCost()

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        """Put further edits on top of those that are there, as one batch.

        Raises:
            EditError: the edit failed; the model is as it was before this call.
        """
        return self.cost

    def prompts(self, lengths: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        """Within it, row ``i`` of each right-padded batch begins with a prompt of ``lengths[i]`` tokens."""
        return contextlib.nullcontext()

    def rewrite(self, prompt: str) -> str:
        """The text that is put to the model for ``prompt``; it must end with ``prompt``."""
        return prompt

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | Sequence[int],
        *,
        known: Sequence[Sequence[int]] | None = None,
        samplers: Sequence[torch.Generator | None] | None = None,
        reader: LogitReader | None = None,
    ) -> list[str]:
        """Continuations as text, ended at the end-of-sequence token; greedy where no sampler is given.

        Args:
            prompts: as the user would put them; :meth:`rewrite` is applied here.
            max_new_tokens: one limit, or one a prompt.
            known: ids with which the greedy continuations are known to begin.
            samplers: see :func:`~baft_intervention.evaluation.forward.decode_tokens`.
            reader: a reader of ``model`` that has been checked already.
        """
        if not prompts:
            return []
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        found = decode_tokens(
            reader or LogitReader(self.model),
            [encode_prompt(self.tokenizer, self.rewrite(p)) for p in prompts],
            limits,
            end_ids=end_token_ids(self.model, self.tokenizer),
            pad_id=pad_token_id(self.tokenizer),
            known=known,
            samplers=samplers,
            at_prompt=self.prompts,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    def reset(self) -> None:
        """Take all edits off and be ready for new ones, as if just attached."""
        self.restore()

    def restore(self) -> None:
        """Take all edits off; the base model is then as it was, byte for byte. Harmless when called twice."""
