"""Relation space: coordinates in which a relation stays the same under another wording and another subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelationSpace(nn.Module):
    """Directions of relations, and a dictionary of common ones.

    The input is ``x = u - c``: the whitened unit representation of a prompt's last token, minus the subject's share.
    Its direction has two halves of equal length,

        phi(x) = [x / |x|,  y / |y|] / sqrt(2),      y = A^T (x - m).

    The first half keeps everything: the relation and its wording. The second keeps what tells relations apart and drops
    wording and subject: ``A (d, k)`` is linear discriminant analysis (Fisher; the within-class covariance
    normalisation of speaker verification) of a dictionary in which every relation is asked of several subjects in several
    forms (``training/relation_dictionary.py``). With ``C_w`` the covariance of a relation's own prompts around their mean, shrunk,

        A = C_w^(-1/2) V_k,      V_k the k leading right singular vectors of the relations' means times C_w^(-1/2).

    ``rows (m, f, d + k)`` are the directions of the dictionary's relations in each of f forms, the competitors of an edit.
    Forms are kept apart because a prompt is near the rows of its own form, whatever its relation. ``meanings (m, k)`` are
    means over all forms.

    Args:
        embed_dim: d.
        components: k; if a small model or dictionary has fewer, the remaining columns are 0. With 0, ``phi`` is the first half.
    """

    mean: Tensor
    projection: Tensor
    rows: Tensor
    meanings: Tensor

    def __init__(self, embed_dim: int, components: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("projection", torch.zeros(embed_dim, components))
        # m and f are data, not structure: set by fit or by what is loaded
        self.register_buffer("rows", torch.zeros(0, 0, embed_dim + components))
        self.register_buffer("meanings", torch.zeros(0, components))

    @property
    def share(self) -> float:
        """The first half's share of the squared length."""
        return 0.5 if self.projection.shape[1] else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """``phi``: ``(..., d) -> (..., d + k)``, of length one (less where a half is 0)."""
        return torch.cat([F.normalize(x, dim=-1), self._meaning(x)], dim=-1) * self.share**0.5

    def _meaning(self, x: Tensor) -> Tensor:
        return F.normalize((x - self.mean) @ self.projection, dim=-1)

    def same(self, direction: Tensor) -> Tensor:
        """Cosines ``(..., d + k) -> (..., m)`` of a direction's second half to the ``meanings`` of the dictionary's relations.

        Without a second half, cosines to the rows of the first form.
        """
        if not self.projection.shape[1]:
            return direction @ self.rows[:, 0].mT
        return direction[..., self.mean.shape[0] :] @ self.meanings.mT / self.share**0.5

    def nearest(self, direction: Tensor) -> Tensor:
        """Cosines ``(..., d + k) -> (..., m)`` of a direction to each relation, in its nearest form."""
        return (direction @ self.rows.flatten(0, 1).mT).unflatten(-1, self.rows.shape[:2]).amax(-1)

    @torch.no_grad()
    def fit(
        self,
        units: Tensor,
        relation: Tensor,
        form: Tensor,
        subject: Tensor,
        centre: Tensor,
        *,
        competing: Sequence[int] = (0,),
        shrinkage: float = 0.3,
    ) -> RelationSpace:
        """Fit all buffers to the dictionary's prompts.

        Args:
            units: ``(N, d)`` whitened representations of length one.
            relation, form, subject: ``(N,)`` numbers of each prompt's relation, form and subject; form 0 is the statement.
            centre: numbers of the relations whose statements make up an edit's own centre ``c``.
            competing: the forms that get rows.
            shrinkage: share of the identity in ``C_w``, in (0, 1].
        """
        units = units.double()
        count, d = int(relation.max()) + 1, units.shape[1]
        subjects = _means(units, subject, int(subject.max()) + 1)
        x = units - subjects[subject]
        # an edit knows its subject from a few statements only: what these differ from the mean of all prompts by
        statement = form == 0
        offset = x[statement & torch.isin(relation, centre)].mean(0)
        means = _means(x, relation, count)
        spread = x - means[relation]
        within = spread.mT @ spread / len(x)
        within = (1.0 - shrinkage) * within + shrinkage * within.diagonal().mean() * torch.eye(d, dtype=x.dtype)
        values, vectors = torch.linalg.eigh(within)
        narrow = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.mT
        mean = means.mean(0)
        _, sizes, leading = torch.linalg.svd((means - mean) @ narrow, full_matrices=False)
        k = min(self.projection.shape[1], int((sizes > 1e-6 * sizes[0]).sum()))
        self.mean = (mean - offset).to(self.mean)
        self.projection = torch.zeros_like(self.projection)
        self.projection[:, :k] = (narrow @ leading[:k].mT).to(self.mean)
        self.meanings = F.pad(
            F.normalize((means - mean) @ narrow @ leading[:k].mT, dim=-1), (0, self.projection.shape[1] - k)
        )
        self.meanings = self.meanings.to(self.mean)
        said = [_means(x[form == f], relation[form == f], count) - offset for f in competing]
        self.rows = self.forward(torch.stack(said, dim=1).to(self.mean))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("rows", "meanings"):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(saved, device=self.mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _means(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Mean of the rows of each group, ``(count, d)``."""
    total = torch.zeros(count, x.shape[1], dtype=x.dtype).index_add_(0, group, x)
    return total / torch.bincount(group, minlength=count).clamp(min=1).unsqueeze(1)
