"""What training minimises.

    loss = edit + ending_coefficient * ending
         + locality_coefficient * locality + output_coefficient * output + balance_coefficient * balance

The paper names a *locality regularisation* and an *incremental load-balancing loss*; their exact forms here are our
reading, each stated below.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.tokenization import IGNORE_INDEX


def edit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy (nats) over the target tokens of each row, ``(B,)``.

    Args:
        logits: ``(B, T, V)`` at every position.
        labels: ``(B, T)``, the token *at* each position, ``IGNORE_INDEX`` where it is no target; shifted here.
    """
    losses = token_losses(logits, labels)  # (B, T-1)
    counted = (labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1)
    return losses.sum(1) / counted


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy (nats) of each label but the first, ``(B, T - 1)``, 0 where there is none; arguments as :func:`edit_loss`."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    # over rows (N, V): along any other axis torch sums the vocabulary one by one and is off by 1e-4
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(labels.shape)


def locality_loss(weights: Tensor) -> Tensor:
    """Mean basis weight on unrelated representations: ``mean_{n,k} w_k(h_n)``; ``(..., N, r) -> (...,)``. Our reading.

    The weights depend on the edited layer's representation alone, so the bank's representations are computed once a
    model and no forward pass is needed here.
    """
    return weights.mean(dim=(-2, -1))


def output_loss(logits: Tensor, before: Tensor) -> Tensor:
    """How far the next token's distribution has moved on unrelated texts: mean ``KL(p || p')`` in nats, ``()``. Ours.

    Where :func:`locality_loss` asks that a gate be shut, this asks what comes of it: an update that changes no answer costs
    nothing. The form is that of MEND's locality term (Mitchell et al. 2022, arXiv 2110.11309).

    Args:
        logits: ``(N, V)`` of ``p'``, the edited model's, at the last tokens of N texts.
        before: ``(N, V)`` log-probabilities of ``p``, the unedited model's.
    """
    return F.kl_div(logits.float().log_softmax(-1), before, log_target=True, reduction="none").sum(-1).mean()


def balance_loss(weights: Tensor, used: Tensor) -> Tensor:
    """Incremental load balancing: squared coefficient of variation of the bases' total use. Our reading.

    ``I_k = used_k + sum_n w_k(h_n)``, loss ``= var(I) / mean(I)^2`` (the importance loss of Shazeer et al. 2017, arXiv
    1701.06538), where ``used`` carries what earlier edits used, so that a new edit turns to little-used bases.

    Args:
        weights: ``(..., n, r)`` on the edit's own positions.
        used: ``(..., r)`` or ``(r,)`` use by earlier edits.
    """
    total = used + weights.sum(-2)
    mean = total.mean(-1)
    return (total - mean.unsqueeze(-1)).square().mean(-1) / mean.square().clamp(min=1e-12)


def target_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether every target token of a row is the argmax: ``(B,)`` bool; arguments as :func:`edit_loss`."""
    predicted, labels = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((predicted == labels) | (labels == IGNORE_INDEX)).all(1)


def mean_use(weights: Tensor) -> Tensor:
    """Use of each basis, ``(n, r) -> (r,)``, to be added to ``used`` when an edit is committed."""
    return torch.atleast_2d(weights).sum(0).detach()
