"""oneDNN's products: taken where they can be, with the values and gradients of ``F.linear``; nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from baft_intervention.runtime import onednn_linear

pytestmark = pytest.mark.skipif(not onednn_linear._available(), reason="this build of torch has no oneDNN product")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_frozen_layers_use_it_with_the_same_values_and_gradients(monkeypatch, kind):
    torch.manual_seed(0)
    layer = (nn.Linear(8, 5) if kind == "linear" else Conv1D(5, 8)).requires_grad_(False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    calls, real = [], onednn_linear._onednn
    monkeypatch.setattr(onednn_linear, "_onednn", lambda *args: calls.append(1) or real(*args))
    assert onednn_linear.linear_layers([layer]) == [layer]
    with onednn_linear.onednn_products([layer]):
        found = layer(x)
        (own,) = torch.autograd.grad(found.square().sum(), x)
        assert len(calls) == 2  # forward and backward
        layer(x.detach())
        assert len(calls) == 3
        layer(torch.zeros(0, 8))
        assert len(calls) == 3  # nothing to multiply
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, gradient)
    layer(x)
    assert len(calls) == 3
    assert "forward" not in layer.__dict__


def test_layers_that_learn_or_are_compiled_keep_their_own_product():
    learning, frozen = nn.Linear(8, 5), nn.Linear(8, 5).requires_grad_(False)
    assert onednn_linear.linear_layers([learning, frozen.double()]) == []
    block = nn.Sequential(nn.Linear(8, 5).requires_grad_(False))
    assert onednn_linear.linear_layers([block]) == [block[0]]
    block._compiled_call_impl = lambda x: x
    assert onednn_linear.linear_layers([block]) == []
