"""BaFT, by this library's own editor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config import BaftConfig
from ...editor.editor import BaftEditor
from ...errors import ConfigError, RequestError
from ...requests import EditRequest
from ...training.subjects import with_subject
from ..edited import EditCost, EditedModel
from .base import Method, as_edit_error, register_method


@register_method("baft")
@dataclass(frozen=True)
class Baft(Method):
    """BaFT with the library's defaults.

    Args:
        config: fields of :class:`~baft_intervention.config.BaftConfig` that differ from its defaults; ``seed`` is the method's.
        bank: unrelated texts for the gate to learn from; by default the package's own.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    bank: Sequence[str] = ()

    def baft_config(self) -> BaftConfig:
        if "seed" in self.config:
            raise ConfigError("give seed as the method's setting, not inside config")
        return BaftConfig.from_dict({**self.config, "seed": self.seed})

    def settings(self) -> dict[str, Any]:
        bank = {"bank": list(self.bank)} if self.bank else {}
        return {"config": self.baft_config().to_dict(), "seed": self.seed} | bank

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        return _BaftModel(self.baft_config(), model, tokenizer, self.bank)


@register_method("baft-linear")
@dataclass(frozen=True)
class BaftLinear(Baft):
    """BaFT with a linear gate and a locality term, and nothing behind the target: the plainest reading of the paper."""

    config: Mapping[str, Any] = field(
        default_factory=lambda: {"weighting": "linear", "locality_coefficient": 1.0, "ending": ""}
    )


def _editable(request: EditRequest) -> EditRequest:
    """The request, without its subject where a data set gives one that is not in the prompt."""
    try:
        return with_subject(request)
    except RequestError:
        return with_subject(dataclasses.replace(request, subject=None))


class _BaftModel(EditedModel):
    def __init__(self, config: BaftConfig, model: Any, tokenizer: Any, bank: Sequence[str] = ()) -> None:
        super().__init__(model, tokenizer)
        self.editor = BaftEditor(model, tokenizer, config, bank_texts=bank or None)
        self.editor.prepare()  # the bank is a matter of the model, not of the first edit
        adapter = self.editor.adapter
        # a gate that reads a block must see it computed; the block just below may be given, see resume_at
        self.first_changed_block = min(adapter.read_layers) + 1

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        plain = [_editable(dataclasses.replace(r, probes=())) for r in requests]  # training sees no probe
        adapter = self.editor.adapter
        try:
            report = self.editor.edit(plain)
        except BaseException as error:
            raise as_edit_error(error, requests) from error
        edits = report.edits
        loss = sum(e.loss for e in edits) / len(edits)
        trained = adapter.trained_parameters() * len(edits)
        self.cost = EditCost(max(e.steps for e in edits), loss, trained, adapter.stored_bytes())
        return self.cost

    def prompts(self, lengths: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        return self.editor.adapter.prompts(lengths)

    def reset(self) -> None:
        self.editor.adapter.set_edits(())

    def restore(self) -> None:
        self.editor.adapter.set_edits(())
        self.editor.detach()
