"""The terms of the loss beside the cross entropy of the target and its ending.

    loss = edit + ending_coefficient * ending
         + locality_coefficient * locality + output_coefficient * output + balance_coefficient * balance

The paper names a *locality regularisation* and an *incremental load-balancing loss*; their exact forms here are our
reading, each stated below.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def locality_loss(weights: Tensor) -> Tensor:
    """Mean basis weight on unrelated representations: ``mean_{n,k} w_k(h_n)``; ``(..., N, r) -> (...,)``. Our reading.

    The weights depend on the edited layer's representation alone. The bank's representations are computed once a model, so
    this term needs no forward pass.
    """
    return weights.mean(dim=(-2, -1))


def output_loss(logits: Tensor, before: Tensor) -> Tensor:
    """Change of the next token's distribution on unrelated texts: mean ``KL(p || p')`` in nats, ``()``. Ours.

    :func:`locality_loss` penalises an open gate; this penalises its effect, and an update that changes no answer costs
    nothing. The form is that of MEND's locality term (Mitchell et al. 2022, arXiv 2110.11309).

    Args:
        logits: ``(N, V)`` of ``p'``, the edited model's, at the last tokens of N texts.
        before: ``(N, V)`` log-probabilities of ``p``, the unedited model's.
    """
    return F.kl_div(logits.float().log_softmax(-1), before, log_target=True, reduction="none").sum(-1).mean()


def balance_loss(weights: Tensor, used: Tensor) -> Tensor:
    """Incremental load balancing: squared coefficient of variation of the bases' total use. Our reading.

    ``I_k = used_k + sum_n w_k(h_n)``, loss ``= var(I) / mean(I)^2`` (the importance loss of Shazeer et al. 2017, arXiv
    1701.06538), where ``used`` is the use by earlier edits, so that a new edit prefers little-used bases.

    Args:
        weights: ``(..., n, r)`` on the edit's own positions.
        used: ``(..., r)`` or ``(r,)`` use by earlier edits.
    """
    total = used + weights.sum(-2)
    mean = total.mean(-1)
    return (total - mean.unsqueeze(-1)).square().mean(-1) / mean.square().clamp(min=1e-12)
