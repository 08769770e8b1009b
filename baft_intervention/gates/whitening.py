"""Whitening by unrelated text: coordinates in which a gate can tell inputs apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class Whitening(nn.Module):
    """``S(h - mu)`` with ``S = C^(-1/2)`` up to a factor, ``C = (1 - s) cov + s mean_variance I`` (shrunk).

    Kept as a low-rank form, exact up to ``tolerance``: with eigenpairs ``(l_i, u_i)`` of ``C`` and its smallest
    eigenvalue ``l_0 = s mean_variance``,

        S x = x - sum_i (1 - sqrt(l_0 / l_i)) u_i u_i^T x,

    where only directions with ``l_i`` well above ``l_0`` need a term. Identity until :meth:`fit`.

    Args:
        embed_dim: d.
        components: the number k of stored directions; set by :meth:`fit`, given only to load a fitted one.

    Shapes: ``mean (d,)``, ``directions (k, d)``, ``shrink (k,)``; k <= 512.
    """

    mean: Tensor
    directions: Tensor
    shrink: Tensor

    def __init__(self, embed_dim: int, components: int = 0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("directions", torch.zeros(components, embed_dim))
        self.register_buffer("shrink", torch.zeros(components))

    def forward(self, h: Tensor) -> Tensor:
        x = h.to(self.mean.dtype) - self.mean  # (..., d)
        return x - ((x @ self.directions.mT) * self.shrink) @ self.directions

    @torch.no_grad()
    def fit(
        self, bank: Tensor, *, shrinkage: float = 0.1, tolerance: float = 0.02, max_components: int = 512
    ) -> Whitening:
        """Set mean and directions from ``bank (N, d)``, N >= 2.

        Raises:
            ConfigError: fewer than two rows, values that are not finite, or a shrinkage outside (0, 1].
        """
        if bank.ndim != 2 or bank.shape[0] < 2 or bank.shape[1] != self.mean.shape[0]:
            raise ConfigError(f"a bank must be (N >= 2, {self.mean.shape[0]}) representations, got {tuple(bank.shape)}")
        if not torch.isfinite(bank).all():
            raise ConfigError("the bank has values that are not finite; check the model's dtype (fp16 overflow?)")
        if not 0.0 < shrinkage <= 1.0:
            raise ConfigError(f"shrinkage is {shrinkage}; it must be in (0, 1]")
        x = bank.double()
        mean = x.mean(0)
        x = x - mean
        _, singular, vt = torch.linalg.svd(x, full_matrices=False)
        variance = singular.square() / (x.shape[0] - 1)  # eigenvalues of the covariance, descending
        floor = shrinkage * x.square().sum() / (x.shape[0] - 1) / x.shape[1]
        shrink = 1.0 - torch.sqrt(floor / ((1.0 - shrinkage) * variance + floor))
        keep = (shrink > tolerance).nonzero().flatten()[:max_components]
        self.mean = mean.to(self.mean)
        self.directions = vt[keep].to(self.mean)
        self.shrink = shrink[keep].to(self.mean)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("directions", "shrink"):  # k is data, not structure: take the shape that comes
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(saved, device=self.mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
