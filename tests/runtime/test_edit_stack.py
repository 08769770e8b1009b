"""Stacked edits against a loop over edits, and their competition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from baft_intervention.core.basis_map import BasisWeightedMap
from baft_intervention.gates import WeightingNetwork
from baft_intervention.runtime.edit_stack import EditStack, GrowingStack, WeightingStack, is_shared
from baft_intervention.training.maps import map_tensors

D, R, E = 20, 3, 5
NAMES = ("constant", "linear", "mlp", "cosine")


class Bare(WeightingNetwork):
    """A network without a tensor: there is nothing to map over."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h[..., : self.rank])


def edits(weighting: str | type[WeightingNetwork], count: int = E) -> tuple[list[BasisWeightedMap], Tensor]:
    """Maps with parameters of their own, and representations each of which is near one of the edits."""
    torch.manual_seed(0)
    bank, own = torch.randn(100, D), 3 * torch.randn(count, D)
    modules = []
    for e in range(count):
        network = weighting if isinstance(weighting, str) else weighting(D, R)
        module = BasisWeightedMap(D, R, weighting=network, init="random").requires_grad_(False)
        module.source_bias.normal_()
        for parameter in module.weighting.parameters():
            parameter.add_(torch.randn_like(parameter))
        if weighting == "constant":
            module.weighting.value.fill_(0.1 * (e + 1))
        module.weighting.fit_shared(bank)
        module.weighting.initialise(own[e : e + 1], bank)
        modules.append(module)
    return modules, own + 0.05 * torch.randn(count, D)


def stack_of(modules: list[BasisWeightedMap]) -> EditStack:
    return EditStack(modules[0].weighting, [map_tensors(module) for module in modules])


@pytest.mark.parametrize("weighting", NAMES)
def test_stacked_networks_equal_a_loop(weighting: str) -> None:
    modules, x = edits(weighting)
    state = {
        name: torch.stack([m.weighting.state_dict()[name] for m in modules])
        for name in modules[0].weighting.state_dict()
        if not is_shared(modules[0].weighting, name)
    }
    stack = WeightingStack(modules[0].weighting, state)
    every = torch.stack([m.weighting(x) for m in modules])
    assert torch.allclose(stack.on_all(x), every, atol=1e-6)
    own = torch.stack([m.weighting(x[e]) for e, m in enumerate(modules)])
    assert torch.allclose(stack.on_own(x), own, atol=1e-6)
    several = x.unsqueeze(1) + torch.randn(E, 4, D)
    assert torch.allclose(
        stack.on_own(several), torch.stack([m.weighting(h) for m, h in zip(modules, several, strict=True)]), atol=1e-6
    )
    index = torch.tensor([3, 0, 3])
    assert torch.allclose(stack.on_own(x[index], stack.picked(index)), own[index], atol=1e-6)
    if modules[0].weighting.routed:
        assert torch.allclose(stack.match(x), torch.stack([m.weighting.match(x) for m in modules]), atol=1e-6)


@pytest.mark.parametrize("weighting", ["constant", "linear", "mlp", Bare])
def test_updates_of_edits_are_summed(weighting: Any) -> None:
    modules, x = edits(weighting)
    stack = stack_of(modules)
    assert len(stack) == E
    expected = sum(module.update(x)[0] for module in modules)
    assert torch.allclose(stack.update(x), expected, atol=1e-5)
    weights, edit = stack.weights(x)
    assert weights.shape[-2:] == (E, R)
    assert torch.allclose(weights.expand(E, E, R), torch.stack([m.weighting(x) for m in modules]), atol=1e-6)
    assert edit.tolist() == list(range(E))


def test_edits_with_a_match_compete() -> None:
    modules, x = edits("cosine")
    stack = stack_of(modules)
    weights, edit = stack.weights(x)
    assert edit.tolist() == list(range(E)), "each representation is nearest its own edit"
    expected = torch.cat([module.update(x[e : e + 1])[0] for e, module in enumerate(modules)])
    assert weights.min() > 0.9
    assert expected.norm(dim=1).min() > 0.1
    assert torch.allclose(stack.update(x), expected, atol=1e-5)
    assert (stack.update(torch.randn(50, D)).norm(dim=1) == 0).float().mean() > 0.5


def test_the_better_match_wins_alone_where_both_are_open() -> None:
    modules, x = edits("cosine", 2)
    one, other = modules
    one.weighting.key.copy_(torch.nn.functional.normalize(one.weighting.key + 0.2 * other.weighting.key, dim=0))
    for module in modules:
        module.weighting.threshold.fill_(-0.9)
    both = torch.stack([m.weighting.match(x) for m in modules])
    assert (both > 0).all(), "both edits must be open for the test to mean something"
    update = stack_of(modules).update(x)
    for p in range(2):
        winner = modules[int(both[:, p].argmax())]
        assert torch.allclose(update[p], winner.update(x[p : p + 1])[0][0], atol=1e-5)
        assert not torch.allclose(
            update[p], (one.update(x[p : p + 1])[0] + other.update(x[p : p + 1])[0])[0], atol=1e-3
        )


@pytest.mark.parametrize("weighting", NAMES)
def test_one_edit_is_its_map_bit_for_bit(weighting: str) -> None:
    modules, x = edits(weighting, 1)
    h = torch.cat([x, torch.randn(6, D)])
    assert torch.equal(stack_of(modules).update(h), modules[0].update(h)[0])
    shaped = h.reshape(1, 7, D)
    assert torch.equal((h + stack_of(modules).update(h)).reshape(shaped.shape), modules[0](shaped))


def test_shared_tensors_are_stored_once() -> None:
    modules, _ = edits("cosine")
    stack = stack_of(modules)
    assert stack.weighting.state["whitening.mean"].shape == (D,)
    assert stack.weighting.state["key"].shape == (E, D)
    assert is_shared(modules[0].weighting, "whitening.directions")
    assert not is_shared(modules[0].weighting, "key")
    assert not any("whitening" in name for name in map_tensors(modules[0]))


# ------------------------------------------------------------------------------------------ adding and taking out


@pytest.mark.parametrize("weighting", [*NAMES, Bare])
def test_a_stack_that_grew_and_shrank_equals_one_built_at_once(weighting: Any) -> None:
    modules, x = edits(weighting, 24)
    tensors = [map_tensors(module) for module in modules]
    stack = EditStack(modules[0].weighting, tensors[:1])
    with torch.inference_mode():  # as generate() may be called
        stack.update(x)
        stack.extend(tensors[1:2])
    for each in tensors[2:20]:
        stack.extend([each])
        stack.update(x)
    stack.extend(tensors[20:])
    there = list(range(24))
    for index in (23, 0, 7, 7):
        stack.remove(index)
        del there[index]
        expected = EditStack(modules[0].weighting, [tensors[e] for e in there])
        assert len(stack) == len(there)
        assert torch.equal(stack.update(x), expected.update(x))
        assert stack.weights(x)[1].tolist() == expected.weights(x)[1].tolist()
    stack.extend([tensors[0]])
    assert torch.equal(stack.update(x), EditStack(modules[0].weighting, [tensors[e] for e in [*there, 0]]).update(x))


def test_rows_are_moved_a_few_times_however_many_are_added() -> None:
    rows, places = GrowingStack(), set()
    for i in range(1000):
        rows.extend([{"key": torch.full((4,), float(i))}])
        places.add(rows.views()["key"].data_ptr())
        assert len(rows) == i + 1
    assert rows.views()["key"][:, 0].tolist() == list(range(1000))
    assert len(places) <= 8  # 16, 32, ... 1024


def test_the_maps_of_edits_that_compete_are_not_copied() -> None:
    modules, x = edits("cosine")
    tensors = [map_tensors(module) for module in modules]
    stack = EditStack(modules[0].weighting, tensors)
    tensors[2]["source_bias"].add_(1.0)
    before = stack.update(x)
    tensors[2]["source_bias"].sub_(1.0)
    after = stack.update(x)
    assert (before != after).any(1).tolist() == [False, False, True, False, False]


def test_each_position_gets_the_edit_and_the_stage_that_it_is_given() -> None:
    modules, x = edits("fact")
    edit, stage = torch.tensor([3, 0, 3, 1, 0]), torch.tensor([0, 1, 2, 7, 40])
    update, weights = stack_of(modules).update_of(x, edit, stage)
    for p, (e, s) in enumerate(zip(edit.tolist(), stage.tolist(), strict=True)):
        network: Any = modules[e].weighting
        expected = network(x[p], torch.tensor(min(s, 7)))
        assert torch.allclose(weights[p], expected, atol=1e-6)
        own = modules[e].weighting, modules[e].rotation
        along = (modules[e].source_weight - own[1]) @ x[p] + modules[e].source_bias
        assert torch.allclose(update[p], (expected * along) @ own[1], atol=1e-4)
