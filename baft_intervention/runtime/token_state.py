"""What the edits remember of the tokens they have seen, kept beside the KV cache.

A gate that looks back needs something of every earlier token. Like keys and values, it is computed once a token and then kept
with the sequence: as tensors ``(B, C, ...)``, a column for each token that the KV cache holds. The state is an attribute of the
cache object, so it is copied with it, and the cache's methods that reorder or repeat sequences do the same to the state.
A shortened cache needs nothing: the state is cut to the cache's length when the next call begins.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PADDING = -1  # the id of a column that holds no token
_ATTRIBUTE = "_baft_token_states"


class TokenState:
    """The columns of B sequences.

    Args:
        ids: ``(B, C)`` token ids on the CPU, ``PADDING`` where a column holds no token.
        tensors: ``name -> (B, C, ...)``.
        fires: for each sequence ``(column, edit)`` of the tokens at which an edit began to act.
    """

    def __init__(self, ids: Tensor, tensors: Mapping[str, Tensor], fires: Sequence[Sequence[tuple[int, str]]]):
        self.ids, self.tensors, self.fires = ids, dict(tensors), [list(own) for own in fires]

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def cut(self, width: int) -> TokenState:
        """The first ``width`` columns."""
        if width == self.width:
            return self
        fires = [[fire for fire in own if fire[0] < width] for own in self.fires]
        return TokenState(self.ids[:, :width], {name: t[:, :width] for name, t in self.tensors.items()}, fires)

    def joined(self, new: TokenState) -> TokenState:
        """These columns followed by those of ``new``, which has the fires of both; a tensor that one of them lacks is 0 there."""
        tensors = {}
        for name in {**self.tensors, **new.tensors}:
            like = new.tensors.get(name, self.tensors.get(name))
            assert like is not None
            parts = (
                state.tensors.get(name, like.new_zeros(*state.ids.shape, *like.shape[2:])) for state in (self, new)
            )
            tensors[name] = torch.cat([part.to(like.device) for part in parts], 1)
        return TokenState(torch.cat([self.ids, new.ids], 1), tensors, new.fires)

    def select(self, index: Tensor) -> None:
        """Keep the sequences ``index (B',)``, in this order."""
        self.ids = self.ids[index.to(self.ids.device)]
        self.tensors = {name: t[index.to(t.device)] for name, t in self.tensors.items()}
        self.fires = [list(self.fires[i]) for i in index.tolist()]

    def repeat(self, times: int) -> None:
        """Repeat each sequence, copies side by side."""
        self.select(torch.arange(len(self.ids)).repeat_interleave(times))


def unseen(rows: int, width: int, fires: Sequence[Sequence[tuple[int, str]]] | None = None) -> TokenState:
    """The state of ``width`` columns that nobody has read: they count as padding. ``fires`` are those before them."""
    return TokenState(torch.full((rows, width), PADDING), {}, [()] * rows if fires is None else fires)


def state_of(cache: Any, owner: str) -> TokenState | None:
    """The state that ``owner`` left at a KV cache, or None."""
    return getattr(_holder(cache), _ATTRIBUTE, {}).get(owner)


def keep_state(cache: Any, owner: str, state: TokenState) -> None:
    """Leave ``state`` at a KV cache, and let the cache's methods that move sequences move it too."""
    holder = _holder(cache)
    if not hasattr(holder, _ATTRIBUTE):
        if holder is cache:
            cache.__class__ = _following(type(cache))
        setattr(holder, _ATTRIBUTE, {})
    getattr(holder, _ATTRIBUTE)[owner] = state


def _holder(cache: Any) -> Any:
    """What can carry an attribute: the cache, or the first tensor of the tuples that transformers 4 returns."""
    return cache[0][0] if isinstance(cache, tuple) else cache


@functools.cache
def _following(cls: type) -> type:
    """A subclass of a cache's class whose methods that move sequences also move the states."""

    def states(cache: Any) -> Sequence[TokenState]:
        return list(getattr(cache, _ATTRIBUTE, {}).values())

    def reorder_cache(self: Any, beam_idx: Tensor) -> Any:
        for state in states(self):
            state.select(beam_idx)
        return cls.reorder_cache(self, beam_idx)  # pyright: ignore[reportAttributeAccessIssue]

    def batch_select_indices(self: Any, indices: Tensor) -> Any:
        for state in states(self):
            state.select(indices)
        return cls.batch_select_indices(self, indices)  # pyright: ignore[reportAttributeAccessIssue]

    def batch_repeat_interleave(self: Any, repeats: int) -> Any:
        for state in states(self):
            state.repeat(repeats)
        return cls.batch_repeat_interleave(self, repeats)  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # this class has no name by which a pickle could find it
        _, arguments, *rest = object.__reduce_ex__(self, 2)
        return (_new, (cls, *arguments[1:]), *rest)

    own = (reorder_cache, batch_select_indices, batch_repeat_interleave)
    methods = {method.__name__: method for method in own if hasattr(cls, method.__name__)}
    names = {"__reduce_ex__": __reduce_ex__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**methods, **names})


def _new(cls: type, *arguments: Any) -> Any:
    following = _following(cls)
    return following.__new__(following, *arguments)
