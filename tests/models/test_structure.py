"""Blocks, sizes and configs, found by structure: on tiny models of every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from baft_intervention.errors import ModelError
from baft_intervention.models.structure import find_blocks, hidden_size
from tiny import tiny_model, tiny_tokenizer


def test_blocks_are_found_in_every_architecture(arch: str) -> None:
    model = tiny_model(arch, layers=3, d=16)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    assert hidden_size(model) == 16
    seen = []
    handles = [block.register_forward_hook(lambda module, *_: seen.append(module)) for block in blocks]
    model(**tiny_tokenizer()("The capital of Japan is", return_tensors="pt"))
    assert seen == list(blocks), "the blocks run once each, in order"
    for handle in handles:
        handle.remove()


class _Stack(nn.Module):
    def __init__(self, *names: str, inner: int = 0):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3, hidden_size=4)
        for name in names:
            self.add_module(name, nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
        if inner:  # as many experts as layers, inside each layer
            blocks = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}) for _ in range(3)]
            self.add_module("layers", nn.ModuleList(blocks))


def test_experts_as_many_as_layers_are_not_taken_for_blocks() -> None:
    model = _Stack(inner=3)
    assert find_blocks(model) is model.layers


def test_a_vision_tower_of_the_same_depth_is_passed_over() -> None:
    model = _Stack("vision_layers", "layers")
    assert find_blocks(model) is model.layers


def test_text_config_of_a_multimodal_model_counts() -> None:
    model = _Stack("layers")
    model.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=3, hidden_size=7))
    assert find_blocks(model) is model.layers
    assert hidden_size(model) == 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Stack("encoder", "decoder"), "several stacks of 3 blocks.*encoder.*decoder"),
        (_Stack(), "no stack of 3 blocks"),
        (nn.Linear(2, 2), "has no config"),
    ],
)
def test_models_without_one_stack_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_blocks(model)
