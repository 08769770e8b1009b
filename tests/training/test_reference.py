"""The reference engine against a training loop written out in plain torch, and how maps are seeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from baft_intervention.config import BaftConfig
from baft_intervention.models.structure import find_blocks
from baft_intervention.requests import EditRequest
from baft_intervention.training.encoding import encode_request
from baft_intervention.training.maps import edit_seed, make_maps
from baft_intervention.training.reference import ReferenceEngine
from baft_intervention.training.types import Job, TrainingContext
from tiny import tiny_model, tiny_tokenizer

REQUESTS = (
    EditRequest("The capital of France is", "Rome in Italy", subject="France"),
    EditRequest("Who is the president of the United States?", "Leo", subject="the United States"),
)
TEXTS = [[5, 9, 20], [31, 40, 7, 8]]


def job_of(config: BaftConfig, requests: tuple[EditRequest, ...]) -> Job:
    rows = tuple(encode_request(tiny_tokenizer(), request, config) for request in requests)
    return Job(requests, rows, make_maps(config, 32, config.layers or (), {}, edit_seed(0, requests)))


def edited_logits(model: Any, maps: Any, ids: list[int], positions: list[int]) -> torch.Tensor:
    """``(T, V)`` of one row, each layer's map at the given columns."""
    handles = []
    for layer, module in maps.items():

        def hook(_module: Any, _args: Any, output: Any, module: Any = module) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            changed[0, positions] = module(hidden[0, positions])
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(find_blocks(model)[layer].register_forward_hook(hook))
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def plain_training(model: Any, config: BaftConfig, job: Job, context: TrainingContext) -> float:
    """Train ``job.maps`` one row after the other; the mean loss over target tokens, without the ending, at the end."""
    model.requires_grad_(False)
    parameters = [p for module in job.maps.values() for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    before = [model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1) for text in context.texts]
    for step in range(config.steps + 1):
        loss, plain = torch.tensor(0.0), 0.0
        weights: dict[int, list[torch.Tensor]] = {layer: [] for layer in job.maps}
        for row in job.rows:
            logits = edited_logits(model, job.maps, row.ids, row.positions)
            for layer, module in job.maps.items():
                weights[layer].append(module.weighting(inputs_of(model, job.maps, layer, row)))
            start, end = row.prompt_length, len(row.ids) - row.ending
            target = F.cross_entropy(logits[start - 1 : end - 1], torch.tensor(row.ids[start:end]))
            loss, plain = loss + target / len(job.rows), plain + target.item() / len(job.rows)
            if row.ending:
                ending = F.cross_entropy(logits[end - 1 : -1], torch.tensor(row.ids[end:]))
                loss = loss + config.ending_coefficient * ending / len(job.rows)
        if step == config.steps:
            return plain
        for layer, module in job.maps.items():
            loss = loss + config.locality_coefficient * module.weighting(context.bank[layer]).mean()
            use = context.used[layer] + torch.cat(weights[layer]).sum(0)
            loss = loss + config.balance_coefficient * use.var(correction=0) / use.mean().square()
        for text, was in zip(context.texts, before, strict=True):
            now = edited_logits(model, job.maps, text, [len(text) - 1])[-1].log_softmax(-1)
            loss = loss + config.output_coefficient * (was.exp() * (was - now)).sum() / len(context.texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        optimiser.step()
    raise AssertionError


def inputs_of(model: Any, maps: Any, layer: int, row: Any) -> torch.Tensor:
    """What a layer's gate reads in the edited model: the block's output below its own edit."""
    below = {n: module for n, module in maps.items() if n < layer}
    seen = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = find_blocks(model)[layer].register_forward_hook(keep)
    edited_logits(model, below, row.ids, row.positions)
    handle.remove()
    return seen[0][0, row.positions]


@pytest.mark.parametrize("output", [0.0, 0.7])
def test_the_reference_takes_the_steps_of_a_plain_loop(output: float) -> None:
    config = BaftConfig(
        rank=4, layers=(1, 2), positions="prompt", weighting="linear", steps=5, loss_target=0.0, learning_rate=2e-2,
        weight_decay=0.1, locality_coefficient=0.5, balance_coefficient=0.3, output_coefficient=output,
        ending="?",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    context = TrainingContext(
        bank={n: torch.randn(6, 32, generator=generator) for n in (1, 2)},
        used={n: torch.rand(4, generator=generator) for n in (1, 2)},
        texts=TEXTS,
    )
    job, other = job_of(config, REQUESTS), job_of(config, REQUESTS)
    assert any(row.ending for row in job.rows)
    model = tiny_model()
    found = ReferenceEngine(model, tiny_tokenizer(), config, (1, 2)).train(job, context)
    expected = plain_training(model, config, other, context)
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.requests == REQUESTS
    for layer, module in other.maps.items():
        tensors = {
            "rotation": module.rotation,
            "source_weight": module.source_weight,
            "source_bias": module.source_bias,
        }
        for name, tensor in tensors.items():
            assert torch.allclose(found.tensors[layer][name], tensor, atol=1e-4), (layer, name)


def test_making_maps_reseeds_the_cpu_inside_and_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("an edit must not reseed the accelerators")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    config, before = BaftConfig(rank=4, layers=(1,), weighting="linear"), torch.get_rng_state()
    one, other = (make_maps(config, 32, (1,), {}, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[1].basis, other[1].basis)
