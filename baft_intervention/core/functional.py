"""The map as pure functions on tensors.

    Phi(h) = h + R^T diag(w) (A h + b - R h) = h + sum_k w_k r_k (a_k^T h + b_k - r_k^T h)

``R (r, d)`` has orthonormal rows ``r_k``, ``A (r, d)`` and ``b (r,)`` are the projected source of LoReFT (Wu et al.
2024, arXiv 2404.03592: ``w = 1``), and ``w = w(h) in (0, 1)^r`` weighs each basis by the input
(BaFT, Liu et al. 2025, arXiv 2503.00306; the exact form of ``w`` is our reading).

All functions broadcast over leading dimensions: ``h (..., d)`` with one map, or ``h (E, n, d)`` with ``E`` stacked
maps ``R (E, r, d)``. Arithmetic is in the dtype of the parameters (fp32 in the library); the caller casts the result
back to the dtype of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor


def baft_update(h: Tensor, basis: Tensor, source: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    """``Phi(h) - h``, the update alone.

    Args:
        h: ``(..., n, d)`` representations, n of them for each map.
        basis: ``R (..., r, d)``, orthonormal rows.
        source: ``A (..., r, d)``.
        bias: ``b (..., r)``.
        weights: ``w(h) (..., n, r)``.

    Returns:
        ``(..., n, d)`` in the dtype of ``basis``.
    """
    h = h.to(basis.dtype)
    # (A - R) h in one product: A h + b - R h  -> (..., n, r)
    coordinates = h @ (source - basis).mT + bias.unsqueeze(-2)
    return (weights * coordinates) @ basis


def update_bound(basis: Tensor, source: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Constants ``(L, c)`` of ``|Phi(h) - h| <= L |h| + c`` for weights in [0, 1].

    ``R^T`` is an isometry and weights shrink, so ``|Phi(h) - h| <= |(A - R) h + b| <= |A - R|_2 |h| + |b|``.
    """
    return torch.linalg.matrix_norm(source - basis, ord=2), torch.linalg.vector_norm(bias, dim=-1)
