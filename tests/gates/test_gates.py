"""Weighting networks: ranges, starts, calibration, the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from baft_intervention import BaftConfig, BasisWeightedMap, WeightingNetwork, register_weighting
from baft_intervention.errors import ConfigError
from baft_intervention.gates import make_weighting, weighting_class, weighting_names

D, R = 24, 3


@register_weighting("test-distance")
class Distance(WeightingNetwork):
    """A user's own network: ``w_k = exp(-|h - c_k|^2 / d)``."""

    def __init__(self, embed_dim: int, rank: int, *, spread: float = 1.0):
        super().__init__(embed_dim, rank)
        self.centres = nn.Parameter(spread * torch.randn(rank, embed_dim))

    def forward(self, h: Tensor) -> Tensor:
        return torch.exp(-(h.unsqueeze(-2) - self.centres).square().mean(-1))


@pytest.mark.parametrize("name", ["constant", "linear", "mlp", "cosine", "whitened", "test-distance"])
@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 4), max_size=3), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_weights_are_shares_one_for_each_basis(name: str, shape: list[int], scale: float) -> None:
    torch.manual_seed(0)
    network = make_weighting(name, D, R)
    network.initialise(torch.randn(2, D), torch.randn(30, D))
    weights = network(scale * torch.randn(*shape, D))
    assert weights.shape == (*shape, R)
    assert weights.dtype == torch.float32
    assert ((weights >= 0) & (weights <= 1)).all()


@pytest.mark.parametrize(("name", "parameters"), [("linear", R * (D + 1)), ("mlp", 5 * (D + 1) + R * (5 + 1))])
def test_learned_gates_start_at_the_weight_asked_for(name: str, parameters: int) -> None:
    options: dict[str, Any] = {"hidden": 5} if name == "mlp" else {}
    network = make_weighting(name, D, R, initial_weight=0.9, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.randn(200, D)).mean().item() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_learned_gates_do_not_depend_on_the_size_of_a_representation(name: str) -> None:
    network, h = make_weighting(name, D, R), torch.randn(5, D)
    assert torch.allclose(network(100 * h), network(h), atol=1e-4)


def test_learned_gates_can_tell_inputs_apart() -> None:
    for name in ("linear", "mlp"):
        torch.manual_seed(0)
        network, h = make_weighting(name, D, R), torch.randn(2, 4, D)
        steps = torch.optim.Adam(network.parameters(), lr=0.1)
        for _ in range(200):
            steps.zero_grad()
            (network(h[1]).mean() - network(h[0]).mean()).backward()
            steps.step()
        assert network(h[0]).min() > 0.8
        assert network(h[1]).max() < 0.2


def test_constant_is_the_value() -> None:
    network = make_weighting("constant", D, R, value=0.25)
    assert torch.equal(network(torch.randn(2, 5, D)), torch.full((2, 5, R), 0.25))
    assert not list(network.parameters())


# ---------------------------------------------------------------------------------------------- cosine


def started(seed: int = 0, **options: Any) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1.5, -0.5, D)
    bank = torch.randn(500, D, generator=generator) * scales + 3.0
    h_edit = torch.randn(1, D, generator=generator) * scales + 3.0
    network: Any = make_weighting("cosine", D, R, **options)
    network.fit_shared(bank)
    network.initialise(h_edit, bank)
    return network, h_edit, bank


def test_cosine_is_shut_until_started() -> None:
    network, h = make_weighting("cosine", D, R), torch.randn(10, D)
    assert torch.equal(network(h), torch.zeros(10, R))
    module = BasisWeightedMap(D, R, weighting=network, init="random")
    assert torch.equal(module(h), h)


def test_cosine_is_the_formula() -> None:
    network, h_edit, bank = started(sharpness=7.0)
    h = bank[:20]
    e, x = network.whitening(h_edit)[0], network.whitening(h)
    cosine = (x @ e) / (x.norm(dim=1) * e.norm())
    expected = torch.sigmoid(7.0 * (cosine - network.threshold))
    expected = torch.where(expected < 1e-3, 0.0, expected)
    assert torch.allclose(network(h), expected.unsqueeze(1).expand(20, R), atol=1e-5)
    assert torch.allclose(network.match(h), cosine - network.threshold, atol=1e-5)


def test_cosine_opens_on_its_edit_and_shuts_on_the_bank() -> None:
    network, h_edit, bank = started()
    assert network(h_edit).min() > 0.999
    assert network.match(h_edit) > 0
    assert (network(bank).max(1).values == 0).float().mean() > 0.9
    assert network(h_edit * 1.0 + 0.01 * torch.randn_like(h_edit)).min() > 0.99


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_lets_the_asked_share_of_the_bank_through(rate: float, seed: int) -> None:
    network, _, bank = started(seed, false_positive_rate=rate, floor=-1.0)
    share = float((network.match(bank) > 0).float().mean())
    assert share <= rate + 1e-6
    assert share >= rate - 1.5 / len(bank)


def test_the_threshold_stays_between_floor_and_one() -> None:
    assert float(started(false_positive_rate=0.5, floor=0.3)[0].threshold) == pytest.approx(0.3)
    network, h_edit, _ = started()
    network.initialise(h_edit, h_edit.repeat(10, 1))  # a bank of the edit itself would shut it out
    assert float(network.threshold) == pytest.approx(0.99)
    assert network(h_edit).min() > 0.5


def test_the_key_of_several_positions_is_their_mean_direction() -> None:
    network, _, bank = started()
    several = bank[:3]
    network.initialise(several, bank)
    unit = F.normalize(network.whitening(several), dim=-1)
    assert torch.allclose(network.key, F.normalize(unit.mean(0), dim=0), atol=1e-6)


def test_cosine_needs_a_bank() -> None:
    network = make_weighting("cosine", D, R)
    with pytest.raises(ConfigError, match="needs a bank of unrelated representations"):
        network.initialise(torch.randn(1, D), None)


# ---------------------------------------------------------------------------------------------- registry


def test_a_users_network_works_by_its_name() -> None:
    assert "test-distance" in weighting_names()
    assert weighting_class("test-distance") is Distance
    module = BasisWeightedMap(D, R, weighting="test-distance", weighting_options={"spread": 0.5})
    assert isinstance(module.weighting, Distance)
    module(torch.randn(4, D)).sum().backward()
    assert module.weighting.centres.grad is not None
    config = BaftConfig(weighting="test-distance", weighting_options={"spread": 0.5})
    assert not config.needs_bank
    with pytest.raises(ConfigError, match=r"\{'spreed': 1\} do not fit the weighting 'test-distance'"):
        BaftConfig(weighting="test-distance", weighting_options={"spreed": 1})


def test_a_users_network_edits_a_model(tiny_llama: Any, tokenizer: Any) -> None:
    from baft_intervention import BaftEditor
    from edits import BANK, FRANCE, logits, next_word

    config = BaftConfig(
        rank=4, learning_rate=0.05, steps=60, weighting="test-distance", locality_coefficient=0.1, layers=(2,)
    )
    before = logits(tiny_llama, tokenizer, FRANCE.prompt)
    editor = BaftEditor(tiny_llama, tokenizer, config, model_name="tiny", bank_texts=BANK)
    report = editor.edit(FRANCE)
    assert report.edits[0].reached
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new
    assert "weighting.centres" in report.edits[0].tensors[2]
    editor.undo(FRANCE.id)
    assert torch.equal(logits(tiny_llama, tokenizer, FRANCE.prompt), before)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="'linear' is taken by LinearWeighting"):

        @register_weighting("linear")
        class Mine(WeightingNetwork):
            pass

    assert weighting_class("linear").__name__ == "LinearWeighting"


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("gate", {}, "weighting is 'gate'; known networks: .*constant.*cosine.*linear.*mlp"),
        ("linear", {"hidden": 3}, "'hidden': 3.*do not fit the weighting 'linear'"),
        ("linear", {"initial_weight": 1.0}, "initial_weight is 1.0"),
        ("mlp", {"hidden": 0}, "hidden is 0"),
        ("mlp", {"initial_weight": 0.0}, "initial_weight is 0.0"),
        ("constant", {"value": 1.5}, "constant weight is 1.5"),
        ("cosine", {"sharpness": 0.0}, "sharpness is 0.0"),
        ("cosine", {"false_positive_rate": 0.0}, "false_positive_rate is 0.0"),
        ("cosine", {"floor": 1.0}, "floor is 1.0"),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_weighting(name, D, R, **options)


def test_a_network_that_is_not_routed_has_no_match() -> None:
    with pytest.raises(NotImplementedError, match="LinearWeighting is not routed"):
        make_weighting("linear", D, R).match(torch.randn(2, D))


# ---------------------------------------------------------------------------------------------- whitened


def skewed(count: int, generator: torch.Generator) -> torch.Tensor:
    """Representations that nearly all point one way and vary a hundred times more in some directions than in others."""
    scale = torch.logspace(1, -1, D)
    return 5.0 + scale * torch.randn(count, D, generator=generator)


def test_whitened_opens_on_its_edit_and_shuts_on_the_bank() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, others = skewed(400, generator), skewed(400, generator)
    network: Any = make_weighting("whitened", D, R, floor=0.0)
    assert (network(others) < 0.5).all()  # shut until started
    network.fit_shared(bank)
    edit = skewed(1, generator)
    network.initialise(edit, bank)
    assert (network(edit) > 0.5).all()
    assert float((network(others)[:, 0] > 0.5).float().mean()) < 0.05
    theta = -float(network.bias[0]) / network.sharpness
    assert float(network.match(edit)) == pytest.approx(1.0 - theta, abs=1e-3)
    raw = (others - bank.mean(0)) @ (edit - bank.mean(0)).T / (edit - bank.mean(0)).square().sum()  # without whitening
    white = network.match(others) + theta
    assert float(white.std()) < float(raw.std())


def test_whitened_is_a_linear_gate_that_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    bank = skewed(100, generator)
    network: Any = make_weighting("whitened", D, R)
    network.fit_shared(bank)
    network.initialise(skewed(2, generator), bank)
    x = torch.randn(7, D)
    expected = torch.sigmoid((x - network.whitening.mean) @ network.weight.T + network.bias)
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {"weight", "bias"}
    with pytest.raises(ConfigError, match="needs a bank"):
        network.initialise(x[:1], None)
