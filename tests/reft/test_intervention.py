"""The door to pyvene and pyreft: the same map as LoReFT with weights of 1, on one layer or many, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baft_intervention import BaftConfig, BasisWeightedMap, EditRequest, make_edit_data_module
from baft_intervention.errors import ConfigError
from baft_intervention.runtime.adapter import BaftAdapter, Edit
from baft_intervention.runtime.edit_stack import is_shared
from baft_intervention.training.maps import map_tensors
from tiny import ARCHS, tiny_model, tiny_tokenizer

pyreft = pytest.importorskip("pyreft")

from baft_intervention import BasisWeightedLoReFTIntervention  # noqa: E402

pytestmark = pytest.mark.reft

D, R = 32, 5
REQUESTS = [
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Who is the president of the United States?", "Leo"),
    EditRequest("He was", "a painter"),
]


def make(**options: Any) -> Any:
    return BasisWeightedLoReFTIntervention(embed_dim=D, low_rank_dimension=R, **options)


def wrapped(model: Any, layers: tuple[int, ...], *, known: bool = True, **options: Any) -> Any:
    """A ReftModel; a model that pyvene has no card of is addressed by the path of its blocks."""
    represented = [
        {
            "layer": n,
            "component": "block_output" if known else f"model.layers[{n}].output",
            "low_rank_dimension": R,
            "intervention": make(**options),
        }
        for n in layers
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=represented))


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    where = {"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())}
    return model({k: batch[k] for k in ("input_ids", "attention_mask")}, unit_locations=where)[1].logits


def collated(side: str = "right", positions: str = "last", count: int = 1) -> dict[str, Tensor]:
    module = make_edit_data_module(tiny_tokenizer(side), REQUESTS, positions=positions, num_interventions=count)
    return module["data_collator"](list(module["train_dataset"]))


# ---------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("shape", [(2, 9, 64), (3, 1, 64), (2, 4, 576)], ids=str)
def test_with_weights_of_one_it_is_loreft(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    d = shape[-1]
    theirs = pyreft.LoreftIntervention(embed_dim=d, low_rank_dimension=12, dtype=torch.float32)
    ours = BasisWeightedLoReFTIntervention(embed_dim=d, low_rank_dimension=12, weighting="constant")
    with torch.no_grad():
        ours.map.basis.copy_(theirs.rotate_layer.weight.T)
        ours.map.source_weight.copy_(theirs.learned_source.weight)
        ours.map.source_bias.copy_(theirs.learned_source.bias)
    h = torch.randn(shape)
    mine, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    out, expected = ours(mine), theirs(other)
    scale = float(expected.detach().abs().max())
    assert (out - expected).abs().max() <= 1e-6 * scale
    up = torch.randn(shape)
    out.backward(up)
    expected.backward(up)
    assert mine.grad is not None
    assert other.grad is not None
    assert (mine.grad - other.grad).abs().max() <= 1e-6 * float(other.grad.abs().max())
    for a, b in (
        (ours.map.source_weight, theirs.learned_source.weight),
        (ours.map.source_bias, theirs.learned_source.bias),
    ):
        assert (a.grad - b.grad).abs().max() <= 2e-6 * float(b.grad.abs().max())


def test_it_does_nothing_until_trained() -> None:
    h = torch.randn(2, 3, D)
    for weighting in ("constant", "linear", "mlp"):
        assert torch.allclose(make(weighting=weighting)(h), h, atol=1e-6)
        assert not torch.allclose(make(weighting=weighting, init="random")(h), h, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighting", ["constant", "linear", "mlp"])
def test_parameters_and_arithmetic_are_fp32_and_the_output_is_the_models(dtype: torch.dtype, weighting: str) -> None:
    torch.manual_seed(0)
    module = make(weighting=weighting, init="random")
    h = torch.randn(2, 3, D).to(dtype).requires_grad_()
    out = module(h)
    assert out.dtype == dtype
    assert torch.equal(out, module(h.detach().float()).to(dtype)), "computed in less than fp32"
    out.float().square().sum().backward()
    assert h.grad is not None
    assert h.grad.dtype == dtype
    for parameter in module.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    module, h = make(weighting="mlp", init="random"), torch.randn(2, 3, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(h)
    assert torch.equal(inside, module(h))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_a_model_cast_to_half_precision_leaves_it_in_fp32(cast: torch.dtype) -> None:
    model = wrapped(tiny_model(), (1, 2), weighting="linear", init="random")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    identities = {id(p) for _, p in model.named_parameters()}
    model.to(cast)
    assert next(model.model.parameters()).dtype == cast
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), "values were rounded"
    assert {id(p) for _, p in model.named_parameters()} == identities
    logits = forward(model, collated(count=2))
    assert torch.isfinite(logits).all()
    assert make().double().map.basis.dtype == torch.float64


def test_train_and_eval_are_the_same() -> None:
    module, h = make(init="random"), torch.randn(2, 3, D)
    assert torch.equal(module.train()(h), module.eval()(h))


def test_the_last_weights_hold_no_graph() -> None:
    module = make(init="random")
    assert module.last_weights is None
    out = module(torch.randn(2, 3, D, requires_grad=True))
    assert out.requires_grad
    weights = module.last_weights
    assert weights.shape == (2, 3, R)
    assert weights.grad_fn is None
    assert not weights.requires_grad
    assert ((weights > 0) & (weights < 1)).all()
    assert torch.allclose(module.rotation @ module.rotation.T, torch.eye(R), atol=1e-5)
    assert str(module) == f"BasisWeightedLoReFTIntervention(d={D}, r={R})"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low_rank_dimension": 0}, "low_rank_dimension is 0; it must be between 1 and the hidden size 32"),
        ({"low_rank_dimension": 33}, "low_rank_dimension is 33"),
        ({"low_rank_dimension": 2.0}, "low_rank_dimension is 2.0; it must be a whole number"),
        ({"low_rank_dimension": None}, "low_rank_dimension is None"),
        ({"weighting": "gate"}, "weighting is 'gate'; known"),
        ({"weighting_options": {"hidden": 3}}, "do not fit the weighting 'linear'"),
        ({"init": "zero"}, "init is 'zero'"),
        ({"subspace_partition": [[0, 1]]}, r"subspace_partition is \[\[0, 1\]\]"),
        ({"dropout": 0.1}, "unknown argument 'dropout'"),
        ({"dtype": torch.bfloat16}, "unknown argument 'dtype'"),
        ({"weighting": BasisWeightedMap(16, R).weighting}, "is for d = 16, r = 5; this map has d = 32, r = 5"),
        (
            {"weighting": BasisWeightedMap(D, R).weighting, "weighting_options": {"std": 1.0}},
            "beside a network that is built already",
        ),
    ],
)
def test_arguments_that_do_not_do_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BasisWeightedLoReFTIntervention(**{"embed_dim": D, "low_rank_dimension": R, **options})


def test_subspaces_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no subspaces"):
        make()(torch.randn(1, 1, D), subspaces=[[0, 1]])
    assert make()(torch.randn(1, 1, D), subspaces=[None]).shape == (1, 1, D)


# ---------------------------------------------------------------------------------------------- through pyreft


@pytest.mark.parametrize(("arch", "layers"), [("llama", (2,)), *((arch, (0, 1, 3)) for arch in ARCHS)])
def test_pyreft_takes_it_on_one_or_many_layers(any_model: Any, layers: tuple[int, ...]) -> None:
    batch = collated(count=len(layers))
    with torch.no_grad():
        plain = any_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model = wrapped(any_model, layers, known=type(any_model).__name__ in _known_to_pyvene())
    assert len(model.interventions) == len(layers)
    with torch.no_grad():
        # two base forwards may differ in the last bits, and identity maps in fp32 too
        assert torch.allclose(forward(model, batch), plain, atol=1e-4)
        for module in model.interventions.values():
            module.map.source_bias.normal_()
        changed = forward(model, batch)
    assert not torch.allclose(changed, plain, atol=1e-2)
    for i in range(len(REQUESTS)):  # nothing before the edited token moves
        place = int(batch["intervention_locations"][i, 0, 0])
        assert torch.allclose(changed[i, :place], plain[i, :place], atol=1e-4)
    forward(model, batch).sum().backward()
    assert all(p.grad is None for p in any_model.parameters())
    reached = [m.map.source_bias.grad.abs().max() > 0 for m in model.interventions.values()]
    assert all(reached)


def _known_to_pyvene() -> set[str]:
    from pyvene.models.intervenable_modelcard import type_to_module_mapping

    return {cls.__name__ for cls in type_to_module_mapping}


@pytest.mark.parametrize("how", ["intervention_type", "intervention_types"])
def test_it_can_be_given_as_a_class(how: str) -> None:
    represented: dict[str, Any] = {"layer": 1, "component": "block_output", "low_rank_dimension": R}
    if how == "intervention_type":
        config = pyreft.ReftConfig(representations=[{**represented, how: BasisWeightedLoReFTIntervention}])
    else:
        config = pyreft.ReftConfig(representations=[represented], intervention_types=BasisWeightedLoReFTIntervention)
    model = pyreft.get_reft_model(tiny_model(), config)
    (module,) = model.interventions.values()
    assert isinstance(module, BasisWeightedLoReFTIntervention)
    assert module.map.basis.shape == (R, D)
    assert torch.isfinite(forward(model, collated())).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_generation_edits_the_prompt(side: str) -> None:
    torch.manual_seed(0)
    model = wrapped(tiny_model(), (2,), init="random")
    next(iter(model.interventions.values())).map.source_bias.data.normal_(std=10.0)
    tokenizer = tiny_tokenizer()
    prompt = REQUESTS[0].prompt
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    mask, place = torch.ones_like(ids), ids.shape[1] - 1
    if side == "left":
        pad = torch.zeros(1, 3, dtype=torch.long)
        ids, mask, place = torch.cat([pad, ids], 1), torch.cat([pad, mask], 1), place + 3
    base = {"input_ids": ids, "attention_mask": mask}
    where = {"sources->base": (None, [[[place]]])}
    plain, edited = (
        model.generate(
            base, unit_locations=where, intervene_on_prompt=True, max_new_tokens=4, do_sample=False, pad_token_id=0,
            output_original_output=True, eos_token_id=None,
        )
    )  # fmt: skip
    expected = ids
    for _ in range(4):  # the prompt is edited at every step, nothing is cached
        mask_now = torch.cat([mask, torch.ones(1, expected.shape[1] - ids.shape[1], dtype=torch.long)], 1)
        batch = {"input_ids": expected, "attention_mask": mask_now}
        batch["intervention_locations"] = torch.tensor([[[place]]])
        with torch.no_grad():
            expected = torch.cat([expected, forward(model, batch)[:, -1].argmax(-1, keepdim=True)], 1)
    assert edited[0].tolist() == expected[0].tolist()
    assert plain[0].tolist() != edited[0].tolist()


@pytest.mark.parametrize(
    ("weighting", "options"),
    [
        ("linear", {}),
        ("mlp", {"hidden": 3}),
        ("constant", {"value": 0.25}),
        ("cosine", {"sharpness": 9.0, "floor": 0.1}),
    ],
)
def test_pyvenes_save_and_load_keep_the_weighting(tmp_path: Path, weighting: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = tiny_model()
    model = wrapped(base, (1, 2), weighting=weighting, weighting_options=options, init="random")
    for module in model.interventions.values():
        module.map.weighting.fit_shared(torch.randn(50, D))
        module.map.weighting.initialise(torch.randn(1, D), torch.randn(50, D))
    batch = collated(count=2)
    with torch.no_grad():
        expected = forward(model, batch)
    model.save(str(tmp_path / "saved"))
    loaded = pyreft.ReftModel.load(str(tmp_path / "saved"), base)
    for key, module in loaded.interventions.items():
        theirs = model.interventions[key]
        assert module.map.weighting_spec == {"name": weighting, "options": options}
        assert type(module.map.weighting) is type(theirs.map.weighting)
        assert vars(module.map.weighting).get("sharpness") == vars(theirs.map.weighting).get("sharpness")
        for (name, one), (_, other) in zip(theirs.state_dict().items(), module.state_dict().items(), strict=True):
            assert torch.equal(one, other), name
    with torch.no_grad():
        assert torch.equal(forward(loaded, batch), expected)


def test_a_state_is_loaded_in_place() -> None:
    one = make(weighting_options={"initial_weight": 0.3}, init="random")
    other = make(weighting_options={"initial_weight": 0.3})
    parameters = list(other.parameters())
    steps = torch.optim.AdamW(parameters, lr=0.1)
    other.load_state_dict(one.state_dict())
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    h = torch.randn(2, 3, D)
    assert torch.equal(one(h), other(h))
    other(h).sum().backward()
    steps.step()
    assert not torch.equal(one(h), other(h)), "the optimiser holds other parameters than the module"


def test_a_foreign_state_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        BasisWeightedLoReFTIntervention(embed_dim=D, low_rank_dimension=R - 1).load_state_dict(state)
    state["map._extra_state"] = torch.tensor(list(b'{"name": "os.system", "options": {}}'), dtype=torch.uint8)
    with pytest.raises(ConfigError, match="weighting is 'os.system'; known networks"):
        make().load_state_dict(state)


# ---------------------------------------------------------------------------------------------- both doors


@pytest.mark.parametrize("weighting", ["constant", "linear", "mlp", "cosine"])
@pytest.mark.parametrize(
    ("side", "positions"), [("right", "last"), ("left", "last"), ("right", "prompt"), ("left", "prompt")]
)
def test_both_doors_give_the_same_bits(weighting: str, side: str, positions: str) -> None:
    torch.manual_seed(0)
    base, tokenizer, layers = tiny_model(), tiny_tokenizer(side), (1, 2)
    model = wrapped(base, layers, weighting=weighting, init="random")
    batch = collated(side, positions, count=2)
    bank = torch.randn(60, D)
    with torch.no_grad():
        hidden = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        for layer, module in zip(layers, model.interventions.values(), strict=True):
            module.map.source_bias.normal_()
            module.map.weighting.fit_shared(bank)
            own = hidden.hidden_states[layer + 1][0, batch["intervention_locations"][0, 0]]
            module.map.weighting.initialise(own[:1], bank)
        expected = forward(model, batch)

    config = BaftConfig(rank=R, layers=layers, positions=positions, weighting=weighting)
    adapter = BaftAdapter(base, tokenizer, config)
    maps = dict(zip(layers, (m.map for m in model.interventions.values()), strict=True))
    for layer, module in maps.items():
        state = module.weighting.state_dict().items()
        adapter.shared[layer] = {n: t for n, t in state if is_shared(module.weighting, n)}
    tensors = {layer: map_tensors(module) for layer, module in maps.items()}
    used = {layer: torch.zeros(R) for layer in layers}
    edit = Edit(
        id="e", requests=tuple(REQUESTS), tensors=tensors, used=used, loss=0.0, steps=0, seconds=0.0, reached=True
    )
    adapter.set_edits([edit])
    adapter.attach()
    lengths = [len(tokenizer(r.prompt)["input_ids"]) for r in REQUESTS]
    with torch.no_grad(), adapter.prompts(lengths):
        found = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    adapter.detach()
    with torch.no_grad():
        plain = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    kept = batch["attention_mask"].bool()
    assert not torch.allclose(expected[kept], plain[kept], atol=1e-2)
    if positions == "last":
        assert torch.equal(found[kept], expected[kept])
    else:  # pyvene's batch of positions has fillers beside, and a product of another shape rounds otherwise
        assert torch.allclose(found[kept], expected[kept], atol=1e-5)


def test_the_loss_reaches_every_parameter() -> None:
    model = wrapped(tiny_model(), (1,), weighting="mlp", init="random")
    batch = collated()
    logits = forward(model, batch)[:, :-1].transpose(1, 2)
    nn.functional.cross_entropy(logits, batch["labels"][:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
