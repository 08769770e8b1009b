"""Calling a model's upper blocks one by one, on only the columns that an edit can change.

The blocks get the very arguments (masks, position embeddings, a cache of the earlier keys and values) that the model's
own code makes for such a call: :func:`block_calls` records them by calling the model once with stubs for its blocks. So
nothing here knows an architecture by name, and what the blocks then compute is checked against the whole model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .block_stubs import CannotSkip, StopForward, as_output, leading, stubbed_blocks
from .onednn_linear import linear_layers, onednn_products
from .output_head import OutputHead
from .partial_forward import CachedStates, Changes, EditedRow, PartialForward, tolerance, used_width

_Cache: Any = DynamicCache  # the signatures of its methods differ between versions


class _PrefixCache(_Cache):
    """Keys and values of P earlier columns that a block reads and does not grow, so that it can be called again and again."""

    is_compileable = False

    def __init__(self, depth: int, key_values: Mapping[int, tuple[Tensor, Tensor]], length: int, like: Tensor):
        super().__init__()
        self.depth, self.key_values, self.length = depth, key_values, length
        self.blank = like.new_zeros(like.shape[0], 1, length, 1)  # for the blocks that do not run

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.key_values[layer_idx]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.length

    def get_mask_sizes(self, query: Any, *_: Any, **__: Any) -> tuple[int, int]:  # a length in 5.x, positions before
        return self.length + (query if isinstance(query, int) else int(query.shape[0])), 0

    def get_max_length(self, *_: Any, **__: Any) -> None:
        return None

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:  # GPT-2 in 4.45 takes pairs
        return self.key_values.get(layer, (self.blank, self.blank))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(self.depth))


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block; its hidden states belong at ``slot``, an index or a name."""

    args: tuple
    kwargs: dict[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :])
            return leading(block(*args, **self.kwargs))
        return leading(block(*self.args, **{**self.kwargs, self.slot: hidden}))


@torch.no_grad()
def block_calls(
    model: nn.Module, blocks: nn.ModuleList, lowest: int, extras: int | None, inputs: Mapping[str, Any], like: Tensor
) -> dict[int, BlockCall]:
    """How ``model(**inputs)`` would call each block above ``lowest``; no block is run.

    Args:
        extras: the form of a block's output, see :func:`~.block_stubs.as_output`.
        like: ``(B, S, d)``, hidden states of the right shape.

    Raises:
        CannotSkip: a block takes something else than the output of the one below it.
    """
    calls: dict[int, BlockCall] = {}
    given: dict[int, Tensor] = {}

    def reply_of(number: int) -> Callable[..., Any]:
        def reply(*args: Any, **kwargs: Any) -> Any:
            if number > lowest:
                below = given.pop(number - 1, None)
                slots: list[int | str] = [i for i, a in enumerate(args) if a is below]
                slots += [name for name, a in kwargs.items() if a is below]
                if below is None or len(slots) != 1:
                    raise CannotSkip(f"block {number} does not take the output of block {number - 1} as it is")
                calls[number] = BlockCall(args, kwargs, slots[0])
            if number == len(blocks) - 1:
                raise StopForward
            given[number] = torch.zeros_like(like)
            return as_output(given[number], extras)

        return reply

    with stubbed_blocks(blocks, {n: reply_of(n) for n in range(len(blocks))}):
        model(**inputs)
        raise CannotSkip("the model does not call its blocks")
    return calls


class ReplayedBlocks(PartialForward):
    """The blocks above the lowest edited one, called on the columns from the first edited one on.

    Rows are aligned at their first edited column. The P columns to its left are keys and values; the S columns from it to
    the last one that predicts a target are computed at each step.

    Args:
        model, blocks, head: the model, its decoder blocks and its output head.
        states: of the unedited model, on the same rows.
        rows: the training rows.

    Raises:
        CannotSkip: on these columns alone, the blocks do not compute what they do in the whole model.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, head: OutputHead, states: CachedStates, rows: Sequence[EditedRow]
    ):
        device = states.hidden.device
        self.model, self.blocks, self.head = model, blocks, head
        self.lowest, self.extras = states.lowest, states.extras
        self.linear = linear_layers(list(blocks)[states.lowest + 1 :])
        self._align(rows, device)
        self.past = max(self.firsts) if states.lowest < len(blocks) - 1 else 0
        first, length = torch.tensor(self.firsts).unsqueeze(1), torch.tensor(self.lengths).unsqueeze(1)
        # behind a row's end its last column is repeated; nothing looks at these columns
        self.columns = torch.minimum(first + torch.arange(self.width), length - 1).to(device)  # (B, S)
        each = torch.arange(len(rows), device=device).unsqueeze(1)
        self.ids, self.hidden = states.ids[each, self.columns], states.hidden[each, self.columns]  # (B, S) (B, S, d)
        prefix = torch.arange(self.past) - (self.past - first)  # (B, P), negative at padding
        inside = torch.arange(self.width) < length - first
        self.mask = torch.cat([prefix >= 0, inside], dim=1).long().to(device)  # (B, P + S)
        index = prefix.clamp(min=0).to(device)
        self.key_values: dict[int, tuple[Tensor, Tensor]] = {}
        if self.past:
            for n in range(states.lowest + 1, len(blocks)):
                if n not in states.key_values:
                    raise CannotSkip(f"block {n} shows no keys and values")
                keys, values = states.key_values[n]
                self.key_values[n] = (_columns(keys, each, index), _columns(values, each, index))
        parameters = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in parameters
        if not self.positions and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self.positions = True  # the model may hand them on
            try:
                self._record()
                self._check(states.last[each, self.columns].float())
                return
            except (CannotSkip, TypeError, ValueError):
                self.positions = False
        self._record()
        self._check(states.last[each, self.columns].float())

    def _align(self, rows: Sequence[EditedRow], device: torch.device) -> None:
        self.firsts = [min(row.positions) for row in rows]
        self.lengths = [used_width(row) for row in rows]
        self._set_rows(rows, max(n - p for n, p in zip(self.lengths, self.firsts, strict=True)), device)

    def _record(self) -> None:
        inputs: dict[str, Any] = {
            "input_ids": self.ids, "attention_mask": self.mask, "use_cache": bool(self.past),
        }  # fmt: skip
        if self.positions:
            inputs["position_ids"] = self.columns
        if self.past:
            inputs["past_key_values"] = _PrefixCache(len(self.blocks), self.key_values, self.past, self.hidden)
        self.calls = block_calls(self.model, self.blocks, self.lowest, self.extras, inputs, self.hidden)

    @torch.no_grad()
    def _check(self, expected: Tensor) -> None:
        """Compare the unedited columns with ``expected (B, S, d)``, those of the whole model."""
        inside = self.mask[:, self.past :].bool()
        off = (self.run({}).view_as(expected).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = float(off[inside].max())
        if not worst <= tolerance(self.hidden.dtype):
            raise CannotSkip(f"its blocks, called on {self.width} columns, are off by {worst:.1e} of the norm")

    def flat_index(self, row: int, column: int) -> int:
        return row * self.width + column - self.firsts[row]

    def start(self) -> Tensor:
        return self.hidden.flatten(0, 1)

    def run(self, changes: Changes) -> Tensor:
        """The last block's output ``(B * S, d)``."""
        hidden = self.hidden
        with onednn_products(self.linear):
            for number in range(self.lowest, len(self.blocks)):
                if number > self.lowest:
                    hidden = self.calls[number].run(self.blocks[number], hidden)
                if number in changes:
                    hidden = changes[number](hidden.flatten(0, 1)).view_as(hidden)
        return hidden.flatten(0, 1)

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        return self.head.losses(self.run(changes)[self.targets], self.labels)

    def select(self, keep: Sequence[int]) -> ReplayedBlocks:
        """Fewer rows, and fewer columns where the widest row left. The blocks are not checked again."""
        index, new = torch.tensor(list(keep), device=self.device), copy.copy(self)
        new._align([self.rows[i] for i in keep], self.device)
        new.past = max(new.firsts) if self.past else 0
        cut = self.past - new.past
        parts = (tensor[index, : new.width] for tensor in (self.columns, self.ids, self.hidden))
        new.columns, new.ids, new.hidden = parts
        new.mask = self.mask[index, cut : self.past + new.width]
        new.key_values = {n: (k[index, :, cut:], v[index, :, cut:]) for n, (k, v) in self.key_values.items()}
        new._record()
        return new


def _columns(states: Tensor, each: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (B, P)`` of ``states (B, heads, T, head_dim)``."""
    return states[each, :, index].transpose(1, 2).contiguous()
