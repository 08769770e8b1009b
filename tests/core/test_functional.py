"""The map against a sum over bases, written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft_intervention.core.functional import baft_update, update_bound
from baft_intervention.core.orthonormal import random_orthonormal


def naive(h: Tensor, basis: Tensor, source: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    """``h + sum_k w_k r_k (a_k^T h + b_k - r_k^T h)``, one vector and one basis after the other."""
    h, basis, source, bias, weights = (t.double() for t in (h, basis, source, bias, weights))
    flat, flat_weights = h.reshape(-1, h.shape[-1]), weights.reshape(-1, weights.shape[-1])
    out = flat.clone()
    for i in range(len(flat)):
        for k in range(len(basis)):
            out[i] += flat_weights[i, k] * basis[k] * (source[k] @ flat[i] + bias[k] - basis[k] @ flat[i])
    return out.reshape(h.shape)


def mapped(h: Tensor, *rest: Tensor) -> Tensor:
    return h + baft_update(h, *rest)


def draws(*shape: int, r: int, d: int, seed: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(*shape, d, generator=generator)
    basis, source = random_orthonormal(r, d, generator), torch.randn(r, d, generator=generator)
    bias, weights = torch.randn(r, generator=generator), torch.rand(*shape, r, generator=generator)
    return h, basis, source, bias, weights


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    d=st.integers(1, 12),
    share=st.floats(0.0, 1.0),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_map_is_the_sum_over_bases(shape: list[int], d: int, share: float, scale: float, seed: int) -> None:
    args = draws(*shape, r=1 + round(share * (d - 1)), d=d, seed=seed, scale=scale)
    expected = naive(*args)
    assert torch.allclose(mapped(*args).double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    assert torch.allclose(mapped(*(t.double() for t in args)), expected, rtol=1e-11, atol=1e-11 * max(1.0, scale))


@pytest.mark.parametrize("shape", [(2, 9), (2, 3), (5,)], ids=["B T d", "B P d", "n d"])
def test_shapes_of_a_residual_stream(shape: tuple[int, ...]) -> None:
    args = draws(*shape, r=12, d=64, seed=0)
    assert torch.allclose(mapped(*args).double(), naive(*args), rtol=1e-5, atol=1e-5)


def test_weights_of_zero_change_nothing_and_a_single_weight_opens_one_direction() -> None:
    h, basis, source, bias, weights = draws(6, r=4, d=16, seed=1)
    assert torch.equal(mapped(h, basis, source, bias, torch.zeros_like(weights)), h)
    only = torch.zeros_like(weights)
    only[:, 2] = 1.0
    update = baft_update(h, basis, source, bias, only)
    coordinates = update @ basis.T
    assert coordinates[:, 2].abs().min() > 1e-3
    assert coordinates[:, [0, 1, 3]].abs().max() < 1e-5
    # the edited coordinate becomes the source: r^T Phi(h) = a^T h + b
    assert torch.allclose((h + update) @ basis[2], h @ source[2] + bias[2], atol=1e-4)


def test_stacked_maps_are_a_loop() -> None:
    each = [draws(5, r=3, d=8, seed=s) for s in range(4)]
    stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    expected = torch.stack([baft_update(*args) for args in each])
    assert torch.allclose(baft_update(*stacked), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_update_has_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    h, *rest = draws(4, r=3, d=8, seed=0)
    assert baft_update(h.to(dtype), *rest).dtype == torch.float32


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_bound_holds(seed: int, scale: float) -> None:
    h, basis, source, bias, weights = draws(7, r=3, d=10, seed=seed, scale=scale)
    slope, offset = update_bound(basis, source, bias)
    size = baft_update(h, basis, source, bias, weights).norm(dim=-1)
    assert (size <= slope * h.norm(dim=-1) * (1 + 1e-5) + offset + 1e-5).all()
