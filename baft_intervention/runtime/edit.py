"""A committed edit: its requests, its tensors, and how its training ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..requests import EditRequest


@dataclass(frozen=True)
class Edit:
    """One committed edit.

    Args:
        id: name in the adapter: the id of its request, or of the first request of a joint group.
        requests: the edited requests, without probes.
        tensors: ``layer -> {name: tensor}``, fp32 on the CPU.
        used: ``layer -> (r,)`` how much the edit uses each basis.
        loss: mean cross-entropy over target tokens after training (nats).
        steps, seconds: length of the training; ``seconds`` is 0 for a loaded edit.
        reached: whether every target token is the edited model's argmax at its position.
    """

    id: str
    requests: tuple[EditRequest, ...]
    tensors: Mapping[int, Mapping[str, Tensor]] = field(repr=False)
    used: Mapping[int, Tensor] = field(repr=False)
    loss: float
    steps: int
    seconds: float
    reached: bool

    def summary(self) -> dict[str, Any]:
        """The edit's entry in ``adapter.json``; it has no times, so the same edits give the same bytes."""
        requests = [dataclasses.replace(r, probes=()).to_dict() for r in self.requests]
        return {
            "id": self.id, "requests": requests, "loss": self.loss, "steps": self.steps, "reached": self.reached,
        }  # fmt: skip
