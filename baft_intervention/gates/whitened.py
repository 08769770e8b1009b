"""The ``whitened`` gate: the paper's linear gate, initialised from the edit's whitened representation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import WeightingNetwork, register_weighting
from .whitening import Whitening


@register_weighting("whitened")
class WhitenedWeighting(WeightingNetwork):
    """``w(h) = sigmoid(W (h - mu) + c)``, one logistic unit for each basis, initialised from whitened data (ours).

    With ``S`` the whitening by unrelated text and ``e`` the edit's own representation, every row of ``W`` starts at

        W_k = a S S (e - mu) / |S (e - mu)|^2,       c_k = -a theta,

    the linear discriminant of the edit against the bank with the whitening folded in: its logit is ``a (1 - theta)`` at the
    edit, and ``theta`` is calibrated so that a share ``false_positive_rate`` of the bank has a positive one (never below
    ``floor``). ``W`` and ``c`` are trained from there: ``r (d + 1)`` parameters. Edits compete by the mean logit over ``a``.

    Unlike a cosine, the logit grows with the size of ``h``, and training may move the rows apart.

    Args:
        sharpness: ``a``.
        false_positive_rate: share of the bank that may reach weight 0.5 at the start, in (0, 1).
        floor: smallest ``theta``.
    """

    routed = True
    needs_bank = True
    shared = ("whitening",)

    def __init__(
        self,
        embed_dim: int,
        rank: int,
        *,
        sharpness: float = 20.0,
        false_positive_rate: float = 0.005,
        floor: float = 0.3,
    ):
        super().__init__(embed_dim, rank)
        if not (sharpness > 0 and math.isfinite(sharpness)):
            raise ConfigError(f"sharpness is {sharpness}; it must be positive")
        if not 0.0 < false_positive_rate < 1.0:
            raise ConfigError(f"false_positive_rate is {false_positive_rate}; it must lie strictly between 0 and 1")
        if not -1.0 <= floor < 1.0:
            raise ConfigError(f"floor is {floor}; the edit's own input has 1, so it must be in [-1, 1)")
        self.sharpness, self.false_positive_rate, self.floor = float(sharpness), false_positive_rate, floor
        self.whitening = Whitening(embed_dim)
        self.weight = nn.Parameter(torch.zeros(rank, embed_dim))
        self.bias = nn.Parameter(torch.full((rank,), -float(sharpness)))  # closed until initialised

    def _logits(self, h: Tensor) -> Tensor:
        return F.linear(h - self.whitening.mean, self.weight, self.bias)  # (..., r)

    def match(self, h: Tensor) -> Tensor:
        return self._logits(h).mean(-1) / self.sharpness

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self._logits(h))

    def fit_shared(self, bank: Tensor) -> None:
        self.whitening.fit(bank)

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None) -> None:
        if bank is None:
            raise ConfigError("the whitened weighting needs a bank of unrelated representations, got None")
        white = self.whitening(h_edit.mean(0))  # S (e - mu)
        direction = self.whitening(white + self.whitening.mean) / white.square().sum().clamp(
            min=1e-12
        )  # S is symmetric
        similar = (bank - self.whitening.mean) @ direction  # 1 at the edit
        theta = torch.quantile(similar.float(), 1.0 - self.false_positive_rate).clamp(min=self.floor, max=0.95)
        self.weight.copy_(self.sharpness * direction.expand_as(self.weight))
        self.bias.copy_((-self.sharpness * theta).expand_as(self.bias))
