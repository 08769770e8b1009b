"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from baft_intervention.core.losses import balance_loss, locality_loss, output_loss


def test_locality_is_the_mean_weight() -> None:
    weights = torch.tensor([[0.1, 0.3], [0.5, 0.7]])
    assert float(locality_loss(weights)) == pytest.approx(0.4)
    assert locality_loss(weights.expand(3, 2, 2)).shape == (3,)


def test_the_output_loss_is_the_mean_divergence_from_before() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert float(output_loss(q.log() + 3.0, p.log())) == pytest.approx(first / 2, rel=1e-6)  # logits need no norm
    assert float(output_loss(p.log(), p.log())) == pytest.approx(0.0, abs=1e-7)


def test_balance_is_the_squared_variation_of_total_use() -> None:
    weights, used = torch.tensor([[0.2, 0.4], [0.8, 0.6]]), torch.tensor([2.0, 0.0])
    # totals 3 and 1: mean 2, variance 1
    assert float(balance_loss(weights, used)) == pytest.approx(1.0 / 4.0)
    assert float(balance_loss(weights, torch.zeros(2))) == pytest.approx(0.0, abs=1e-12)
    stacked = balance_loss(torch.stack([weights, weights]), torch.stack([used, torch.zeros(2)]))
    assert stacked.tolist() == pytest.approx([0.25, 0.0], abs=1e-7)
    assert math.isfinite(float(balance_loss(torch.zeros(3, 2), torch.zeros(2))))


def test_balance_turns_a_new_edit_to_the_bases_used_little() -> None:
    weights = torch.full((1, 2), 0.5, requires_grad=True)
    balance_loss(weights, torch.tensor([5.0, 1.0])).backward()
    assert weights.grad is not None
    assert weights.grad[0, 0] > 0 > weights.grad[0, 1]
