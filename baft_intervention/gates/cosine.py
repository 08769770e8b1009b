"""The ``cosine`` gate: open where the input has the direction of the edit's own prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .base import WeightingNetwork, register_weighting
from .whitening import Whitening


def gate(sharpness: float, match: Tensor, rank: int) -> Tensor:
    """``sigmoid(sharpness match)`` for every basis, ``(...) -> (..., r)``, and exactly 0 below 0.001.

    Below it an update is only noise. With the cut-off, unrelated input leaves the model's output bit for bit unchanged.
    """
    weight = torch.sigmoid(sharpness * match)
    weight = torch.where(weight < 1e-3, torch.zeros_like(weight), weight)
    return weight.unsqueeze(-1).expand(*match.shape, rank)


@register_weighting("cosine")
class CosineWeighting(WeightingNetwork):
    """``w(h) = sigmoid(a (cos(S(h - mu), e) - theta))``: open where the input has the edit's direction (ours).

    ``S`` whitens by the covariance of unrelated text (:class:`~baft_intervention.gates.whitening.Whitening`, shared by all
    edits), ``e`` is the whitened representation of the edit's own prompt, and ``theta`` is calibrated on the bank:
    the similarity that only a share ``false_positive_rate`` of unrelated inputs exceeds, at least ``floor``.
    Nothing is trained: d + 1 stored numbers an edit. Edits compete by ``cos - theta``.

    In raw coordinates all hidden states point the same way (a few huge common directions); whitened, an unrelated
    prompt has a cosine near 0 and a paraphrase one of 0.4 to 0.9 in late layers.

    Args:
        sharpness: ``a``; at 60 a weight goes from 0.05 to 0.95 within a cosine of 0.1.
        false_positive_rate: share of the bank that may reach weight 0.5, in (0, 1).
        floor: smallest ``theta``, for a bank without anything near the edit.
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
        self.register_buffer("key", torch.zeros(embed_dim))  # e / |e|; 0: closed until initialised
        self.register_buffer("threshold", torch.tensor(float(floor)))

    def match(self, h: Tensor) -> Tensor:
        return F.normalize(self.whitening(h), dim=-1) @ self.key - self.threshold

    def forward(self, h: Tensor) -> Tensor:
        return gate(self.sharpness, self.match(h), self.rank)

    def fit_shared(self, bank: Tensor) -> None:
        self.whitening.fit(bank)

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None) -> None:
        if bank is None:
            raise ConfigError("the cosine weighting needs a bank of unrelated representations, got None")
        self.key.copy_(F.normalize(F.normalize(self.whitening(h_edit), dim=-1).mean(0), dim=0))
        similarity = F.normalize(self.whitening(bank), dim=-1) @ self.key  # (N,)
        theta = torch.quantile(similarity.float(), 1.0 - self.false_positive_rate)
        self.threshold.copy_(theta.clamp(min=self.floor, max=0.99))
