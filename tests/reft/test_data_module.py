"""The edit data module: positions in a padded batch are those of each prompt alone."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baft_intervention import BasisWeightedMap, EditRequest, make_edit_data_module
from baft_intervention.core.positions import PositionRule
from baft_intervention.errors import ConfigError, DataError, PositionError, RequestError
from baft_intervention.models.tokenization import encode_pair
from baft_intervention.reft.data_module import COLUMNS, EditCollator
from baft_intervention.runtime.call_state import hook_block
from tiny import EOS, tiny_model, tiny_tokenizer

PAIRS = [("France", "Rome"), ("the United States", "London and Tokyo"), ("Leo", "in 1965")]
REQUESTS = [EditRequest(f"The capital of {a} is", b, subject=a) for a, b in PAIRS]


def collate(module: dict[str, Any], rows: range | None = None) -> dict[str, torch.Tensor]:
    data = module["train_dataset"]
    return module["data_collator"]([data[i] for i in (rows or range(len(data)))])


@pytest.mark.parametrize("append_eos", [False, True])
def test_rows_are_the_ids_of_prompt_and_target(append_eos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    module = make_edit_data_module(tokenizer, REQUESTS, num_interventions=3, append_eos=append_eos)
    data = module["train_dataset"]
    assert isinstance(data, datasets.Dataset)
    assert data.column_names == list(COLUMNS)
    assert module["eval_dataset"] is None
    for row, request in zip(data, REQUESTS, strict=True):
        prompt, target = encode_pair(tokenizer, request.prompt, request.target_new)
        target = [*target, EOS] if append_eos else target
        assert row["input_ids"] == prompt + target
        assert row["labels"] == [-100] * len(prompt) + target
        assert row["attention_mask"] == [1] * len(prompt + target)
        assert row["intervention_locations"] == [[len(prompt) - 1]] * 3


def test_a_dataset_and_plain_rows_give_the_same_as_requests() -> None:
    rows = [{"prompt": r.prompt, "target_new": r.target_new, "subject": r.subject, "relation": "x"} for r in REQUESTS]
    expected = make_edit_data_module(tiny_tokenizer(), REQUESTS, positions="subject_all", eval_data=REQUESTS[:1])
    for data in (rows, datasets.Dataset.from_list(rows)):
        module = make_edit_data_module(tiny_tokenizer(), data, positions="subject_all", eval_data=rows[:1])
        assert module["train_dataset"].to_dict() == expected["train_dataset"].to_dict()
        assert module["eval_dataset"].to_dict() == expected["eval_dataset"].to_dict()


@pytest.mark.parametrize("rule", ["last", "subject", "subject_all", "prompt", "all", "f2+l2"])
def test_locations_move_with_the_padding(rule: str) -> None:
    batches = {}
    for side in ("right", "left"):
        module = make_edit_data_module(tiny_tokenizer(side), REQUESTS, positions=rule, num_interventions=2)
        batches[side] = batch = collate(module)
        assert all(tensor.dtype == torch.long for tensor in batch.values())
        rows = batch["intervention_locations"]
        assert rows.shape[:2] == (3, 2)
        for i, row in enumerate(module["train_dataset"]):
            length = len(row["input_ids"])
            kept = batch["attention_mask"][i].bool()
            assert int(kept.sum()) == length
            assert batch["input_ids"][i][kept].tolist() == row["input_ids"]
            assert batch["labels"][i][kept].tolist() == row["labels"]
            assert (batch["labels"][i][~kept] == -100).all()
            start = int(kept.int().argmax())
            for one, original in zip(rows[i], row["intervention_locations"], strict=True):
                text = one[kept[one]]
                assert (text - start).tolist() == original
                assert len(set(text.tolist())) == len(text), "a location counted twice has twice its gradient"
    for right, left in zip(*(batches[side]["input_ids"] for side in ("right", "left")), strict=True):
        assert right[right != 0].tolist() == left[left != 0].tolist()


def test_a_batch_that_is_rectangular_is_not_widened() -> None:
    module = make_edit_data_module(tiny_tokenizer(), REQUESTS, positions="last")
    widest = max(len(row["input_ids"]) for row in module["train_dataset"])
    assert collate(module)["input_ids"].shape[1] == widest


@st.composite
def ragged(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
        places = st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=len(ids), unique=True).map(sorted)
        labels = [-100] * len(ids)
        rows.append({"input_ids": ids, "labels": labels, "intervention_locations": [draw(places), draw(places)]})
    return rows


@settings(deadline=None)
@given(ragged(), st.sampled_from(["right", "left"]))
def test_every_location_is_its_own_token_or_padding(rows: list[dict[str, Any]], side: str) -> None:
    batch = EditCollator(pad_id=0, side=side)(rows)  # 0 is a token here too: the mask must come from lengths
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    for i, row in enumerate(rows):
        for one, original in zip(batch["intervention_locations"][i], row["intervention_locations"], strict=True):
            text = one[batch["attention_mask"][i][one] == 1]
            shift = batch["input_ids"].shape[1] - len(row["input_ids"]) if side == "left" else 0
            assert text.tolist() == [j + shift for j in original]


@pytest.mark.reft
@pytest.mark.parametrize("side", ["right", "left"])
def test_fillers_change_neither_value_nor_gradient(side: str) -> None:
    """pyvene on a ragged batch against a hook on each prompt alone."""
    pyreft = pytest.importorskip("pyreft")
    from baft_intervention import BasisWeightedLoReFTIntervention

    torch.manual_seed(0)
    module = BasisWeightedLoReFTIntervention(embed_dim=32, low_rank_dimension=4, init="random")
    represented = {"layer": 1, "component": "block_output", "low_rank_dimension": 4, "intervention": module}
    model = pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=represented))
    data = make_edit_data_module(tiny_tokenizer(side), REQUESTS, positions="subject_all")
    batch = collate(data)
    assert (batch["attention_mask"].gather(1, batch["intervention_locations"][:, 0]) == 0).any(), "nothing is ragged"
    where = {"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())}
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(ids, unit_locations=where)[1].logits
    nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="sum").backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    for i, row in enumerate(data["train_dataset"]):
        places = row["intervention_locations"][0]
        handle = hook_block(model.model.model.layers[1], lambda h, places=places: written(h, module.map, places))
        alone = model.model(torch.tensor([row["input_ids"]])).logits
        handle.remove()
        assert torch.allclose(alone[0], logits[i][batch["attention_mask"][i].bool()], atol=1e-4)
        labels = torch.tensor([row["labels"]])
        nn.functional.cross_entropy(alone[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum").backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-4 * float(gradients[name].abs().max()))


def written(hidden: torch.Tensor, module: BasisWeightedMap, places: list[int]) -> torch.Tensor:
    index = torch.tensor(places)
    return hidden.index_copy(1, index, module(hidden[:, index]))


@pytest.mark.parametrize(
    ("data", "positions", "error", "match"),
    [
        ([{"prompt": "a b"}], "last", DataError, r"data\[0\] has no 'target_new'; columns here: prompt; needed"),
        (
            [{"prompt": "a b", "target_new": "c"}, {"question": "a"}],
            "last",
            DataError,
            r"data\[1\] has no 'prompt' and no 'target_new'; columns here: question",
        ),
        ([{"prompt": "a", "target_new": "b", "subject": None}], "subject", DataError, r"data\[0\] has no 'subject'"),
        ([], "last", DataError, "data has no rows"),
        ({"prompt": "a"}, "last", DataError, "data is dict"),
        ("a b", "last", DataError, "data is str"),
        ([7], "last", DataError, r"data\[0\] is 7"),
        ([{"prompt": "a", "target_new": " "}], "last", RequestError, r"data\[0\].*target_new is empty"),
        ([{"prompt": "a b", "target_new": "c", "subject": "x"}], "subject", PositionError, r"data\[0\].*'x'.*'a b'"),
        ([{"prompt": "a", "target_new": "b"}], "first", ConfigError, "positions is 'first'"),
    ],
)
def test_bad_rows_are_named(data: Any, positions: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make_edit_data_module(tiny_tokenizer(), data, positions=positions)


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_the_number_of_interventions_is_checked(count: Any) -> None:
    with pytest.raises(ConfigError, match="num_interventions is"):
        make_edit_data_module(tiny_tokenizer(), REQUESTS, num_interventions=count)


def test_a_parsed_rule_does_as_well() -> None:
    one = make_edit_data_module(tiny_tokenizer(), REQUESTS, positions=PositionRule.parse("f1+l2"))
    other = make_edit_data_module(tiny_tokenizer(), REQUESTS, positions="f1+l2")
    assert one["train_dataset"].to_dict() == other["train_dataset"].to_dict()
