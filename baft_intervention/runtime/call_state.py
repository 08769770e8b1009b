"""The model's running call: its tokens, padding and cache, as the hooks on its blocks need them.

A forward hook on a decoder block sees hidden states ``(B, T, d)`` and nothing else. :class:`CallTracker` reads the tokens in a
pre-hook of the module that calls the blocks, and keeps them while that call runs. Each thread has its own calls.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.positions import IdSequences, PositionRule
from ..errors import PositionError
from .token_state import PADDING, TokenState, keep_state, state_of, unseen


class Call:
    """One call of the model: ``past`` cached tokens, then T columns.

    Args:
        ids: ``(B, T)``; None for a call with embeddings.
        attention_mask: ``(B, past + T)``, nonzero at tokens; None without padding.
        past: the number of cached columns.
        cache: the KV cache that the call was given.
        lengths: the prompts' lengths, for the position rules.
    """

    def __init__(
        self,
        ids: Tensor | None,
        attention_mask: Tensor | None,
        past: int,
        cache: Any = None,
        lengths: Sequence[int] | None = None,
    ):
        self.ids, self.attention_mask, self.past, self.cache, self.lengths = ids, attention_mask, past, cache, lengths
        self.notes: dict[str, Any] = {}  # owner -> what it has worked out in this call
        self._found: dict[PositionRule, tuple[Tensor, Tensor] | None] = {}

    def tokens(self) -> Tensor | None:
        """``(B, T)`` ids on the CPU, ``PADDING`` where a column holds no token; None for a call with embeddings."""
        if self.ids is None:
            return None
        ids = self.ids.detach().cpu()
        return torch.where(self._unpadded(*ids.shape), ids, PADDING)

    def state(self, owner: str) -> TokenState | None:
        """What ``owner`` kept of the cached tokens; columns that it has not seen count as padding."""
        if not self.past:
            return None
        state = state_of(self.cache, owner)
        if state is None:
            return None if self.ids is None else unseen(len(self.ids), self.past)
        if state.width < self.past:  # calls that the owner did not see, for instance while it was switched off
            return state.joined(unseen(len(state.ids), self.past - state.width, state.fires))
        return state.cut(self.past)

    def positions(
        self, rule: PositionRule, subjects: IdSequences | None, rows: int, width: int
    ) -> tuple[Tensor, Tensor] | None:
        """``(row, column)`` indices of the tokens that a position rule names, or None if this call has none."""
        if rule not in self._found:
            self._found[rule] = self._find(rule, subjects, rows, width)
        return self._found[rule]

    def _find(
        self, rule: PositionRule, subjects: IdSequences | None, rows: int, width: int
    ) -> tuple[Tensor, Tensor] | None:
        if self.past and rule.kind != "all" and self.lengths is None:
            return None  # a decoding step: the prompt was edited in the prefill
        if self.past and rule.kind != "all" and self.past >= self._widest(rows):
            return None
        starts, filled = self._extent(rows, width)
        lengths = filled if self.lengths is None else _expand(self.lengths, rows)
        found_subjects = None
        if rule.needs_subject and self.ids is not None:
            found_subjects = (subjects or IdSequences()).mask(self.ids)
        mask = rule.mask(starts, lengths, self.past + torch.arange(width), found_subjects)
        if self.lengths is None and rule.kind == "all":
            mask &= self._unpadded(rows, width)
        row, column = mask.nonzero(as_tuple=True)
        return (row, column) if len(row) else None

    def _widest(self, rows: int) -> int:
        """An upper bound on the absolute position of the prompts' ends, computed without a device synchronisation."""
        if self.attention_mask is not None:
            starts, _ = self._extent(rows, self.attention_mask.shape[1])
            return int((starts + _expand(self.lengths or (), rows)).max())
        return max(self.lengths or (0,))

    def _extent(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """``(B,)`` absolute start and ``(B,)`` length of the unpadded part of each row."""
        mask = self.attention_mask
        if mask is None or mask.shape[0] != rows:
            return torch.zeros(rows, dtype=torch.long), torch.full((rows,), self.past + width)
        kept = mask.detach().cpu() != 0  # (B, past + T)
        position = torch.arange(kept.shape[1]).expand_as(kept)
        starts = torch.where(kept, position, kept.shape[1]).min(1).values
        ends = torch.where(kept, position, -1).max(1).values + 1
        return starts, (ends - starts).clamp(min=0)

    def _unpadded(self, rows: int, width: int) -> Tensor:
        mask = self.attention_mask
        if mask is None or mask.shape[0] != rows:
            return torch.ones(rows, width, dtype=torch.bool)
        return mask.detach().cpu()[:, -width:] != 0


def _expand(lengths: Sequence[int], rows: int) -> Tensor:
    """One length a row: beams and return sequences repeat a prompt's row, so its length is repeated too."""
    if not lengths or rows % len(lengths):
        raise PositionError(f"prompts() was given {len(lengths)} lengths, but the model was called with {rows} rows")
    return torch.tensor(list(lengths)).repeat_interleave(rows // len(lengths))


class _ThreadState(threading.local):
    """What one thread has under way: its running calls, innermost last, the last one that ended, and announced lengths."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outer: list[Tensor | None] = []
        self.ended: Call | None = None
        self.lengths: Sequence[int] | None = None

    def __reduce__(self) -> tuple[type[_ThreadState], tuple[()]]:  # a deep copy starts anew
        return _ThreadState, ()


class CallTracker:
    """Keeps the arguments of the running call, for each thread its own.

    Args:
        model: the outermost model, the one that users call.
        owner: the module in it that calls the decoder blocks (``model.model`` of most). Its calls are tracked, so that calls of
            it and of the whole model are one thing; where it receives embeddings alone, the outer call's ids are taken.
    """

    def __init__(self, model: nn.Module, owner: nn.Module):
        self._model, self._owner = model, owner
        self._handles: list[Any] = []
        self._finish: Callable[[Call], TokenState | None] | None = None
        self._name = ""
        self._state = _ThreadState()

    def attach(self, finish: Callable[[Call], TokenState | None] | None = None, owner: str = "") -> None:
        """Put the hooks on the model.

        Args:
            finish: called at a call's end; the state that it returns is kept beside the KV cache.
            owner: the name under which it is kept.
        """
        if self._handles:
            return
        self._finish, self._name = finish, owner
        self._handles = [
            self._owner.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._owner.register_forward_hook(self._leave, always_call=True),
        ]
        if self._owner is not self._model:
            self._handles += [
                self._model.register_forward_pre_hook(self._enter_outer, with_kwargs=True),
                self._model.register_forward_hook(self._leave_outer, always_call=True),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextlib.contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside, row i of a batch starts with a prompt of ``lengths[i]`` tokens, padding not counted.

        Only position rules ask. Without it, all tokens of a call that finds no cached tokens count as prompt.
        """
        state = self._state
        before, state.lengths = state.lengths, tuple(int(n) for n in lengths)
        try:
            yield
        finally:
            state.lengths = before

    def current(self, rows: int, width: int) -> Call:
        """The running call.

        A block that is called on its own, as gradient checkpointing does in the backward pass, belongs to the last call of this
        shape; if there is none, to one without padding and cache.
        """
        state = self._state
        if state.calls:
            return state.calls[-1]
        ended = state.ended
        if ended is not None and ended.ids is not None and tuple(ended.ids.shape) == (rows, width):
            return ended
        return Call(None, None, 0, None, state.lengths)

    def _enter_outer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._state.outer.append(_arguments(module, args, kwargs).get("input_ids"))

    def _leave_outer(self, *_: Any) -> None:
        if self._state.outer:
            self._state.outer.pop()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given, outer = _arguments(module, args, kwargs), self._state.outer
        ids, past = given.get("input_ids"), _past_length(given)
        if ids is None and outer and outer[-1] is not None and outer[-1].shape == given["inputs_embeds"].shape[:2]:
            ids = outer[-1]
        mask = _padding_mask(given.get("attention_mask"), past)
        self._state.calls.append(Call(ids, mask, past, given.get("past_key_values"), self._state.lengths))

    def _leave(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        if not self._state.calls:  # hooks that were put on inside a running call see its end, not its beginning
            return
        call = self._state.ended = self._state.calls.pop()
        state = None if self._finish is None or output is None else self._finish(call)  # no output: the call failed
        given = getattr(output, "past_key_values", None)  # where caches are tuples, each call returns a new one
        cache = call.cache if given is None else given
        if cache is not None and state is not None:
            keep_state(cache, self._name, state)


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name; models differ in their order."""
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs


def _padding_mask(mask: Any, past: int) -> Tensor | None:
    """``(B, past + T)``, nonzero at tokens; None if the call has no mask.

    With a static cache, ``generate`` passes the attention's own mask ``(B, 1, T, K)``, True or 0.0 where a query may look, or a
    dictionary of them, one for each kind of layer. The last query sees every token that is not padding.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask[:, 0, -1, : past + mask.shape[2]]
        return seen if seen.dtype == torch.bool else seen == 0
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _past_length(call: Mapping[str, Any]) -> int:
    cache, position = call.get("past_key_values"), call.get("cache_position")
    if cache is None:
        return 0
    if position is not None:  # a sliding or static cache does not know its length
        return int(position[0])
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) else 0  # the legacy tuple of (key, value) pairs


def hook_block(block: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``change(hidden (B, T, d)) -> hidden | None`` on a block's output, a tensor or a tuple led by one."""

    return block.register_forward_hook(_BlockHook(change))


class _BlockHook:
    """A forward hook that a deep copy of the model copies with what it refers to, as it does not a function's closure."""

    def __init__(self, change: Callable[[Tensor], Tensor | None]):
        self._change = change

    def __call__(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = self._change(hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
