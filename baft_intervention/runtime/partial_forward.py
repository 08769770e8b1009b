"""The partial forward: from the output of the lowest edited block to the loss at target tokens.

Two things are the same at every training step: the output of the blocks up to the lowest edited one and, because the
model is causal, the keys and values of the tokens before the first edited one. :func:`cache_states` computes them once.
Each step then takes one of two ways:

* :class:`~.replayed_blocks.ReplayedBlocks` calls the blocks above the lowest edited one itself, on the columns from the
  first edited token on.
* :class:`WholeModel` calls the model, on whole rows. With cached states it skips the blocks up to the lowest edited one;
  without them it runs them all, as the reference does.

``FastEngine`` compares either way with the model before it uses it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from ..models.structure import compute_device
from ..models.tokenization import IGNORE_INDEX, pad_rows
from .block_stubs import CannotSkip, StopForward, hooked_blocks, leading, skipped_blocks
from .onednn_linear import linear_layers, onednn_products

Changes = Mapping[int, Callable[[Tensor], Tensor]]
"""``layer -> change of the block's output``; each takes and returns ``(rows * width, d)``."""


class EditedRow(Protocol):
    """A row of a partial forward: token ids, labels (``IGNORE_INDEX`` off the target), and the columns that are edited."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def positions(self) -> Sequence[int]: ...


def predicting_columns(row: EditedRow) -> list[int]:
    """The columns whose logits predict a target token."""
    return [c - 1 for c in range(1, len(row.labels)) if row.labels[c] != IGNORE_INDEX]


def used_width(row: EditedRow) -> int:
    """How many columns of a row matter: up to the last one that predicts a target token or is edited."""
    return max([*predicting_columns(row), *row.positions]) + 1


# ------------------------------------------------------------------------------------------- what is computed once


_Cache: Any = DynamicCache  # the signatures of its methods differ between versions


class _RecordingCache(_Cache):
    """Keeps nothing for the model, and the keys and values of the blocks above ``lowest`` for us."""

    def __init__(self, lowest: int):
        super().__init__()
        self.lowest, self.seen = lowest, {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx > self.lowest:
            self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


@dataclass
class CachedStates:
    """What one call of the unedited model computed.

    Args:
        ids, mask: ``(B, T)``, padded on the right.
        lowest: the block whose output a partial forward starts from.
        hidden: ``(B, T, d)``, that output, including the effect of other hooks.
        last: ``(B, T, d)``, the last block's output.
        key_values: ``layer -> (keys, values)``, each ``(B, heads, T, head_dim)``, of the blocks above ``lowest``.
        extras: the form of a block's output, see :func:`~.block_stubs.as_output`.
        changed: a block above ``lowest`` whose output another adapter changes; None without one.
    """

    ids: Tensor
    mask: Tensor
    lowest: int
    hidden: Tensor
    last: Tensor
    key_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extras: int | None = None
    changed: int | None = None


@torch.no_grad()
def cache_states(
    model: nn.Module, blocks: nn.ModuleList, rows: Sequence[EditedRow], lowest: int, pad_id: int
) -> CachedStates:
    """Call the unedited model once on whole rows, up to its last block.

    Raises:
        CannotSkip: the model does not call ``blocks``.
    """
    device = compute_device(model)
    ids, mask = (t.to(device) for t in pad_rows([row.ids for row in rows], pad_id))
    states = CachedStates(ids, mask, lowest, ids, ids)
    has_prefix = any(min(row.positions) for row in rows)
    recorder = _RecordingCache(lowest) if has_prefix and getattr(model, "_supports_cache_class", True) else None
    unchanged: dict[int, Tensor] = {}

    def before_hooks(number: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            unchanged[number] = leading(output)

        return hook

    def after_hooks(number: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            hidden = leading(output)
            if number == lowest:
                states.hidden = hidden
            else:
                if hidden is not unchanged.pop(number):
                    states.changed = number
                if recorder is None and has_prefix and isinstance(output, tuple) and len(output) > 1:
                    states.key_values[number] = output[1]  # the legacy form of a cache
            if number == len(blocks) - 1:
                states.last, states.extras = hidden, len(output) - 1 if isinstance(output, tuple) else None
                raise StopForward

        return hook

    above = range(lowest + 1, len(blocks))
    handles = [blocks[n].register_forward_hook(before_hooks(n), prepend=True) for n in above]
    handles += [blocks[n].register_forward_hook(after_hooks(n)) for n in range(lowest, len(blocks))]
    extra = {} if recorder is None else {"past_key_values": recorder}
    try:
        with contextlib.suppress(StopForward), onednn_products(linear_layers(blocks)):
            model(input_ids=ids, attention_mask=mask, use_cache=has_prefix, **extra)
            raise CannotSkip("the model does not call its blocks")
    finally:
        for handle in handles:
            handle.remove()
    if recorder is not None:
        states.key_values = dict(recorder.seen)
    return states


# ------------------------------------------------------------------------------------------- what is computed at each step


class PartialForward:
    """The loss at the target tokens of some rows, as a function of the changes of the edited blocks' outputs.

    Args:
        rows: the training rows.
        width: columns that a row has in this forward.
        device: of the losses.

    Attributes:
        labels: ``(N,)``, the target tokens, row after row.
        owner: ``(N,)``, the row of each.
        targets: ``(N,)``, the flat index of the column that predicts each.
    """

    def __init__(self, rows: Sequence[EditedRow], width: int, device: torch.device):
        self._set_rows(rows, width, device)

    def _set_rows(self, rows: Sequence[EditedRow], width: int, device: torch.device) -> None:
        self.rows, self.width, self.device = tuple(rows), width, device
        found = [(i, column) for i, row in enumerate(rows) for column in predicting_columns(row)]
        labels = [self.rows[i].labels[column + 1] for i, column in found]
        self.labels = torch.tensor(labels, dtype=torch.long, device=device)
        self.owner = torch.tensor([i for i, _ in found], dtype=torch.long, device=device)
        self.targets = torch.tensor([self.flat_index(*pair) for pair in found], dtype=torch.long, device=device)

    def flat_index(self, row: int, column: int) -> int:
        """Where column ``column`` of row ``row`` lies among ``rows * width``."""
        return row * self.width + column

    def start(self) -> Tensor:
        """``(rows * width, d)``, the unedited output of the lowest edited block."""
        raise NotImplementedError

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        """``(loss (N,) fp32 in nats, hit (N,) bool)`` at the target tokens; a hit is a target that is the argmax."""
        raise NotImplementedError

    def select(self, keep: Sequence[int]) -> PartialForward:
        """The same for some of the rows."""
        raise NotImplementedError


class WholeModel(PartialForward):
    """Calls of the whole model on whole rows.

    Args:
        model, blocks: the model and its decoder blocks.
        rows: the training rows.
        pad_id: fills up short rows.
        states: from which the model starts; without them it runs all of its blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        rows: Sequence[EditedRow],
        pad_id: int,
        states: CachedStates | None = None,
    ):
        self.model, self.blocks = model, blocks
        self.hidden = None if states is None else states.hidden
        self.lowest, self.extras = (0, None) if states is None else (states.lowest, states.extras)
        self.ids, self.mask = (t.to(compute_device(model)) for t in pad_rows([row.ids for row in rows], pad_id))
        super().__init__(rows, self.ids.shape[1], self.ids.device)

    def start(self) -> Tensor:
        if self.hidden is None:
            raise CannotSkip("nothing is cached")
        return self.hidden.flatten(0, 1)

    def logits(self, changes: Changes, index: Tensor) -> Tensor:
        """``(N, V)`` at the flat indices ``(N,)``, on the device of the model's logits."""

        def on_rows(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: change(hidden.flatten(0, 1)).view_as(hidden)

        shaped = {layer: on_rows(change) for layer, change in changes.items()}
        call = {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        if self.hidden is None:
            with hooked_blocks(self.blocks, shaped):
                logits = self.model(**call).logits
        else:
            hidden = self.hidden
            if self.lowest in shaped:
                hidden = shaped.pop(self.lowest)(hidden)
            with skipped_blocks(self.blocks, self.lowest, hidden, self.extras), hooked_blocks(self.blocks, shaped):
                logits = self.model(**call).logits
        return logits.flatten(0, 1)[index.to(logits.device)]

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        logits = self.logits(changes, self.targets).float()
        labels = self.labels.to(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.to(self.device), (logits.detach().argmax(-1) == labels).to(self.device)

    def select(self, keep: Sequence[int]) -> WholeModel:
        rows, new = [self.rows[i] for i in keep], copy.copy(self)
        index, width = torch.tensor(list(keep), device=self.device), max(len(row.ids) for row in rows)
        new.ids, new.mask = self.ids[index, :width], self.mask[index, :width]
        new.hidden = None if self.hidden is None else self.hidden[index, :width]
        new._set_rows(rows, width, self.device)
        return new


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding alone makes."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
