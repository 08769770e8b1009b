"""The low-rank whitening against the explicit inverse square root."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft_intervention.errors import ConfigError
from baft_intervention.gates.whitening import Whitening


def draw(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Representations with a few huge common directions, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1.5, -1, d)
    return torch.randn(n, d, generator=generator) * scales + 5 * torch.randn(d, generator=generator)


@settings(deadline=None)
@given(
    n=st.integers(3, 40),
    d=st.integers(2, 12),
    shrinkage=st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_inverse_root_of_the_shrunk_covariance(n: int, d: int, shrinkage: float, seed: int) -> None:
    bank = draw(n, d, seed).double()
    whitening = Whitening(d).double().fit(bank, shrinkage=shrinkage, tolerance=0.0)
    x = bank - bank.mean(0)
    covariance = x.T @ x / (n - 1)
    level = covariance.diagonal().mean()
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(shrunk)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    h = draw(5, d, seed + 1).double()
    expected = (h - bank.mean(0)) @ root
    factor = torch.sqrt(shrinkage * level)
    assert torch.allclose(whitening(h), factor * expected, rtol=1e-8, atol=1e-8 * float(h.abs().max()))


def test_whitened_unrelated_text_has_no_common_direction() -> None:
    bank = draw(400, 16)
    cosine = torch.nn.functional.normalize(Whitening(16).fit(bank, shrinkage=0.01)(bank), dim=-1)
    raw = torch.nn.functional.normalize(bank, dim=-1)
    off = ~torch.eye(400, dtype=torch.bool)
    assert (raw @ raw.T)[off].mean() > 0.25
    assert (cosine @ cosine.T)[off].mean().abs() < 0.02


def test_tolerance_and_the_most_components_bound_what_is_stored() -> None:
    bank = draw(200, 32)
    exact, loose = Whitening(32).fit(bank, tolerance=0.0), Whitening(32).fit(bank, tolerance=0.3)
    assert len(loose.directions) < len(exact.directions) == 32
    assert len(Whitening(32).fit(bank, max_components=3).directions) == 3
    top = Whitening(32).fit(bank, max_components=3).shrink
    assert torch.equal(top, exact.shrink[:3]), "the directions kept must be the largest"
    difference = (exact(bank) - loose(bank)).norm(dim=1) / exact(bank).norm(dim=1)
    assert difference.max() < 0.3


def test_it_does_nothing_until_fitted_and_at_full_shrinkage_only_centres() -> None:
    bank = draw(50, 8)
    assert torch.equal(Whitening(8)(bank), bank)
    assert torch.allclose(Whitening(8).fit(bank, shrinkage=1.0)(bank), bank - bank.mean(0), atol=1e-4)
    same = torch.ones(5, 8)
    assert torch.isfinite(Whitening(8).fit(same)(same)).all()


def test_a_fitted_one_loads_into_a_fresh_one() -> None:
    bank = draw(50, 8)
    fitted, fresh = Whitening(8).fit(bank), Whitening(8)
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(bank), fitted(bank))


@pytest.mark.parametrize(
    ("bank", "options", "match"),
    [
        (torch.zeros(1, 8), {}, r"\(N >= 2, 8\).*\(1, 8\)"),
        (torch.zeros(5, 7), {}, r"got \(5, 7\)"),
        (torch.zeros(8), {}, r"got \(8,\)"),
        (torch.full((3, 8), float("inf")), {}, "not finite"),
        (torch.randn(3, 8), {"shrinkage": 0.0}, "shrinkage is 0.0"),
        (torch.randn(3, 8), {"shrinkage": 1.5}, "shrinkage is 1.5"),
    ],
)
def test_a_bank_that_does_not_do_is_refused(bank: torch.Tensor, options: dict, match: str) -> None:
    whitening = Whitening(8)
    with pytest.raises(ConfigError, match=match):
        whitening.fit(bank, **options)
    assert torch.equal(whitening.mean, torch.zeros(8))
