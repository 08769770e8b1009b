"""Running only the blocks above the lowest edited one, on only the columns that can change.

What an edit at block L cannot reach is the same at every step: the output of the blocks up to L, and, the model being
causal, the keys and values of the tokens before the first edited one. They are computed once (:func:`read`). What is
left of a step is one of

* :class:`Replay`: the blocks above L called one by one on the columns from the first edited token on, with the very
  arguments (masks, position embeddings, a cache of the earlier keys and values) that the model's own code makes for
  such a call. They are recorded by calling the model once with its blocks replaced by stand-ins
  (:func:`block_arguments`), so no architecture is known here by name.
* :class:`Through`: a call of the whole model in which the blocks up to L are stand-ins that hand on the cached output.
  For models, or models with someone's hooks on them, whose blocks cannot be called on their own.

Both give the loss at the target tokens. A :class:`Replay` checks itself against what :func:`read` saw, and
:mod:`~baft_intervention.training.fast` checks either against the model before it trusts it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from ..models.tokenization import IGNORE_INDEX, pad_rows
from ..training.engine import Row
from .block_stubs import Stop, Unsafe, as_output, leading, stubbed_blocks
from .call_state import hook_block
from .onednn_linear import faster_products, layers_to_speed_up
from .output_head import Head

logger = logging.getLogger(__name__)

Changes = Mapping[int, Callable[[Tensor], Tensor]]
"""``layer -> change of the block's output``, given and returned as ``(rows * width, d)``."""


def predicting(row: Row) -> list[int]:
    """Columns whose logits predict a target token."""
    return [c - 1 for c in range(1, len(row.labels)) if row.labels[c] != IGNORE_INDEX]


def used_width(row: Row) -> int:
    """How many columns of a row matter: up to the last that predicts a target or is edited."""
    return max([*predicting(row), *row.positions]) + 1


# ------------------------------------------------------------------------------------------- reading once


_Cache: Any = DynamicCache  # its methods have other signatures in each version


class _Recorder(_Cache):
    """Passes keys and values through and keeps those of the blocks above ``lowest``."""

    def __init__(self, lowest: int):
        super().__init__()
        self.lowest, self.seen = lowest, {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx > self.lowest:
            self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class _Prefix(_Cache):
    """Keys and values of P earlier columns, read and never grown: a block may be called again and again."""

    is_compileable = False

    def __init__(self, depth: int, pairs: Mapping[int, tuple[Tensor, Tensor]], length: int, like: Tensor):
        super().__init__()
        self.depth, self.pairs, self.length = depth, pairs, length
        self.blank = like.new_zeros(like.shape[0], 1, length, 1)  # for the blocks that are not run

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.pairs[layer_idx]
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
        return self.pairs.get(layer, (self.blank, self.blank))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(self.depth))


@dataclass
class Reading:
    """What one call of the unedited model showed.

    Args:
        ids, mask: ``(B, T)``, padded on the right.
        hidden: ``(B, T, d)`` output of block ``lowest``, others' hooks included.
        last: ``(B, T, d)`` output of the last block.
        pairs: ``layer -> (keys, values)``, each ``(B, heads, T, head_dim)``, of the blocks above ``lowest``.
        extras: what each block's output is, see :func:`as_output`.
        changed: a block above ``lowest`` whose output a hook of ours changed (another adapter that acts), if any.
    """

    ids: Tensor
    mask: Tensor
    lowest: int
    hidden: Tensor
    last: Tensor
    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extras: list[int | None] = field(default_factory=list)
    changed: int | None = None


@torch.no_grad()
def read(model: nn.Module, blocks: nn.ModuleList, rows: Sequence[Row], lowest: int, pad_id: int) -> Reading:
    """Call the unedited model once on whole rows, up to the last block."""
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in pad_rows([row.ids for row in rows], pad_id))
    reading = Reading(ids, mask, lowest, ids, ids, extras=[None] * len(blocks))
    cached = min(min(row.positions) for row in rows) > 0 or any(min(row.positions) for row in rows)
    recorder = _Recorder(lowest) if cached and getattr(model, "_supports_cache_class", True) else None
    raw: dict[int, Any] = {}

    def before(number: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            raw[number] = leading(output)

        return hook

    def after(number: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            hidden = leading(output)
            reading.extras[number] = len(output) - 1 if isinstance(output, tuple) else None
            if number == lowest:
                reading.hidden = hidden
            elif number > lowest:
                if hidden is not raw.pop(number):
                    reading.changed = number
                if recorder is None and cached and isinstance(output, tuple) and len(output) > 1:
                    reading.pairs[number] = output[1]  # the legacy form of a cache
            if number == len(blocks) - 1:
                reading.last = hidden
                raise Stop

        return hook

    handles = [blocks[n].register_forward_hook(before(n), prepend=True) for n in range(lowest + 1, len(blocks))]
    handles += [block.register_forward_hook(after(n)) for n, block in enumerate(blocks)]
    extra = {} if recorder is None else {"past_key_values": recorder}
    try:
        with contextlib.suppress(Stop), faster_products(layers_to_speed_up(blocks)):
            model(input_ids=ids, attention_mask=mask, use_cache=cached, **extra)
            raise Unsafe("the blocks are not what the model calls")
    finally:
        for handle in handles:
            handle.remove()
    if recorder is not None:
        reading.pairs = dict(recorder.seen)
    return reading


# ------------------------------------------------------------------------------------------- arguments of blocks


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block but for the hidden states, which stand at ``place`` (an index or a name)."""

    args: tuple
    kwargs: dict[str, Any]
    place: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return leading(block(*args, **self.kwargs))
        return leading(block(*self.args, **{**self.kwargs, self.place: hidden}))


@torch.no_grad()
def block_arguments(
    model: nn.Module, blocks: nn.ModuleList, reading: Reading, inputs: Mapping[str, Any], like: Tensor
) -> dict[int, BlockCall]:
    """What the model would call each block above ``reading.lowest`` with, in the call ``model(**inputs)``.

    No block is run. ``like (B, S, d)``: what hidden states look like.

    Raises:
        Unsafe: a block gets something else than the output of the one before.
    """
    calls: dict[int, BlockCall] = {}
    given: dict[int, Tensor] = {}

    def answer(number: int) -> Callable[[tuple, dict], Any]:
        def reply(args: tuple, kwargs: dict) -> Any:
            if number > reading.lowest:
                before = given.pop(number - 1, None)
                places: list[int | str] = [i for i, a in enumerate(args) if a is before]
                places += [name for name, a in kwargs.items() if a is before]
                if before is None or len(places) != 1:
                    raise Unsafe(f"block {number} does not take the output of block {number - 1} as it is")
                calls[number] = BlockCall(args, kwargs, places[0])
            if number == len(blocks) - 1:
                raise Stop
            given[number] = torch.zeros_like(like)
            return as_output(given[number], reading.extras[number])

        return reply

    with stubbed_blocks(blocks, {n: answer(n) for n in range(len(blocks))}), contextlib.suppress(Stop):
        model(**inputs)
        raise Unsafe("the blocks are not what the model calls")
    return calls


# ------------------------------------------------------------------------------------------- the two ways


class Suffix:
    """What both ways have in common.

    Args:
        rows: the training rows.

    Attributes:
        width: columns a row has here.
        labels: ``(N,)`` target tokens, row after row.
        owner: ``(N,)`` the row of each.
        share: ``(N,)`` what each weighs in the loss of its row, see :meth:`~.engine.Row.shares`.
        own: ``(N,)`` what it weighs in the mean over the target alone.
    """

    def __init__(self, rows: Sequence[Row], width: int, device: torch.device):
        self.rows, self.width, self.device = tuple(rows), width, device
        columns = [predicting(row) for row in rows]
        labels = [row.labels[c + 1] for row, found in zip(rows, columns, strict=True) for c in found]
        self.labels = torch.tensor(labels, device=device)
        self.owner = torch.tensor([i for i, found in enumerate(columns) for _ in found], device=device)
        shares, own = zip(*(row.shares() for row in rows), strict=True)
        self.share = torch.tensor([s for each in shares for s in each], device=device)
        self.own = torch.tensor([s for each in own for s in each], device=device)
        self.targets = torch.tensor([self.flat(i, c) for i, found in enumerate(columns) for c in found], device=device)

    def flat(self, row: int, column: int) -> int:
        """Where column ``column`` of row ``row`` stands among ``rows * width``."""
        raise NotImplementedError

    def representations(self) -> Tensor:
        """``(rows * width, d)``: the lowest edited block's unedited output."""
        raise NotImplementedError

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        """``(loss (N,) fp32 in nats, hit (N,) bool)`` at the target tokens."""
        raise NotImplementedError

    def select(self, keep: Sequence[int]) -> Suffix:
        """The same for some of the rows."""
        raise NotImplementedError


class Replay(Suffix):
    """The blocks above the lowest edited one, from the first edited column on.

    Rows are aligned at their first edited column: earlier ones lie to the left, as keys and values of P columns, and
    S columns are computed at each step, up to the last that predicts a target.

    Raises:
        Unsafe: called so, the blocks do not give what they gave in the whole model.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, head: Head, reading: Reading, rows: Sequence[Row]):
        device = reading.hidden.device
        self.model, self.blocks, self.head, self.reading = model, blocks, head, reading
        self.linear = layers_to_speed_up(list(blocks)[reading.lowest + 1 :])
        self.firsts = [min(row.positions) for row in rows]
        self.lengths = [used_width(row) for row in rows]
        super().__init__(rows, max(n - p for n, p in zip(self.lengths, self.firsts, strict=True)), device)
        self.past = max(self.firsts) if reading.lowest < len(blocks) - 1 else 0
        first, length = torch.tensor(self.firsts).unsqueeze(1), torch.tensor(self.lengths).unsqueeze(1)
        # columns of the reading: what lies behind a row's end repeats its last column, and nothing looks at it
        self.columns = torch.minimum(first + torch.arange(self.width), length - 1).to(device)  # (B, S)
        before = torch.arange(self.past) - (self.past - first)  # (B, P), below 0 where there is padding
        each = torch.arange(len(rows), device=device).unsqueeze(1)
        self.hidden = reading.hidden[each, self.columns]  # (B, S, d)
        inside = torch.arange(self.width) < length - first
        self.mask = torch.cat([before >= 0, inside], dim=1).long().to(device)  # (B, P + S)
        index = before.clamp(min=0).to(device)
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        if self.past:
            for n in range(reading.lowest + 1, len(blocks)):
                if n not in reading.pairs:
                    raise Unsafe(f"block {n} shows no keys and values")
                keys, values = reading.pairs[n]
                self.pairs[n] = (_columns(keys, each, index), _columns(values, each, index))
        parameters = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in parameters
        if not self.positions and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self.positions = True  # it may hand them on
            try:
                self._record()
                self._check()
                return
            except (Unsafe, TypeError, ValueError):
                self.positions = False
        self._record()
        self._check()

    def _record(self) -> None:
        inputs: dict[str, Any] = {
            "input_ids": self.reading.ids.gather(1, self.columns),
            "attention_mask": self.mask,
            "use_cache": bool(self.past),
        }
        if self.positions:
            inputs["position_ids"] = self.columns
        if self.past:
            inputs["past_key_values"] = _Prefix(len(self.blocks), self.pairs, self.past, self.hidden)
        self.calls = block_arguments(self.model, self.blocks, self.reading, inputs, self.hidden)

    @torch.no_grad()
    def _check(self) -> None:
        """That the unedited columns come out as they did in the whole model."""
        each = torch.arange(len(self.rows), device=self.device).unsqueeze(1)
        expected = self.reading.last[each, self.columns].float()
        inside = self.mask[:, self.past :].bool()
        off = (self.run({}).view_as(expected).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = float(off[inside].max())
        if not worst <= tolerance(self.hidden.dtype):
            raise Unsafe(f"its blocks, called on {self.width} columns, are off by {worst:.1e} of the norm")

    def flat(self, row: int, column: int) -> int:
        return row * self.width + column - self.firsts[row]

    def representations(self) -> Tensor:
        return self.hidden.flatten(0, 1)

    def run(self, changes: Changes) -> Tensor:
        """The last block's output ``(B * S, d)``."""
        hidden = self.hidden
        with faster_products(self.linear):
            for number in range(self.reading.lowest, len(self.blocks)):
                if number > self.reading.lowest:
                    hidden = self.calls[number].run(self.blocks[number], hidden)
                if number in changes:
                    hidden = changes[number](hidden.flatten(0, 1)).view_as(hidden)
        return hidden.flatten(0, 1)

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        return self.head.losses(self.run(changes)[self.targets], self.labels)

    def select(self, keep: Sequence[int]) -> Replay:
        """Fewer rows, narrower where the widest left; checked already, so not again."""
        index = torch.tensor(list(keep), device=self.device)
        new = object.__new__(Replay)
        new.model, new.blocks, new.head, new.linear = self.model, self.blocks, self.head, self.linear
        new.positions = self.positions
        new.firsts, new.lengths = [self.firsts[i] for i in keep], [self.lengths[i] for i in keep]
        width = max(n - p for n, p in zip(new.lengths, new.firsts, strict=True))
        Suffix.__init__(new, [self.rows[i] for i in keep], width, self.device)
        new.past = max(new.firsts) if self.past else 0
        cut = self.past - new.past
        new.columns, new.hidden = self.columns[index, :width], self.hidden[index, :width]
        new.mask = self.mask[index, cut : self.past + width]
        new.pairs = {n: (k[index, :, cut:], v[index, :, cut:]) for n, (k, v) in self.pairs.items()}
        new.reading = _thinned(self.reading, index)
        new._record()
        return new


class Through(Suffix):
    """Calls of the whole model on whole rows, the blocks up to the lowest edited one skipped."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, reading: Reading, rows: Sequence[Row]):
        self.model, self.blocks, self.reading = model, blocks, reading
        super().__init__(rows, reading.ids.shape[1], reading.hidden.device)

    def flat(self, row: int, column: int) -> int:
        return row * self.width + column

    def representations(self) -> Tensor:
        return self.reading.hidden.flatten(0, 1)

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        reading = self.reading

        def applied(number: int) -> Callable[[Tensor], Tensor]:
            return lambda hidden: changes[number](hidden.flatten(0, 1)).view_as(hidden)

        def answer(number: int) -> Callable[[tuple, dict], Any]:
            def reply(_args: tuple, _kwargs: dict) -> Any:
                hidden = reading.hidden
                if number == reading.lowest and number in changes:
                    hidden = applied(number)(hidden)
                return as_output(hidden, reading.extras[number])

            return reply

        handles = [hook_block(self.blocks[n], applied(n)) for n in changes if n > reading.lowest]
        try:
            with stubbed_blocks(self.blocks, {n: answer(n) for n in range(reading.lowest + 1)}):
                out = self.model(input_ids=reading.ids, attention_mask=reading.mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        logits = out.logits.flatten(0, 1)[self.targets].float()
        return F.cross_entropy(logits, self.labels, reduction="none"), logits.detach().argmax(-1) == self.labels

    def select(self, keep: Sequence[int]) -> Through:
        index = torch.tensor(list(keep), device=self.device)
        rows = [self.rows[i] for i in keep]
        thin, width = _thinned(self.reading, index), max(len(row.ids) for row in rows)
        thin.ids, thin.mask, thin.hidden = thin.ids[:, :width], thin.mask[:, :width], self.reading.hidden[index, :width]
        return Through(self.model, self.blocks, thin, rows)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that is rounding alone."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _columns(states: Tensor, each: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (B, P)`` of ``states (B, heads, T, head_dim)``."""
    return states[each, :, index].transpose(1, 2).contiguous()


def _thinned(reading: Reading, index: Tensor) -> Reading:
    """The rows ``index`` of the ids; what was read of blocks is let go."""
    empty = reading.hidden[:0]
    return Reading(reading.ids[index], reading.mask[index], reading.lowest, empty, empty, extras=reading.extras)
