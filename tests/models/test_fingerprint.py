"""A model's fingerprint and config hash: what enters, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baft_intervention.errors import ModelError
from baft_intervention.models.fingerprint import config_hash, model_fingerprint
from baft_intervention.models.structure import find_blocks
from tiny import ARCHS, tiny_model


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # the embedding of GPT-2 is tied to the output head
def test_fingerprint_is_a_function_of_the_parameters(any_model: nn.Module) -> None:
    first = model_fingerprint(any_model)
    assert len(first) == 64
    handle = find_blocks(any_model)[0].register_forward_hook(lambda *_: None)
    any_model.requires_grad_(False)
    assert model_fingerprint(any_model) == first, "hooks and requires_grad do not enter"
    handle.remove()
    for parameter in any_model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] = kept + 1e-3
        assert model_fingerprint(any_model) != first
        flat[-1] = kept
    assert model_fingerprint(any_model) == first
    assert model_fingerprint(any_model.to(torch.bfloat16)) != first


def test_fingerprint_sees_one_bit_and_a_swap_in_a_large_tensor() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(1000, 201, generator=torch.Generator().manual_seed(0)))
    first = model_fingerprint(model)
    for index in (0, 1, 12345, 200_998, 200_999):  # on and off the sample, the tail included
        bits = model.w.data.view(-1).view(torch.int32)
        bits[index] ^= 1
        assert model_fingerprint(model) != first, index
        bits[index] ^= 1
    model.w.data[[0, 5]] = model.w.data[[5, 0]]
    assert model_fingerprint(model) != first
    model.w.data[[0, 5]] = model.w.data[[5, 0]]
    assert model_fingerprint(model) == first


def test_fingerprint_does_not_depend_on_layout_or_tying() -> None:
    tied = tiny_model("gpt2")
    first = model_fingerprint(tied)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert model_fingerprint(tied) == first
    big = nn.Module()
    big.w = nn.Parameter(torch.randn(300, 301, generator=torch.Generator().manual_seed(0)))
    first = model_fingerprint(big)
    big.w = nn.Parameter(big.w.detach().t().contiguous().t())  # the same values, not contiguous
    assert model_fingerprint(big) == first
    storage = torch.cat([torch.zeros(1), big.w.detach().reshape(-1)])
    big.w = nn.Parameter(storage[1:].view(300, 301))  # the same values, not at a word's boundary
    assert model_fingerprint(big) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run where torch.cuda.is_available()")
def test_fingerprint_on_a_gpu_is_that_of_the_cpu() -> None:
    model = tiny_model("llama", d=256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = model.cpu().to(dtype)
        assert model_fingerprint(model) == model_fingerprint(model.cuda())


def test_fingerprint_refuses_a_model_without_values() -> None:
    with pytest.raises(ModelError, match="meta device"):
        model_fingerprint(nn.Linear(2, 2, device="meta"))


def test_fingerprints_are_those_of_every_supported_version() -> None:
    """Written down once: an adapter made on transformers 4.45.1 must be accepted on 5, and the other way round."""
    known = {"llama": ("12231259676f", "2c15e866e681"), "gpt_neox": ("d3388d032e60", "15c0aeb2b86f")}
    for arch, (fingerprint, config) in known.items():
        model = tiny_model(arch)
        assert model_fingerprint(model).startswith(fingerprint)
        assert config_hash(model).startswith(config)


def test_config_hash_tells_architectures_apart_and_ignores_dtype() -> None:
    hashes = {config_hash(tiny_model(arch)) for arch in ARCHS}
    assert len(hashes) == len(ARCHS)
    model = tiny_model("llama")
    assert config_hash(model.to(torch.float16)) == config_hash(tiny_model("llama", seed=5))
    assert config_hash(model) != config_hash(tiny_model("llama", layers=3))
