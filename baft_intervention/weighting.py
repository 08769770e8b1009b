"""Weighting networks: how much each basis acts on an input.

A weighting network computes ``w(h) in (0, 1)^r`` from a representation ``h (..., d)``. The paper gives the idea (one
weight for each basis, computed from the input); the forms below are our reading, except where said.

=============  ==========================================  ======================================================
name           w(h)                                        for
=============  ==========================================  ======================================================
``constant``   ``value``                                   BaFT becomes ReFT; ``value=1`` is exactly LoReFT
``linear``     ``sigmoid(W norm(h) + c)``                  the plainest reading of the paper
``mlp``        ``sigmoid(W2 gelu(W1 norm(h) + c1) + c2)``  a curved border between edited and other input
``cosine``     ``sigmoid(a (cos(S(h - mu), e) - theta))``  edits that must leave all else alone (the default)
=============  ==========================================  ======================================================

A network of your own is one class and one line::

    @register_weighting("mine")
    class Mine(WeightingNetwork):
        def forward(self, h): ...

Parameters and buffers of a network are stacked over edits by :func:`torch.func.functional_call` under ``vmap``, so a
network is written for one edit and works for thousands. What all edits share (the whitening) lives in ``shared``
submodules, which are stored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError
from .whitening import Whitening

_REGISTRY: dict[str, type[WeightingNetwork]] = {}
_Network = TypeVar("_Network", bound="type[WeightingNetwork]")


class WeightingNetwork(nn.Module):
    """Base class: ``forward(h (..., d)) -> w (..., r)``, fp32 in and out.

    Class attributes:
        routed: whether :meth:`match` tells how well an input fits the edit. The edits of an adapter with a routed
            network compete, and only the best match acts; otherwise the updates of all edits are summed.
        needs_bank: whether :meth:`start_from` needs unrelated representations.
        shared: names of submodules that all edits of a layer have in common.
    """

    routed: ClassVar[bool] = False
    needs_bank: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()

    def __init__(self, embed_dim: int, rank: int):
        super().__init__()
        self.embed_dim, self.rank = embed_dim, rank

    def forward(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def match(self, h: Tensor) -> Tensor:
        """``(...,)``: above 0 where the input is taken to be the edit's; comparable between edits."""
        raise NotImplementedError(f"{type(self).__name__} is not routed: it has no match")

    def fit_shared(self, bank: Tensor) -> None:
        """Fit what all edits of a layer share to the bank ``(N, d)``; once a model and layer. Nothing by default."""

    @torch.no_grad()
    def start_from(self, h_edit: Tensor, bank: Tensor | None) -> None:
        """Start from data: ``h_edit (n, d)``, the edit's own representations, and ``bank (N, d)``, unrelated ones.

        Called once before training, at the positions that will be edited. Nothing by default.
        """


def register_weighting(name: str) -> Callable[[_Network], _Network]:
    """Class decorator: make a network known as ``name`` to configs, adapters and the command line.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def register(cls: _Network) -> _Network:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigError(f"the weighting name {name!r} is taken by {taken.__qualname__}; choose another name")
        _REGISTRY[name] = cls
        return cls

    return register


def weighting_names() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def weighting_class(name: str) -> type[WeightingNetwork]:
    """The registered class.

    Raises:
        ConfigError: no network of this name; the message lists those that there are.
    """
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


@register_weighting("constant")
class ConstantWeighting(WeightingNetwork):
    """``w(h) = value`` for every input: ReFT. ``value = 1`` is LoReFT (Wu et al. 2024). No parameters.

    Args:
        value: the weight, in [0, 1].
    """

    value: Tensor

    def __init__(self, embed_dim: int, rank: int, *, value: float = 1.0):
        super().__init__(embed_dim, rank)
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"the constant weight is {value}; it must be in [0, 1]")
        self.register_buffer("value", torch.full((rank,), float(value)))

    def forward(self, h: Tensor) -> Tensor:
        return self.value.expand(*h.shape[:-1], self.rank)


def _logit(p: float) -> float:
    if not 0.0 < p < 1.0:
        raise ConfigError(f"initial_weight is {p}; it must lie strictly between 0 and 1")
    return math.log(p / (1.0 - p))


@register_weighting("linear")
class LinearWeighting(WeightingNetwork):
    """``w(h) = sigmoid(W norm(h) + c)``, one logistic unit for each basis: ``r (d + 1)`` parameters.

    The representation is layer-normed first (no parameters): a residual stream's size grows by orders of magnitude
    along the layers, and an unscaled logit would saturate. Without a locality term nothing tells this gate what to
    leave alone, and it settles near 0.7 on everything; give ``locality_coefficient`` (METHOD: unrelated locality of
    54 against LoReFT's 44 on ZsRE at coefficient 1).

    Args:
        initial_weight: ``w`` at the start, in (0, 1); ``W`` starts small.
        std: standard deviation of ``W`` at the start, in units of ``1 / sqrt(d)``.
    """

    def __init__(self, embed_dim: int, rank: int, *, initial_weight: float = 0.5, std: float = 0.1):
        super().__init__(embed_dim, rank)
        self.weight = nn.Parameter(torch.randn(rank, embed_dim) * (std / math.sqrt(embed_dim)))
        self.bias = nn.Parameter(torch.full((rank,), _logit(initial_weight)))

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(F.layer_norm(h, (self.embed_dim,)), self.weight, self.bias))


@register_weighting("mlp")
class MLPWeighting(WeightingNetwork):
    """``w(h) = sigmoid(W2 gelu(W1 norm(h) + c1) + c2)``: ``m (d + 1) + r (m + 1)`` parameters for m hidden units.

    Args:
        hidden: m, the number of hidden units.
        initial_weight: ``w`` at the start, in (0, 1).
    """

    def __init__(self, embed_dim: int, rank: int, *, hidden: int = 8, initial_weight: float = 0.5):
        super().__init__(embed_dim, rank)
        if not isinstance(hidden, int) or hidden < 1:
            raise ConfigError(f"hidden is {hidden!r}; it must be a whole number of at least 1")
        self.weight_in = nn.Parameter(torch.randn(hidden, embed_dim) / math.sqrt(embed_dim))
        self.bias_in = nn.Parameter(torch.zeros(hidden))
        self.weight_out = nn.Parameter(torch.randn(rank, hidden) * (0.1 / math.sqrt(hidden)))
        self.bias_out = nn.Parameter(torch.full((rank,), _logit(initial_weight)))

    def forward(self, h: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(h, (self.embed_dim,)), self.weight_in, self.bias_in))
        return torch.sigmoid(F.linear(hidden, self.weight_out, self.bias_out))


@register_weighting("cosine")
class CosineWeighting(WeightingNetwork):
    """``w(h) = sigmoid(a (cos(S(h - mu), e) - theta))``: open where the input points the edit's way (ours).

    ``S`` whitens by the covariance of unrelated text (:class:`~baft_intervention.whitening.Whitening`, shared by all
    edits), ``e`` is the whitened representation of the edit's own prompt, and ``theta`` is calibrated on the bank:
    the similarity that only a share ``false_positive_rate`` of unrelated inputs exceeds, and never below ``floor``.
    Nothing of it is trained: d + 1 stored numbers an edit. Edits compete by ``cos - theta``.

    In raw coordinates all hidden states point the same way (a few huge common directions); whitened, an unrelated
    prompt has a cosine near 0 and a paraphrase one of 0.4 to 0.9 in late layers.

    Args:
        sharpness: ``a``; at 60 a weight goes from 0.05 to 0.95 within a cosine of 0.1.
        false_positive_rate: share of the bank that may reach weight 0.5, in (0, 1).
        floor: smallest ``theta``, for a bank that happens to hold nothing near the edit.
    """

    routed = True
    needs_bank = True
    shared = ("whitening",)
    key: Tensor
    threshold: Tensor

    def __init__(
        self,
        embed_dim: int,
        rank: int,
        *,
        sharpness: float = 60.0,
        false_positive_rate: float = 0.005,
        floor: float = 0.2,
    ):
        super().__init__(embed_dim, rank)
        if not sharpness > 0:
            raise ConfigError(f"sharpness is {sharpness}; it must be positive")
        if not 0.0 < false_positive_rate < 1.0:
            raise ConfigError(f"false_positive_rate is {false_positive_rate}; it must lie strictly between 0 and 1")
        if not -1.0 <= floor < 1.0:
            raise ConfigError(f"floor is {floor}; a cosine threshold must be in [-1, 1)")
        self.sharpness, self.false_positive_rate, self.floor = float(sharpness), false_positive_rate, floor
        self.whitening = Whitening(embed_dim)
        self.register_buffer("key", torch.zeros(embed_dim))  # e / |e|; 0 = closed until started
        self.register_buffer("threshold", torch.tensor(float(floor)))

    def match(self, h: Tensor) -> Tensor:
        return F.normalize(self.whitening(h), dim=-1) @ self.key - self.threshold

    def forward(self, h: Tensor) -> Tensor:
        gate = torch.sigmoid(self.sharpness * self.match(h))
        # below 0.001 the update is nothing but noise: cut it, so that unrelated input leaves the model bit for bit
        gate = torch.where(gate < 1e-3, torch.zeros_like(gate), gate)
        return gate.unsqueeze(-1).expand(*h.shape[:-1], self.rank)

    def fit_shared(self, bank: Tensor) -> None:
        self.whitening.fit(bank)

    @torch.no_grad()
    def start_from(self, h_edit: Tensor, bank: Tensor | None) -> None:
        if bank is None:
            raise ConfigError("the cosine weighting needs a bank of unrelated representations; give bank_size > 0")
        self.key.copy_(F.normalize(F.normalize(self.whitening(h_edit), dim=-1).mean(0), dim=0))
        similarity = F.normalize(self.whitening(bank), dim=-1) @ self.key  # (N,)
        theta = torch.quantile(similarity.float(), 1.0 - self.false_positive_rate)
        self.threshold.copy_(theta.clamp(min=self.floor, max=0.99))
