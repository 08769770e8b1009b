"""Fine-tuning of one MLP down-projection: FT-M and FT-L.

Definitions as in EasyEdit (``easyeditor/models/ft/ft_main.py``, its FT hparams and survey arXiv 2401.01286):

* FT-M (``objective_optimization: target_new``): teacher-forced cross entropy over the target's tokens, without the
  prompt's tokens.
* FT-L (``prompt_last``, ROME's fine-tuning): *all* target tokens are predicted from the last prompt token, and the target
  is not input; for targets of several tokens this differs from what a language model generates. ROME's constrained
  form FT+L keeps every weight within an L-infinity ball around the original, ``norm_constraint``.

EasyEdit stops at a loss of 1e-2; here all methods share the setting ``loss_target``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...models.structure import find_blocks, hidden_size
from ...requests import EditRequest
from ..edited import EditCost, EditedModel
from ..fit import Fitting, fit, training_batches
from ..forward import LogitReader
from .base import Method, as_edit_error, register_method, resolve_layer

# names of an MLP's output projection in different model families
_DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out", "feed_forward.w2", "fc2")


@dataclass(frozen=True)
class FineTune(Method):
    """What FT-M and FT-L share.

    Args:
        layer: block whose down-projection is trained; a fraction counts as a share of the depth.
        module: the trained module inside the block; by default found by its usual names.
        learning_rate, steps, loss_target, append_eos: see :class:`~baft_intervention.evaluation.fit.Fitting`.
        norm_constraint: half-width of the L-infinity ball around the original weights; 0 for none.
    """

    layer: float = 0.7
    module: str = ""
    learning_rate: float = 5e-4
    steps: int = 60
    loss_target: float = 0.02
    append_eos: bool = False
    norm_constraint: float = 0.0
    prompt_last = False

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        return _FineTunedModel(self, model, tokenizer)


@register_method("ft-m")
@dataclass(frozen=True)
class FineTuneMasked(FineTune):
    """FT-M: one MLP down-projection, cross entropy over target tokens."""


@register_method("ft-l")
@dataclass(frozen=True)
class FineTuneLast(FineTune):
    """FT-L: one MLP down-projection, all target tokens predicted from the last prompt token, L-infinity constraint."""

    learning_rate: float = 1e-3
    norm_constraint: float = 1e-2
    prompt_last = True


def down_projection(block: nn.Module, width: int, name: str = "") -> nn.Parameter:
    """The weight of a block's MLP output projection.

    Raises:
        ConfigError: there is no such module; the message lists the candidates.
    """
    modules = dict(block.named_modules())
    for candidate in (name,) if name else _DOWN:
        weight = getattr(modules.get(candidate), "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and width in weight.shape:
            return weight
    weights = {n: getattr(m, "weight", None) for n, m in modules.items()}
    shapes = {n: tuple(w.shape) for n, w in weights.items() if isinstance(w, nn.Parameter) and w.ndim == 2}
    raise ConfigError(
        f"module {name or 'of the MLP'!r} not found in {type(block).__name__}; set module to one of {shapes}"
    )


class _FineTunedModel(EditedModel):
    def __init__(self, method: FineTune, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.method = method
        self.first_changed_block = resolve_layer(model, method.layer)
        self.weight = down_projection(find_blocks(model)[self.first_changed_block], hidden_size(model), method.module)
        self.original = self.weight.detach().clone()
        self.reader = LogitReader(model)

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        s = self.method
        before = self.weight.detach().clone()
        settings = Fitting(s.learning_rate, s.steps, s.loss_target, append_eos=s.append_eos)
        try:
            batches = training_batches(
                requests, self.model, self.tokenizer, append_eos=s.append_eos, prompt_last=s.prompt_last
            )
            steps, loss = fit(
                self.model, self.reader, batches, [self.weight], settings,
                first_block=self.first_changed_block, after_step=self._constrain,
            )  # fmt: skip
        except BaseException as error:
            self._set(before)
            raise as_edit_error(error, requests) from error
        size = self.weight.numel()
        self.cost = EditCost(steps, loss, size, size * self.weight.element_size())
        return self.cost

    @torch.no_grad()
    def _constrain(self) -> None:
        if radius := self.method.norm_constraint:
            self.weight.copy_(torch.clamp(self.weight, self.original - radius, self.original + radius))

    @torch.no_grad()
    def _set(self, value: torch.Tensor) -> None:
        self.weight.copy_(value)

    def restore(self) -> None:
        self._set(self.original)
