"""The basis stays orthonormal whatever trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from baft_intervention.core.basis_map import BasisWeightedMap
from baft_intervention.core.orthonormal import orthonormal_rows, orthonormality_error, random_orthonormal
from baft_intervention.errors import ConfigError


@settings(deadline=None)
@given(rank=st.integers(1, 6), extra=st.integers(0, 10), seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rows_are_orthonormal_and_span_the_same_space(rank: int, extra: int, seed: int, scale: float) -> None:
    matrix = scale * torch.randn(rank, rank + extra, generator=torch.Generator().manual_seed(seed))
    assume(torch.linalg.cond(matrix.double()) < 1e4)  # of nearly dependent rows fp32 does not know the span
    basis = orthonormal_rows(matrix)
    assert basis.shape == matrix.shape
    assert orthonormality_error(basis) < 1e-5
    projected = matrix @ basis.T @ basis
    assert torch.allclose(projected, matrix, atol=1e-4 * float(matrix.abs().max()))


def test_an_orthonormal_matrix_and_any_positive_multiple_of_it_stay() -> None:
    basis = random_orthonormal(5, 20, torch.Generator().manual_seed(0))
    assert torch.allclose(orthonormal_rows(basis), basis, atol=1e-6)
    assert torch.allclose(orthonormal_rows(0.01 * basis), basis, atol=1e-6)
    flipped = -basis  # the sign that LAPACK leaves open must not jump between steps
    assert torch.allclose(orthonormal_rows(flipped), flipped, atol=1e-6)


def test_it_is_gram_schmidt_in_order() -> None:
    matrix = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows: list[torch.Tensor] = []
    for row in matrix:
        rest = row - sum((row @ other) * other for other in rows)
        rows.append(rest / rest.norm())
    assert torch.allclose(orthonormal_rows(matrix), torch.stack(rows), atol=1e-12)


def test_gradient() -> None:
    matrix = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, (matrix,))


def test_stacked_and_half_precision_input() -> None:
    matrices = torch.randn(6, 3, 11)
    stacked = orthonormal_rows(matrices)
    assert torch.allclose(stacked, torch.stack([orthonormal_rows(m) for m in matrices]), atol=1e-6)
    assert orthonormality_error(stacked) < 1e-5
    assert orthonormal_rows(matrices.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_outside_the_space_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"low_rank_dimension is {rank}; it must be between 1 and the hidden size 8"):
        random_orthonormal(rank, 8)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-1),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    ],
    ids=["AdamW with decay", "Adam at a large rate", "SGD with momentum and decay"],
)
def test_two_hundred_steps_leave_the_basis_orthonormal(optimiser: Callable[[Any], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    module = BasisWeightedMap(32, 6, init="random")
    start, h, target = module.rotation.detach().clone(), torch.randn(20, 32), torch.randn(20, 32)
    steps = optimiser(module.parameters())
    for _ in range(200):
        steps.zero_grad()
        (module(h) - target).square().mean().backward()
        steps.step()
    assert orthonormality_error(module.rotation) < 1e-5
    assert (module.rotation - start).abs().max() > 0.05, "the basis was not trained at all"


def test_weight_decay_alone_leaves_the_basis_where_it_is() -> None:
    module = BasisWeightedMap(16, 4)
    start = module.rotation.detach().clone()
    steps = torch.optim.AdamW([module.basis], lr=0.1, weight_decay=0.5)
    for _ in range(100):
        module.basis.grad = torch.zeros_like(module.basis)
        steps.step()
    assert module.basis.abs().max() < 0.1 * start.abs().max()
    assert torch.allclose(module.rotation, start, atol=1e-5)


def test_the_cached_basis_follows_the_parameter() -> None:
    module = BasisWeightedMap(16, 4)
    with torch.no_grad():
        first = module.rotation
        assert module.rotation is first, "computed twice for the same parameter"
        module.basis.add_(torch.randn_like(module.basis))
        second = module.rotation
    assert not torch.allclose(first, second)
    assert torch.equal(second, orthonormal_rows(module.basis).detach())
    assert module.rotation.requires_grad


def test_a_basis_first_used_in_inference_mode_serves_a_graph_later() -> None:
    module = BasisWeightedMap(16, 4, weighting="constant", init="random").requires_grad_(False)
    with torch.inference_mode():
        expected = module(torch.ones(2, 16)).clone()
    h = torch.ones(2, 16, requires_grad=True)
    out = module(h)
    assert torch.allclose(out, expected)
    out.sum().backward()
    assert h.grad is not None
