"""Which directions each edit of a layer gets: new ones while the dimension lasts, then those that are used least.

The load of a unit direction ``u`` by edits with bases ``R_i (r, d)`` is

    u^T M u = sum_i |R_i u|^2,      M = sum_i R_i^T R_i  (d, d):

how many edits write along it. A new edit is allotted the eigenvectors of ``M`` with the smallest eigenvalue (with the ``r``
smallest, where fewer than ``r`` have that one), and is trained within their span
(:meth:`~.BasisWeightedMap.allot`). In an adapter of ``T`` edits these are the ``d - T r`` directions
that no edit uses; when all of them are used, all have load 1, and it begins again.

``M`` is all that is kept: an edit enters or leaves it by ``2 r d^2`` operations, and an allotment is one eigendecomposition (0.05 s
at d = 576, 1.5 s at d = 2048, one CPU core), however many edits there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# entries are multiples of this, whose sums are exact in fp64 up to a load of 2^17: an edit leaves no trace when it goes
_GRAIN = 2.0**-36
_SAME = 1e-3  # eigenvalues that differ by less are one


class Allotment:
    """The load of the directions of one layer.

    Args:
        dim: d.
        bases: ``R (r, d)`` of each edit that is there.
    """

    def __init__(self, dim: int, bases: Iterable[Tensor] = ()):
        self.load = torch.zeros(dim, dim, dtype=torch.float64)  # M
        for basis in bases:
            self.add(basis)

    def add(self, basis: Tensor) -> None:
        """Count an edit's ``R (r, d)`` in."""
        self.load += _own_load(basis)

    def remove(self, basis: Tensor) -> None:
        """Count an edit's ``R (r, d)`` out; :attr:`load` is then, to the last bit, what it was without it."""
        self.load -= _own_load(basis)

    def next(self, rank: int) -> Tensor:
        """The directions for an edit, ``(n, d)`` fp64 orthonormal rows, n >= rank; :attr:`load` stays as it is."""
        values, vectors = torch.linalg.eigh(self.load)
        return vectors[:, values < values[rank - 1] + _SAME].mT


def _own_load(basis: Tensor) -> Tensor:
    wide = basis.detach().cpu().double()
    return (wide.mT @ wide / _GRAIN).round() * _GRAIN
