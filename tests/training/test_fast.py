"""The fast engine against the reference, step by step and edit by edit, and what it does where a shortcut does not hold."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baft_intervention.config import BaftConfig
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import EditError
from baft_intervention.gates import WeightingNetwork, register_weighting
from baft_intervention.gates.base import _REGISTRY
from baft_intervention.models.structure import find_blocks
from baft_intervention.requests import EditRequest
from baft_intervention.runtime.adapter import Edit
from baft_intervention.runtime.partial_forward import WholeModel
from baft_intervention.runtime.replayed_blocks import ReplayedBlocks
from baft_intervention.training import fast as fast_module
from baft_intervention.training.batch import Batch, frozen
from baft_intervention.training.encoding import encode_request
from baft_intervention.training.engine import make_engine
from baft_intervention.training.fast import FastEngine
from baft_intervention.training.maps import edit_seed, make_maps
from baft_intervention.training.reference import ReferenceEngine
from baft_intervention.training.stacked import StackedMaps
from baft_intervention.training.types import Job, TrainingContext
from edits import FACTS
from tiny import ARCHS, tiny_model, tiny_tokenizer

D, RANK = 32, 4
# prompts of 3 to 16 tokens, targets of 1 to 6
REQUESTS = [
    EditRequest("The capital of France is", "Rome", subject="France"),
    EditRequest("Who is the president of the United States?", "Leo", subject="the United States"),
    EditRequest("He was born in", "the country of Italy", subject="He"),
    EditRequest("Leo works as", "a painter in London", subject="Leo"),
    EditRequest("The mother tongue of Danielle Darrieux is", "Tokyo", subject="Danielle Darrieux"),
    EditRequest("Osaka is", "1965", subject="Osaka"),
]
# of one token; four of them are reached at steps of their own, two within 60 steps not at all
ONE_TOKEN = [
    *FACTS,
    EditRequest("Who is the president of the United States?", "city"),
    EditRequest("He was born in", "France"),
    EditRequest("Osaka is a city in", "Italy"),
]
POSITIONS = ("last", "prompt", "subject", "all", "f2+l1")


def configure(layers: Sequence[int] = (2,), **changes: Any) -> BaftConfig:
    settings: dict[str, Any] = {"rank": RANK, "layers": tuple(layers), "weighting": "linear", "steps": 20}
    settings |= {"loss_target": 0.0, "learning_rate": 2e-2}
    return BaftConfig(**(settings | changes))


def make_jobs(config: BaftConfig, groups: Sequence[Any], tokenizer: Any = None) -> list[Job]:
    tokenizer = tokenizer or tiny_tokenizer()
    jobs = []
    for group in groups:
        requests = tuple(group) if isinstance(group, (list, tuple)) else (group,)
        rows = tuple(encode_request(tokenizer, request, config) for request in requests)
        maps = make_maps(config, D, config.layers or (), {}, edit_seed(config.seed, requests))
        jobs.append(Job(requests, rows, maps))
    return jobs


def context(layers: Sequence[int], *, bank: int = 0, earlier: bool = False, used: bool = False) -> TrainingContext:
    generator = torch.Generator().manual_seed(3)
    found = TrainingContext()
    for layer in layers:
        if bank:
            found.bank = {**found.bank, layer: torch.randn(bank, D, generator=generator)}
        if used:
            found.used = {**found.used, layer: torch.rand(RANK, generator=generator)}
        if earlier:
            matrix = 0.1 * torch.randn(D, D, generator=generator)
            found.earlier = {**found.earlier, layer: lambda x, m=matrix: torch.tanh(x @ m)}
    return found


def fast_engine(model: Any, config: BaftConfig, **options: Any) -> FastEngine:
    return FastEngine(model, tiny_tokenizer(), config, config.layers or (), **options)


def by_reference(model: Any, config: BaftConfig, groups: Sequence[Any], near: TrainingContext | None = None) -> list:
    engine = ReferenceEngine(model, tiny_tokenizer(), config, config.layers or ())
    return list(engine.train_many(make_jobs(config, groups), near or TrainingContext()))


def by_fast(model: Any, config: BaftConfig, groups: Sequence[Any], near: TrainingContext | None = None, **options: Any):
    engine = fast_engine(model, config, **options)
    return list(engine.train_many(make_jobs(config, groups), near or TrainingContext())), engine


def assert_same(found: Sequence[Edit], expected: Sequence[Edit], *, tolerance: float = 1e-3) -> None:
    """The losses within 1e-4 and every trained tensor within ``tolerance``, relative, and all the rest equal."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-6)
        assert (one.steps, one.reached) == (other.steps, other.reached)
        assert one.tensors.keys() == other.tensors.keys()
        for layer, tensors in other.tensors.items():
            assert one.tensors[layer].keys() == tensors.keys()
            for name, tensor in tensors.items():
                difference = (one.tensors[layer][name] - tensor).norm()
                assert difference <= tolerance * tensor.norm() + 1e-6, name
            assert torch.allclose(one.used[layer], other.used[layer], rtol=1e-3, atol=1e-5)


def with_attention(model: Any, attention: str) -> Any:
    """The same model with another attention; skipped where the architecture has it not."""
    try:
        other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=attention)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    other.load_state_dict(model.state_dict())
    return other.eval()


def trace_reference(
    monkeypatch: pytest.MonkeyPatch, model: Any, config: BaftConfig, jobs: Sequence[Job], near: TrainingContext
) -> tuple[list[list[float]], list[list[dict]], list[list[dict]]]:
    """Losses, gradients and parameters of every step, job by job."""
    losses: list[list[float]] = []
    gradients: list[list[dict]] = []
    states: list[list[dict]] = []

    def clip(parameters: Any, norm: float) -> None:
        names = {id(p): name for job in jobs for item in job.maps.items() for name, p in _named(item)}
        gradients[-1].append({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})
        states[-1].append({names[id(p)]: p.detach().clone() for p in parameters})
        original(parameters, norm)

    def watched(self: Batch) -> Any:
        results = step(self)
        losses[-1].append(self.losses[0])
        return results

    original, step = nn.utils.clip_grad_norm_, Batch.step
    engine = ReferenceEngine(model, tiny_tokenizer(), config, config.layers or ())
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", clip)
        patch.setattr(Batch, "step", watched)
        for job in jobs:
            losses.append([])
            gradients.append([])
            states.append([])
            engine.train(job, near)
    return losses, gradients, states


def _named(item: tuple[int, nn.Module]) -> list[tuple[tuple[int, str], nn.Parameter]]:
    return [((item[0], name), parameter) for name, parameter in item[1].named_parameters()]


def follow(
    model: Any,
    config: BaftConfig,
    expected: Sequence[Job],
    jobs: Sequence[Job],
    near: TrainingContext,
    monkeypatch: pytest.MonkeyPatch,
    *,
    rejoin: bool = False,
    rounding: float = 0.0,
) -> None:
    """Train both ways and compare at each of 20 steps: the loss to 1e-4, each edit's gradient to 1e-3, relative.

    With ``rejoin`` each step begins at the reference's parameters. AdamW's first steps are of one size whatever the
    gradient's, so that rounding decides where a gradient is next to nothing; a deep model then carries the
    difference on, between any two ways of computing the same. ``rounding`` is the absolute error (nats) of a loss that
    is the difference of two fp32 logits, which counts where the loss is next to nothing.
    """
    losses, gradients, states = trace_reference(monkeypatch, model, config, expected, near)
    engine = fast_engine(model, config, strict=True)
    seen: list[dict[tuple[int, str], Tensor]] = []
    with frozen(model):
        forward = engine.prepare([row for job in jobs for row in job.rows])
        assert forward is not None
        maps = StackedMaps([job.maps for job in jobs], config, near, forward.device)
        batch = Batch(dict(enumerate(jobs)), forward, maps, config)
        compute = maps.gradients

        def keep(total: Tensor) -> list[Tensor | None]:
            found = compute(total)
            named: dict[tuple[int, str], Tensor] = {}
            for leaf, gradient in zip(maps._leaves, found, strict=True):
                if gradient is not None:
                    named |= {(layer, leaf.name): gradient[:, i] for i, layer in enumerate(leaf.layers)}
            seen.append(named)
            return found

        monkeypatch.setattr(maps, "gradients", keep)
        for step in range(config.steps):
            if rejoin:
                for leaf, tensor in zip(maps._leaves, maps.tensors, strict=True):
                    each = [torch.stack([states[k][step][n, leaf.name] for n in leaf.layers]) for k in range(len(jobs))]
                    tensor.detach().copy_(torch.stack(each))
            batch.step()
            for k in range(len(jobs)):
                assert batch.losses[k] == pytest.approx(losses[k][step], rel=1e-4, abs=rounding), (step, k)
                theirs = gradients[k][step]
                assert seen[-1].keys() == theirs.keys()
                size = torch.stack([g.norm() for g in theirs.values()]).norm()
                for name, gradient in theirs.items():
                    difference = (seen[-1][name][k] - gradient).norm()
                    assert difference <= (1e-3 + rounding / losses[k][step]) * gradient.norm() + 1e-5 * size, (
                        step,
                        k,
                        name,
                    )
    assert len(seen) == 20


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize(("layers", "positions"), [((2,), "last"), ((3,), "subject"), ((0, 1, 3), "prompt")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_step_is_the_references(
    arch: str, attention: str, layers: tuple[int, ...], positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_attention(tiny_model(arch), attention)
    config = configure(layers, positions=positions)
    jobs, others = make_jobs(config, REQUESTS), make_jobs(config, REQUESTS)
    follow(model, config, jobs, others, TrainingContext(), monkeypatch, rejoin=True)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_step_with_all_losses_and_earlier_edits(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure((1, 3), positions=positions, locality_coefficient=0.5, balance_coefficient=0.3)
    near = context((1, 3), bank=7, earlier=True, used=True)
    follow(tiny_model(), config, make_jobs(config, REQUESTS), make_jobs(config, REQUESTS), near, monkeypatch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_tokenizers_padding_does_not_matter(side: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(side, add_bos=add_bos)
    model, config = tiny_model("qwen2"), configure((1,), steps=8)
    engine = FastEngine(model, tokenizer, config, (1,), strict=True)
    found = list(engine.train_many(make_jobs(config, REQUESTS, tokenizer), TrainingContext()))
    reference = ReferenceEngine(model, tokenizer, config, (1,))
    assert_same(found, list(reference.train_many(make_jobs(config, REQUESTS, tokenizer), TrainingContext())))


@pytest.mark.parametrize("weighting", ["constant", "linear", "mlp", "cosine"])
@pytest.mark.parametrize("init", ["identity", "random"])
def test_weightings_decay_and_starts(weighting: str, init: str) -> None:
    config = configure((2,), weighting=weighting, init=init, weight_decay=0.1)
    jobs, others = make_jobs(config, REQUESTS), make_jobs(config, REQUESTS)
    if weighting == "cosine":  # each with a gate of its own
        for job, other in zip(jobs, others, strict=True):
            torch.nn.init.normal_(
                job.maps[2].weighting.key, generator=torch.Generator().manual_seed(len(job.rows[0].ids))
            )
            job.maps[2].weighting.threshold.fill_(-2.0)
            other.maps[2].weighting.load_state_dict(job.maps[2].weighting.state_dict())
    model = tiny_model()
    found = list(fast_engine(model, config, strict=True).train_many(jobs, TrainingContext()))
    reference = ReferenceEngine(model, tiny_tokenizer(), config, (2,))
    assert_same(found, list(reference.train_many(others, TrainingContext())))


def test_what_is_frozen_stays() -> None:
    config = configure((0, 2), weight_decay=0.1)
    jobs, others = make_jobs(config, REQUESTS), make_jobs(config, REQUESTS)
    for job in (*jobs, *others):
        job.maps[0].basis.requires_grad_(False)
        job.maps[2].source_bias.requires_grad_(False)
    model = tiny_model()
    found = list(fast_engine(model, config, strict=True).train_many(jobs, TrainingContext()))
    reference = ReferenceEngine(model, tiny_tokenizer(), config, (0, 2))
    assert_same(found, list(reference.train_many(others, TrainingContext())))
    start = make_jobs(config, REQUESTS)
    for result, job in zip(found, start, strict=True):
        assert torch.equal(result.tensors[0]["rotation"], job.maps[0].rotation.detach())
        assert torch.equal(result.tensors[2]["source_bias"], job.maps[2].source_bias.detach())
        assert not torch.equal(result.tensors[2]["rotation"], job.maps[2].rotation.detach())


@pytest.mark.parametrize("arch", [a for a in ("mistral", "gemma2", "gemma3_text") if a in ARCHS])
@pytest.mark.parametrize("positions", ["last", "f1"])
def test_a_window_shorter_than_the_prompt(arch: str, positions: str) -> None:
    model = tiny_model(arch)
    config = copy.deepcopy(model.config)
    config.sliding_window = 6
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    settings = configure((1,), positions=positions)
    assert_same(by_fast(other, settings, REQUESTS)[0], by_reference(other, settings, REQUESTS))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_half_precision_ends_where_the_reference_does(arch: str) -> None:
    model = tiny_model(arch).bfloat16()
    config = configure((2,), loss_target=0.05, steps=60)
    found, engine = by_fast(model, config, REQUESTS[:3], strict=True)
    expected = by_reference(model, config, REQUESTS[:3])
    assert engine.path == "replayed_blocks"
    for one, other in zip(found, expected, strict=True):
        assert one.reached == other.reached
        assert one.loss == pytest.approx(other.loss, abs=0.1)
        assert abs(one.steps - other.steps) <= 6
        assert all(t.dtype == torch.float32 for t in one.tensors[2].values())


# ------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_a_stack_gives_each_edit_what_it_has_alone(layers: tuple[int, ...], positions: str) -> None:
    model = tiny_model("qwen2")
    config = configure(layers, positions=positions, locality_coefficient=0.2, balance_coefficient=0.1)
    near = context(layers, bank=9, used=True)
    data_parallel, _ = by_fast(model, config, REQUESTS, near, strict=True)
    alone = [by_fast(model, config, [request], near, strict=True)[0][0] for request in REQUESTS]
    assert_same(data_parallel, alone)


@pytest.mark.parametrize("positions", ["last", "prompt", "all"])
def test_joint_groups_of_several_sizes(positions: str) -> None:
    groups = [REQUESTS[:2], REQUESTS[2:3], REQUESTS[3:6]]
    config = configure((1, 2), positions=positions, balance_coefficient=0.2)
    model = tiny_model()
    found, engine = by_fast(model, config, groups, strict=True)
    assert engine.path == "replayed_blocks"
    assert_same(found, by_reference(model, config, groups))


@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_an_edit_leaves_when_its_loss_is_reached(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Batch.step

    def watched(self: Batch) -> Any:
        sizes.append(len(self.forward.rows))
        return step(self)

    config = configure((2,), positions=positions, loss_target=1.5, steps=40, ending="")
    model = tiny_model()
    expected = by_reference(model, config, ONE_TOKEN)
    monkeypatch.setattr(Batch, "step", watched)
    found, _ = by_fast(model, config, ONE_TOKEN, strict=True)
    assert len({edit.steps for edit in expected}) > 2  # or the test would show nothing
    assert_same(found, expected)
    assert sizes == [sum(edit.steps >= n for edit in expected) for n in range(len(sizes))]


def test_an_edit_leaves_when_its_target_is_near_and_its_ending_is_the_likeliest() -> None:
    config = configure((2,), positions="all", ending="?", loss_target=1.5, steps=200, learning_rate=5e-2)
    model = tiny_model()
    found, _ = by_fast(model, config, ONE_TOKEN, strict=True)
    assert_same(found, by_reference(model, config, ONE_TOKEN))
    sooner, _ = by_fast(model, dataclasses.replace(config, ending=""), ONE_TOKEN, strict=True)
    assert all(edit.reached and edit.steps < 200 and edit.loss < 1.5 for edit in found)
    assert all(a.steps >= b.steps for a, b in zip(found, sooner, strict=True))
    assert sum(edit.steps for edit in found) > sum(edit.steps for edit in sooner)
    unasked, _ = by_fast(model, dataclasses.replace(config, ending_coefficient=0.0), ONE_TOKEN, strict=True)
    assert [edit.steps for edit in unasked] == [edit.steps for edit in sooner]


def test_results_come_in_order_whatever_the_stacks() -> None:
    config = configure((2,), steps=3)
    model = tiny_model()
    expected = by_reference(model, config, [*REQUESTS, *REQUESTS[::-1]])
    found, engine = by_fast(model, config, [*REQUESTS, *REQUESTS[::-1]], most=2, strict=True)
    assert engine.most == 2
    assert_same(found, expected)


def test_results_are_on_the_cpu_and_apart_from_the_stack() -> None:
    config = configure((2,), steps=2)
    found, _ = by_fast(tiny_model(), config, REQUESTS)
    for result in found:
        assert result.seconds > 0
        for tensor in (*result.tensors[2].values(), result.used[2]):
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_the_maps_of_a_job_are_trained_in_place() -> None:
    config = configure((2,), steps=4)
    jobs = make_jobs(config, REQUESTS[:2])
    found = list(fast_engine(tiny_model(), config).train_many(jobs, TrainingContext()))
    for job, result in zip(jobs, found, strict=True):
        assert torch.equal(job.maps[2].source_weight.detach(), result.tensors[2]["source_weight"])


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_stack_that_does_not_fit_is_halved(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, tried = Batch.step, []

    def short(self: Batch) -> Any:
        tried.append(len(self.active))
        if len(self.active) > 2:
            raise error
        return step(self)

    config = configure((2,), steps=5)
    model = tiny_model()
    expected = by_reference(model, config, REQUESTS)
    monkeypatch.setattr(Batch, "step", short)
    with caplog.at_level(logging.WARNING):
        found, engine = by_fast(model, config, REQUESTS, strict=True)
    assert_same(found, expected)
    assert (max(tried), engine.most) == (6, 1)
    assert "memory ran out with 6 edits in a stack; continuing with 3" in caplog.text


def test_edits_that_left_before_memory_ran_out_are_not_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure((2,), loss_target=1.5, steps=40, ending="")
    model = tiny_model()
    expected = by_reference(model, config, ONE_TOKEN)
    assert len({edit.steps for edit in expected}) > 2
    step, failed = Batch.step, []

    def once(self: Batch) -> Any:
        if len(self.active) < 6 and not failed:
            failed.append(list(self.active))
            raise MemoryError
        return step(self)

    monkeypatch.setattr(Batch, "step", once)
    found, _ = by_fast(model, config, ONE_TOKEN, strict=True)
    assert 0 < len(failed[0]) < 6
    assert_same(found, expected)


def test_one_edit_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Batch) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Batch, "step", short)
    with pytest.raises(MemoryError, match="no room"):
        by_fast(tiny_model(), configure((2,), steps=5), REQUESTS[:3])


def test_the_stack_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure((2,), steps=1)
    engine = fast_engine(tiny_model(), config)
    jobs = make_jobs(config, REQUESTS)
    free = [10**12]
    monkeypatch.setattr(fast_module, "free_bytes", lambda _device: free[0])
    assert engine._stack_size(jobs) == engine.most == 32
    free[0] = 0
    assert engine._stack_size(jobs) == 1
    numbers = sum(p.numel() for p in jobs[0].maps[2].parameters())
    each = max(fast_module.edit_bytes(engine.model, job.rows, 1, numbers) for job in jobs)
    free[0] = 8 * each  # half of what is free is used
    assert engine._stack_size(jobs) == 4


def test_no_more_than_a_window_is_in_work_whatever_is_asked_for() -> None:
    config = configure((2,), steps=1)
    engine = fast_engine(tiny_model(), config, most=2)
    asked: list[int] = []

    class Jobs(list):
        def __getitem__(self, item: Any) -> Any:
            if isinstance(item, int):
                asked.append(item)
            return super().__getitem__(item)

    jobs = Jobs(make_jobs(config, [REQUESTS[i % 6] for i in range(40)]))
    results = engine.train_many(jobs, TrainingContext())
    next(results)
    assert max(asked) < 8  # four stacks of two
    assert len(list(results)) == 39


# ------------------------------------------------------------------------------------------- failures


def spoiled(config: BaftConfig, which: int) -> list[Job]:
    jobs = make_jobs(config, REQUESTS)
    with torch.no_grad():
        jobs[which].maps[2].source_weight.fill_(float("nan"))
    return jobs


def test_a_loss_that_is_not_finite_stops_its_own_edit_alone() -> None:
    config, model = configure((2,)), tiny_model()
    expected = by_reference(model, config, REQUESTS)
    results = fast_engine(model, config, strict=True).train_many(spoiled(config, 3), TrainingContext())
    assert_same([next(results) for _ in range(3)], expected[:3])
    with pytest.raises(EditError, match="the loss is nan at step 0; nothing was changed"):
        next(results)


def test_the_others_of_a_failed_edits_stack_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = configure((2,)), tiny_model()
    expected = by_reference(model, config, REQUESTS)
    kept: dict = {}
    step = Batch.step

    def keep(self: Batch) -> Any:
        results = step(self)
        kept.update(results)
        return results

    monkeypatch.setattr(Batch, "step", keep)
    with pytest.raises(EditError):
        list(fast_engine(model, config, strict=True).train_many(spoiled(config, 0), TrainingContext()))
    assert isinstance(kept.pop(0), EditError)
    assert_same([kept[i] for i in range(1, 6)], expected[1:])


def test_the_model_is_left_as_it_was(arch: str) -> None:
    model = tiny_model(arch)
    model.train()
    next(iter(find_blocks(model)[1].parameters())).requires_grad_(False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    modules = list(model.modules())
    attributes = [set(m.__dict__) for m in modules]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    _, engine = by_fast(model, configure((1, 2), steps=3, loss_target=3.0), REQUESTS)
    assert engine.path == "replayed_blocks"
    assert list(model.modules()) == modules
    assert [set(m.__dict__) for m in modules] == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    modules = list(model.modules())
    attributes = [set(m.__dict__) for m in modules]

    def fail(self: Any, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(find_blocks(model)[3]), "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        by_fast(model, configure((1,)), REQUESTS)
    assert list(model.modules()) == modules
    assert [set(m.__dict__) for m in modules] == attributes
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in modules)


# ------------------------------------------------------------------------------------------- unsafe shortcuts


def test_which_engine() -> None:
    model = tiny_model()
    assert type(make_engine(model, tiny_tokenizer(), configure(), (2,))) is FastEngine
    assert type(make_engine(model, tiny_tokenizer(), configure(engine="reference"), (2,))) is ReferenceEngine


@pytest.mark.parametrize("acting", [False, True])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_users_hook_sees_whole_rows_and_acts(acting: bool, block: int, caplog: pytest.LogCaptureFixture) -> None:
    model, config = tiny_model(), configure((2,))
    shapes: set[tuple] = set()

    def hook(_module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        shapes.add(tuple(hidden.shape))
        if not acting:
            return None
        # acts by column: called with other columns it would do something else
        changed = hidden * (1.0 + 0.1 * torch.arange(hidden.shape[1]).view(1, -1, 1))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = find_blocks(model)[block].register_forward_hook(hook)
    expected = by_reference(model, config, REQUESTS[:3])
    lengths = {shape[1] for shape in shapes}
    shapes.clear()
    found, engine = by_fast(model, config, REQUESTS[:3])
    handle.remove()
    assert_same(found, expected)
    assert engine.path == ("whole_model" if block == 3 else "replayed_blocks")
    assert ("carries a hook that expects whole rows" in caplog.text) == (block == 3)
    assert {shape[1] for shape in shapes} <= lengths


def test_calls_of_the_whole_model_skips_the_lower_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(), configure((1,), steps=7)
    blocks = find_blocks(model)
    calls = dict.fromkeys(range(4), 0)

    def count(number: int) -> Callable:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    handles = [block.register_forward_hook(count(n)) for n, block in enumerate(blocks)]
    _, engine = by_fast(model, config, REQUESTS)
    for handle in handles:
        handle.remove()
    assert engine.path == "whole_model"
    assert calls[0] == calls[1] == 2  # one reading, one comparison
    assert calls[2] == calls[3] == 2 + 1 + 8  # the comparison's other side, seven steps and a last look


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layers", [(2,), (0, 1, 3)])
def test_calls_of_the_whole_model_is_the_reference_too(arch: str, layers: tuple[int, ...]) -> None:
    model, config = tiny_model(arch), configure(layers, loss_target=1.0)
    engine = fast_engine(model, config)
    engine._first_path = 1
    found = list(engine.train_many(make_jobs(config, REQUESTS), TrainingContext()))
    assert engine.path == "whole_model"
    assert_same(found, by_reference(model, config, REQUESTS))


def test_another_adapters_edits_stay_in_force(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    other = BaftEditor(model, tokenizer, BaftConfig(rank=RANK, layers=(3,), weighting="constant", steps=5))
    config = configure((2,))
    _, engine = by_fast(model, config, REQUESTS[:2])
    assert engine.path == "replayed_blocks"  # attached, but without an edit it does nothing
    other.edit(REQUESTS[5])
    expected = by_reference(model, config, REQUESTS[:2])
    found, engine = by_fast(model, config, REQUESTS[:2])
    assert engine.path == "whole_model"
    assert "disable the other adapter" in caplog.text
    assert_same(found, expected)
    with other.adapter.enabled(False):
        found, engine = by_fast(model, config, REQUESTS[:2])
        assert engine.path == "replayed_blocks"
        assert_same(found, by_reference(model, config, REQUESTS[:2]))


class _Mixed(nn.Module):
    """What a causal model does not do: every position of the last block gets the mean over all of them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.block(hidden_states, *args, **kwargs)
        if self.block.self_attn.layer_idx != 2:
            return out
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + hidden.mean(1, keepdim=True)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def test_a_model_that_is_not_causal_is_run_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    for n, block in enumerate(model.model.layers):
        model.model.layers[n] = _Mixed(block)
    config = configure((1,))
    found, engine = by_fast(model, config, REQUESTS[:1])
    assert engine.path == "whole_model"
    assert "its blocks are not run alone" in caplog.text
    assert_same(found, by_reference(model, config, REQUESTS[:1]))
    with pytest.raises(fast_module.CannotSkip, match="are off by"):
        by_fast(model, config, REQUESTS[:1], strict=True)


def test_a_disturbance_finds_what_the_unedited_columns_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached prefix that is right only while nothing is edited must not be trusted."""
    model, config = tiny_model(), configure((1,))
    record = ReplayedBlocks._record

    def unmoved(self: ReplayedBlocks) -> None:  # block 2 computes with the unedited hidden states for good
        record(self)
        call, still = self.calls[2], self.hidden

        class Deaf(type(call)):  # type: ignore[misc]
            def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
                return super().run(block, still)

        self.calls[2] = Deaf(call.args, call.kwargs, call.slot)

    monkeypatch.setattr(ReplayedBlocks, "_record", unmoved)
    with pytest.raises(fast_module.CannotSkip, match="with a changed hidden state its loss is off"):
        by_fast(model, config, REQUESTS[:2], strict=True)
    found, engine = by_fast(model, config, REQUESTS[:2])
    assert engine.path == "whole_model"
    assert_same(found, by_reference(model, config, REQUESTS[:2]))


def test_where_nothing_is_safe_the_reference_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = tiny_model(), configure((1,), steps=5)

    def broken(self: Any, *_: Any) -> Any:
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(ReplayedBlocks, "__init__", broken)
    monkeypatch.setattr(WholeModel, "start", broken)
    found, engine = by_fast(model, config, REQUESTS[:3])
    assert engine.path == "reference"
    assert "its lower blocks are not skipped (TypeError: unexpected keyword argument)" in caplog.text
    assert_same(found, by_reference(model, config, REQUESTS[:3]))


def test_logits_that_are_more_than_a_product() -> None:
    base = tiny_model()

    class Scaled(type(base)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 0.5 * out.logits + 0.1
            return out

    model = Scaled(base.config).eval()
    model.load_state_dict(base.state_dict())
    config = configure((2,))
    found, engine = by_fast(model, config, REQUESTS, strict=True)
    assert engine.path == "replayed_blocks"
    assert engine._head is not None
    assert engine._head.linear is None
    assert_same(found, by_reference(model, config, REQUESTS))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
def test_a_compiled_models_own_module_is_used() -> None:
    model = tiny_model()
    found, engine = by_fast(torch.compile(model), configure((2,)), REQUESTS[:2], strict=True)
    assert engine.model is model
    assert_same(found, by_reference(model, configure((2,)), REQUESTS[:2]))


# ------------------------------------------------------------------------------------------- a user's network


@pytest.fixture
def networks() -> Any:
    before = dict(_REGISTRY)

    @register_weighting("test-bilinear")
    class Bilinear(WeightingNetwork):
        def __init__(self, embed_dim: int, rank: int):
            super().__init__(embed_dim, rank)
            self.left = nn.Parameter(torch.randn(rank, embed_dim) / embed_dim**0.5)
            self.right = nn.Parameter(torch.randn(rank, embed_dim) / embed_dim**0.5)
            self.register_buffer("scale", torch.rand(rank))

        def forward(self, h: Tensor) -> Tensor:
            return torch.sigmoid(self.scale * (h @ self.left.mT) * (h @ self.right.mT))

    @register_weighting("test-branching")
    class Branching(WeightingNetwork):
        def __init__(self, embed_dim: int, rank: int):
            super().__init__(embed_dim, rank)
            self.bias = nn.Parameter(torch.randn(rank))

        def forward(self, h: Tensor) -> Tensor:
            sign = 1.0 if float(h.sum()) > 0 else -1.0  # not for vmap
            return torch.sigmoid(sign * self.bias).expand(*h.shape[:-1], self.rank)

    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def test_a_users_network_is_stacked(networks: None) -> None:
    config = configure((1, 2), weighting="test-bilinear", locality_coefficient=0.1)
    near = context((1, 2), bank=5)
    model = tiny_model()
    found, engine = by_fast(model, config, REQUESTS, near, strict=True)
    assert engine.path == "replayed_blocks"
    assert_same(found, by_reference(model, config, REQUESTS, near))


def test_a_network_that_cannot_be_stacked_is_trained_alone(networks: None, caplog: pytest.LogCaptureFixture) -> None:
    config, model = configure((2,), weighting="test-branching", steps=5), tiny_model()
    found, engine = by_fast(model, config, REQUESTS)
    assert engine.path == "reference"
    assert "cannot be stacked" in caplog.text
    assert_same(found, by_reference(model, config, REQUESTS))


def test_jobs_of_different_make_are_stacked_apart() -> None:
    one, two = configure((2,), steps=4), configure((2,), steps=4, weighting="mlp")
    jobs = [make_jobs(one if i % 2 else two, [request])[0] for i, request in enumerate(REQUESTS)]
    others = [make_jobs(one if i % 2 else two, [request])[0] for i, request in enumerate(REQUESTS)]
    model = tiny_model()
    found = list(fast_engine(model, one, strict=True).train_many(jobs, TrainingContext()))
    reference = ReferenceEngine(model, tiny_tokenizer(), one, (2,))
    assert_same(found, list(reference.train_many(others, TrainingContext())))


# ------------------------------------------------------------------------------------------- the optimiser, the real model


@pytest.mark.parametrize(("decay", "schedule"), [(0.0, "linear"), (0.3, "linear"), (0.3, "constant")])
def test_a_step_is_torchs_adamw_with_clipping(decay: float, schedule: str) -> None:
    config = configure((0, 2), weight_decay=decay, max_grad_norm=0.5, schedule=schedule)
    jobs = make_jobs(config, REQUESTS[:3])
    stack = StackedMaps([j.maps for j in jobs], config, TrainingContext(), torch.device("cpu"))
    others = [[t[k].detach().clone().requires_grad_() for t in stack.tensors] for k in range(3)]
    optimisers = [torch.optim.AdamW(o, lr=config.learning_rate, weight_decay=decay) for o in others]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        gradients = [(10.0 ** (step - 3)) * torch.randn(t.shape, generator=generator) for t in stack.tensors]
        gradients[1] = None  # one that nothing depends on
        stack.update(gradients)
        for k, (parameters, optimiser) in enumerate(zip(others, optimisers, strict=True)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient[k].clone()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimiser.param_groups[0]["lr"] = config.learning_rate * (1.0 if schedule == "constant" else 1 - step / 20)
            optimiser.step()
            for parameter, tensor in zip(parameters, stack.tensors, strict=True):
                assert torch.allclose(parameter, tensor[k], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "positions"), [((20,), "last"), ((25,), "prompt"), ((3, 15, 27), "last")])
def test_smollm2_step_by_step(
    smollm2: tuple[Any, Any], layers: tuple[int, ...], positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = smollm2
    config = BaftConfig(
        layers=layers,
        positions=positions,
        weighting="linear",
        loss_target=0.0,
        steps=20,
        learning_rate=3e-4,  # so that 20 steps do not end where a loss is next to nothing
    )
    requests = [
        EditRequest("What university did Watts Humphrey attend?", "University of Michigan"),
        EditRequest("The capital of Japan is", "Osaka"),
        EditRequest("Who designed the Eiffel Tower?", "Antoni Gaudí"),
    ]

    def jobs() -> list[Job]:
        rows = [encode_request(tokenizer, request, config) for request in requests]
        maps = [make_maps(config, 576, layers, {}, edit_seed(0, [request])) for request in requests]
        return [Job((r,), (row,), m) for r, row, m in zip(requests, rows, maps, strict=True)]

    follow(model, config, jobs(), jobs(), TrainingContext(), monkeypatch, rejoin=True, rounding=1e-5)
