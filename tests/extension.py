"""What somebody adds from outside the package: one class or function and one line of registry each (CONTRIBUTING.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import baft_intervention as baft
from baft_intervention.evaluation.methods import Method


@baft.register_weighting("temperature")
class TemperatureWeighting(baft.WeightingNetwork):
    """``w(h) = sigmoid(t)``, one trained number a basis that does not look at the input."""

    def __init__(self, embed_dim: int, rank: int, *, start: float = 4.0):
        super().__init__(embed_dim, rank)
        self.temperature = nn.Parameter(torch.full((rank,), float(start)))

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.temperature).expand(*h.shape[:-1], self.rank)


@baft.register_positions("last_two")
def last_two(index: Tensor, length: Tensor) -> Tensor:
    """The last two tokens of the prompt."""
    return index >= length - 2


@baft.register_format("trivia", matches=("q", "a"))
def read_trivia(record: Any, *, shout: bool = False) -> baft.EditRequest:
    """Trivia: questions with one answer."""
    answer = record.text("a")
    return record.request(prompt=record.text("q"), target_new=answer.upper() if shout else answer)


@baft.register_metric("answer_words")
def answer_words(record: Any, scores: Any, texts: Any) -> float | None:
    """Words of the text that is generated after the edit's prompt."""
    text = texts.get(record.request.prompt)
    return None if text is None else float(len(text.split()))


@baft.register_method("baft-mine")
@dataclass(frozen=True)
class BaftMine(Method):
    """BaFT with the weighting and the positions above."""

    steps: int = 40

    def attach(self, model: Any, tokenizer: Any) -> Any:
        from baft_intervention.evaluation.methods import make_method

        config = {"weighting": "temperature", "positions": "last_two", "learning_rate": 0.05, "steps": self.steps}
        return make_method("baft", {"config": {**config, "rank": 4}, "seed": self.seed}).attach(model, tokenizer)
