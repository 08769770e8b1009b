"""Gates without data: ``constant`` is fixed, ``linear`` and ``mlp`` are trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import WeightingNetwork, register_weighting

_MOST_HIDDEN = 65536  # a slip or a hostile file must not fill the memory


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
    along the layers, and an unscaled logit would saturate. Without a locality term this gate cannot learn what to
    leave alone and settles near 0.7 on every input; set ``locality_coefficient`` (at 1, unrelated locality on ZsRE is 54
    against LoReFT's 44).

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
        if not isinstance(hidden, int) or not 1 <= hidden <= _MOST_HIDDEN:
            raise ConfigError(f"hidden is {hidden!r}; it must be a whole number of at least 1, at most {_MOST_HIDDEN}")
        self.weight_in = nn.Parameter(torch.randn(hidden, embed_dim) / math.sqrt(embed_dim))
        self.bias_in = nn.Parameter(torch.zeros(hidden))
        self.weight_out = nn.Parameter(torch.randn(rank, hidden) * (0.1 / math.sqrt(hidden)))
        self.bias_out = nn.Parameter(torch.full((rank,), _logit(initial_weight)))

    def forward(self, h: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(h, (self.embed_dim,)), self.weight_in, self.bias_in))
        return torch.sigmoid(F.linear(hidden, self.weight_out, self.bias_out))
