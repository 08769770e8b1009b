"""The base class of weighting networks, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import registrar

_REGISTRY: dict[str, type[WeightingNetwork]] = {}
_Network = TypeVar("_Network", bound="type[WeightingNetwork]")


class WeightingNetwork(nn.Module):
    """Base class: ``forward(h (..., d)) -> w (..., r)``, fp32 in and out.

    Class attributes:
        routed: whether the network has a :meth:`match`. Edits with a routed network compete, and only the edit with the
            largest match acts at a position; otherwise the updates of all edits are summed.
        reads_tokens: whether the network itself decides where an edit acts, at every token, from the tokens so far
            (:class:`~baft_intervention.gates.fact.FactWeighting`); otherwise the edits act at the positions of a rule.
        needs_bank: whether :meth:`initialise` needs unrelated representations.
        shared: names of submodules that all edits of a layer share.
        layout: version of its saved tensors. Raise it when their names, shapes or meaning change, so that older adapters
            are refused with a reason.
    """

    routed: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False
    needs_bank: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[int] = 1

    def __init__(self, embed_dim: int, rank: int):
        super().__init__()
        self.embed_dim, self.rank = embed_dim, rank

    def forward(self, h: Tensor) -> Tensor:
        """``w(h)``."""
        raise NotImplementedError

    def match(self, h: Tensor) -> Tensor:
        """``(...,)``: positive if the input belongs to the edit."""
        raise NotImplementedError(f"{type(self).__name__} is not routed: it has no match")

    def fit_shared(self, bank: Tensor) -> None:
        """Fit the ``shared`` submodules to the bank ``(N, d)``, once a model and layer. The default does nothing."""

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None) -> None:
        """Initialise from data, once before training. The default does nothing.

        Args:
            h_edit: ``(n, d)`` representations of the edit's own prompts at the positions that are edited.
            bank: ``(N, d)`` unrelated representations.
        """


def register_weighting(name: str) -> Callable[[_Network], _Network]:
    """Class decorator: make a network known as ``name`` to configs, adapters and the command line.

    Raises:
        ConfigError: the name is taken by another class.
    """
    return registrar(_REGISTRY, name, "weighting name")


def weighting_names() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def weighting_class(name: str) -> type[WeightingNetwork]:
    """The registered class.

    Raises:
        ConfigError: no network has this name; the message lists the known ones.
    """
    if name == "subject_relation":
        raise ConfigError(
            "weighting is 'subject_relation', the default gate of an earlier version, which is gone; edit again with the present "
            "one: the requests of an adapter are in its adapter.json under edits"
        )
    if name not in _REGISTRY:
        raise ConfigError(f"weighting is {name!r}; known networks: {', '.join(weighting_names())}")
    return _REGISTRY[name]


def make_weighting(name: str, embed_dim: int, rank: int, **options: Any) -> WeightingNetwork:
    """Build a network.

    Raises:
        ConfigError: an unknown name, or an option that the network does not take.
    """
    cls = weighting_class(name)
    try:
        return cls(embed_dim, rank, **options)
    except TypeError as error:
        raise ConfigError(f"weighting_options {options!r} do not fit the weighting {name!r}: {error}") from None
