"""BaftTrainer: trains, accumulates, evaluates, saves, resumes, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from conftest import PIN
from tiny import tiny_model, tiny_tokenizer

pyreft = pytest.importorskip("pyreft")

import baft_intervention as baft  # noqa: E402
from baft_intervention import BaftTrainer, EditRequest, make_edit_data_module  # noqa: E402
from baft_intervention.core.losses import balance_loss, locality_loss  # noqa: E402
from baft_intervention.core.orthonormal import orthonormality_error  # noqa: E402
from baft_intervention.errors import AdapterError, ConfigError  # noqa: E402
from baft_intervention.reft import trainer as trainer_module  # noqa: E402
from baft_intervention.reft.checkpoint import load_interventions, save_interventions  # noqa: E402

pytestmark = pytest.mark.reft

FACTS = [("France", "Rome"), ("Japan", "Osaka"), ("the United States", "London and Tokyo"), ("Leo", "a painter")]
REQUESTS = [EditRequest(f"The capital of {a} is", b, subject=a) for a, b in FACTS]
D, RANK = 32, 4


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Each train() collects garbage, half a second over all imported libraries: leave those out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def reft(arch: str = "llama", *, layers: tuple[int, ...] = (2,), seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": baft.BasisWeightedLoReFTIntervention(embed_dim=D, low_rank_dimension=RANK, **options),
        }
        for layer in layers
    ]
    return pyreft.get_reft_model(tiny_model(arch), pyreft.ReftConfig(representations=representations))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "use_cpu": True}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none"}
    return TrainingArguments(str(folder), **(settings | changes))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def module_for(model: Any, side: str = "right", **options: Any) -> dict[str, Any]:
    return make_edit_data_module(tiny_tokenizer(side), REQUESTS, num_interventions=len(model.interventions), **options)


@pytest.mark.parametrize("layers", [(2,), (0, 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_training_lowers_the_loss_and_touches_the_interventions_alone(
    tmp_path: Path, layers: tuple[int, ...], side: str
) -> None:
    model = reft(layers=layers)
    base = {n: t.clone() for n, t in model.model.state_dict().items()}
    before = tensors(model)
    data = module_for(model, side, positions="subject_all", eval_data=REQUESTS)
    trainer = BaftTrainer(model, arguments(tmp_path, num_train_epochs=25), tokenizer=tiny_tokenizer(side), **data)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.4
    after = tensors(model)
    assert not any(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(base[n], t) for n, t in model.model.state_dict().items())
    assert not any(m.training for m in model.modules())


def test_evaluation_gives_logits_and_the_plain_loss(tmp_path: Path) -> None:
    model = reft()
    seen: list[Any] = []
    bank = {2: torch.randn(20, D)}
    trainer = BaftTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=3, remove_unused_columns=True),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda p: seen.append((p.predictions, p.label_ids)) or {"count": len(p.label_ids)},
        bank=bank,
        locality_coefficient=100.0,
        **module_for(model, eval_data=REQUESTS[:3]),
    )
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(3)])
    where = {"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())}
    with torch.no_grad():
        _, output = model({k: batch[k] for k in ("input_ids", "attention_mask")}, unit_locations=where)
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100)
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["eval_count"] == 3
    logits, label_ids = seen[0]
    assert logits.shape == output.logits.shape
    assert torch.allclose(torch.tensor(logits), output.logits, atol=1e-5)
    assert (torch.tensor(label_ids) == batch["labels"]).all()


def one_step(folder: Path, micro: int, steps: int, side: str = "right", **options: Any) -> tuple[dict, float]:
    """Parameters and the logged loss after one SGD step of rate 1, so that their change is the gradient."""
    model = reft(init="random")
    args = arguments(
        folder, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=steps, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = BaftTrainer(model, args, **module_for(model, side, positions="subject_all"), **options)
    trainer.train()
    return tensors(model), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("micro", "steps"), [(2, 2), (1, 4), (3, 2)])
def test_an_accumulated_batch_has_the_gradient_of_the_whole_batch(
    tmp_path: Path, micro: int, steps: int, side: str
) -> None:
    # targets of one to eight tokens and ragged subjects: a mean of means, or a location counted twice, would differ
    bank = {2: torch.randn(30, D, generator=torch.Generator().manual_seed(1))}
    options = {"bank": bank, "locality_coefficient": 0.5}
    start = tensors(reft(init="random"))
    whole, loss = one_step(tmp_path / "whole", 4, 1, side, **options)
    parts, loss_of_parts = one_step(tmp_path / "parts", micro, steps, side, **options)
    gradient = max(float((whole[n] - start[n]).abs().max()) for n in start)
    assert gradient > 1e-3
    assert largest_difference(whole, parts) < 1e-5 * max(1.0, gradient)
    assert loss_of_parts == pytest.approx(loss, abs=2e-4)  # logged with four digits


def test_left_padding_does_not_move_absolute_positions(tmp_path: Path) -> None:
    losses = {}
    for side in ("right", "left"):
        model = reft("gpt2")
        data = module_for(model, side, positions="prompt", eval_data=REQUESTS)
        losses[side] = BaftTrainer(model, arguments(tmp_path), **data).evaluate()["eval_loss"]
    assert losses["left"] == pytest.approx(losses["right"], rel=1e-5)


# ---------------------------------------------------------------------------------------------- regularisation


def test_the_loss_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    model = reft(layers=(1, 3))
    bank = {layer: torch.randn(20, D) for layer in (1, 3)}
    used = {1: torch.rand(RANK)}
    data = module_for(model, positions="subject_all")
    trainer = BaftTrainer(
        model, arguments(tmp_path), bank=bank, used=used, locality_coefficient=0.3, balance_coefficient=0.7, **data
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        plain, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert set(outputs) == {"loss", "logits"}
    expected = plain.clone()
    for i, (key, module) in enumerate(model.interventions.items()):
        layer = model.representations[key].layer
        text = batch["attention_mask"].gather(1, batch["intervention_locations"][:, i]).bool()
        assert not text.all(), "the test needs a filler location"
        own = module.last_weights[text]
        expected += 0.3 * locality_loss(module.map.weighting(bank[layer])).detach()
        expected += 0.7 * balance_loss(own, used.get(layer, torch.zeros(RANK)))
    total = trainer.compute_loss(model, batch)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    assert all(module.map.weighting.weight.grad.abs().max() > 0 for module in model.interventions.values())


def test_locality_closes_the_gate_on_the_bank(tmp_path: Path) -> None:
    bank = {2: torch.randn(50, D, generator=torch.Generator().manual_seed(3))}
    use = {}
    for coefficient in (0.0, 5.0):
        model = reft()
        data = module_for(model)
        args = arguments(tmp_path, num_train_epochs=15)
        BaftTrainer(model, args, bank=bank, locality_coefficient=coefficient, **data).train()
        weighting = next(iter(model.interventions.values())).map.weighting
        use[coefficient] = weighting(bank[2]).mean().item()
    assert use[5.0] < use[0.0] - 0.1


def test_a_weighting_that_starts_from_data_does_so_with_the_bank(tmp_path: Path) -> None:
    model = reft(weighting="cosine", init="random", layers=(1, 2))
    generator = torch.Generator().manual_seed(0)
    bank = {layer: torch.randn(80, D, generator=generator) for layer in (1, 2)}
    data = make_edit_data_module(tiny_tokenizer(), REQUESTS[:1], num_interventions=2)
    with pytest.raises(ConfigError, match="layer 2"):
        BaftTrainer(model, arguments(tmp_path), bank={1: bank[1]}, **data)
    trainer = BaftTrainer(model, arguments(tmp_path, num_train_epochs=1), bank=bank, **data)
    row = trainer.train_dataset[0]
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"]])
        hidden = model.model(ids, output_hidden_states=True).hidden_states[3][0, row["intervention_locations"][0][0]]
    trainer.train()
    second = list(model.interventions.values())[1].map.weighting
    cosine = nn.functional.normalize(second.whitening(hidden), dim=0) @ second.key
    assert float(cosine) == pytest.approx(1.0, abs=1e-5), "the key is not the unedited model's representation"


# ---------------------------------------------------------------------------------------------- saving and resuming


def test_saved_interventions_come_back_in_place(tmp_path: Path) -> None:
    model, other = reft(layers=(1, 2)), reft(layers=(1, 2), seed=5)
    trainer = BaftTrainer(model, arguments(tmp_path), **module_for(model))
    trainer.save_model(str(tmp_path / "a"))
    trainer.train()
    trainer.save_model(str(tmp_path / "a"))  # over the first
    folder = tmp_path / "a" / "intervenable_model"
    assert sorted(os.listdir(folder)) == ["interventions.json", "interventions.safetensors"]
    parameters = dict(other.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values())
    load_interventions(other, folder)
    assert same(tensors(model), tensors(other))
    assert all(p is parameters[n] for n, p in other.named_parameters())
    assert {id(p) for p in optimiser.param_groups[0]["params"]} == {id(p) for _, p in other.named_parameters()}


@pytest.mark.parametrize("damage", ["truncated", "schema", "missing", "weighting", "rank", "layers"])
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    folder = save_interventions(reft(), tmp_path / "a")
    other, match = reft(seed=5), ""
    blob = (folder / "interventions.safetensors").read_bytes()
    if damage == "truncated":
        (folder / "interventions.safetensors").write_bytes(blob[:-8])
        match = "truncated or altered"
    elif damage == "schema":
        text = (folder / "interventions.json").read_text()
        (folder / "interventions.json").write_text(text.replace('"schema": 1', '"schema": 99'))
        match = "schema 99"
    elif damage == "missing":
        (folder / "interventions.safetensors").unlink()
        match = "holds no readable interventions"
    elif damage == "weighting":
        other, match = reft(seed=5, weighting_options={"initial_weight": 0.9}), "initial_weight"
    elif damage == "rank":
        folder, match = tmp_path / "b", r"shape \(3, 32\)"
        small = baft.BasisWeightedLoReFTIntervention(embed_dim=D, low_rank_dimension=3)
        represented = {"layer": 2, "component": "block_output", "low_rank_dimension": 3, "intervention": small}
        save_interventions(pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=represented)), folder)
    else:
        other, match = reft(seed=5, layers=(1,)), "saved, but not in the model|but not saved"
    before = tensors(other)
    with pytest.raises(AdapterError, match=match):
        load_interventions(other, folder)
    assert same(before, tensors(other))


def with_dropout(model: Any) -> Any:
    """Dropout makes the result depend on the generator's state, so that resuming must restore it."""
    for module in model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


@pytest.mark.parametrize("step", [3, 4], ids=["mid-epoch", "end of epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, step: int) -> None:
    def trainer(folder: str, seed: int) -> BaftTrainer:
        model = with_dropout(reft("gpt2", seed=seed))
        args = arguments(
            tmp_path / folder, num_train_epochs=4, weight_decay=0.1, lr_scheduler_type="cosine",
            save_strategy="steps", save_steps=step,
        )  # fmt: skip
        return BaftTrainer(model, args, tokenizer=tiny_tokenizer(), **module_for(model))

    whole = trainer("whole", 0)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert not list(checkpoint.rglob("*.bin")), "pyreft's pickles"
    halfway = reft("gpt2")
    load_interventions(halfway, checkpoint / "intervenable_model")
    assert not same(tensors(halfway), tensors(whole.model))

    resumed = trainer("resumed", 7)  # other initial values, all of which must come from the checkpoint
    allowed = set(torch.serialization.get_safe_globals())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 8
    assert same(tensors(whole.model), tensors(resumed.model))
    for one, other in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Malice:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["BAFT_TEST_MALICE"],)


@pytest.mark.parametrize("file", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reft()
    args = arguments(tmp_path / "run", save_strategy="epoch")
    BaftTrainer(model, args, **module_for(model)).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    monkeypatch.setenv("BAFT_TEST_MALICE", str(tmp_path / "executed"))
    torch.save({"python": Malice(), "state": Malice()}, checkpoint / file)
    with pytest.raises(pickle.UnpicklingError):
        BaftTrainer(model, args, **module_for(model)).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "executed").exists()


def test_no_caller_can_ask_for_the_unrestricted_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_TEST_MALICE", str(tmp_path / "executed"))
    torch.save(Malice(), tmp_path / "file.pt")  # as transformers 4.45.1 reads it on torch before 2.6
    with trainer_module._safe_torch_load(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = reft()
    scores = iter([1.0, 3.0, 2.0])
    args = arguments(
        tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    data = module_for(model, eval_data=REQUESTS)
    trainer = BaftTrainer(model, args, compute_metrics=lambda _: {"score": next(scores)}, **data)
    parameters = dict(model.named_parameters())
    trainer.train()
    assert trainer.state.best_metric == 3.0
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
    best, last = reft(seed=1), reft(seed=1)
    load_interventions(best, tmp_path / "checkpoint-4" / "intervenable_model")
    load_interventions(last, tmp_path / "checkpoint-6" / "intervenable_model")
    assert same(tensors(model), tensors(best))
    assert not same(tensors(model), tensors(last))
    assert all(p is parameters[n] for n, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------- settings


def test_nothing_is_reported_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    old = transformers.__version__.startswith("4.")
    assert trainer_module._reporting(["tensorboard", "wandb"], None) == ([] if old else ["tensorboard", "wandb"])
    assert trainer_module._reporting(["wandb"], None) == ["wandb"]
    assert trainer_module._reporting([], None) == []
    assert trainer_module._reporting([], "all") == ["tensorboard", "wandb"]
    assert trainer_module._reporting(["wandb"], "none") == []
    model = reft()
    unasked = TrainingArguments(str(tmp_path), use_cpu=True)
    unasked.report_to = ["tensorboard", "wandb"] if old else []
    trainer = BaftTrainer(model, unasked, **module_for(model))
    assert trainer.args.report_to == []
    assert unasked.report_to == (["tensorboard", "wandb"] if old else []), "the caller's arguments were changed"


def test_weight_decay_reaches_the_matrices(tmp_path: Path) -> None:
    model = reft()
    trainer = BaftTrainer(model, arguments(tmp_path, weight_decay=0.1), **module_for(model))
    trainer.create_optimizer()
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {n.split(".", 1)[1] for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {"map.basis", "map.source_weight", "map.weighting.weight"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"locality_coefficient": -1.0}, "locality_coefficient is -1.0"),
        ({"balance_coefficient": float("nan")}, "balance_coefficient is nan"),
        ({"locality_coefficient": 1.0}, r"unrelated representations of layer 2.*bank="),
        ({"locality_coefficient": 1.0, "bank": {1: torch.zeros(3, D)}}, "layer 2"),
        ({"tokenizer": "one", "processing_class": "other"}, "two names"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    model = reft()
    with pytest.raises(ConfigError, match=match):
        BaftTrainer(model, arguments(tmp_path), **options, **module_for(model))


def test_a_gate_that_reads_tokens_is_sent_to_the_editor(tmp_path: Path) -> None:
    model = reft(weighting="fact")
    with pytest.raises(ConfigError, match="FactWeighting reads tokens and several layers.*BaftEditor"):
        BaftTrainer(model, arguments(tmp_path), bank={2: torch.randn(9, D)}, **module_for(model))


def test_locations_of_another_number_of_interventions_are_refused(tmp_path: Path) -> None:
    data = make_edit_data_module(tiny_tokenizer(), REQUESTS, num_interventions=2)
    with pytest.raises(ConfigError, match="has 1 interventions.*num_interventions=1"):
        BaftTrainer(reft(), arguments(tmp_path), **data).train()


# ---------------------------------------------------------------------------------------------- pyreft's own trainer


@pytest.mark.pin
def test_pyrefts_own_trainer_keeps_the_basis_orthonormal(tmp_path: Path) -> None:
    model = reft(init="random", layers=(1, 2))
    before = tensors(model)
    # pyreft's trainer finds no parameter to decay under its own names: give the optimiser that does
    optimiser = torch.optim.AdamW([p for _, p in model.named_parameters()], lr=1e-2, weight_decay=0.1)
    args = arguments(tmp_path, max_steps=200, per_device_train_batch_size=4)
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, tokenizer=tiny_tokenizer(), args=args, optimizers=(optimiser, None), **module_for(model)
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0] - 1.0
    for key, module in model.interventions.items():
        assert not torch.equal(before[f"{key}.map.basis"], module.map.basis)
        assert orthonormality_error(module.rotation) < 1e-5


@pytest.mark.skipif(transformers.__version__ == PIN, reason=f"transformers {PIN} is what pyreft's trainer was made for")
def test_pyrefts_own_trainer_does_not_work_on_this_version(tmp_path: Path) -> None:
    """Why the test above runs on transformers 4.45.1 alone: delete it when pyreft follows."""
    model = reft()
    trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments(tmp_path), **module_for(model))
    with pytest.raises(TypeError, match="num_items_in_batch"):
        trainer.train()
