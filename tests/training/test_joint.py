"""Joint edits: all requests of a call trained together in one set of bases; and edits that compete, in any company."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import EditError
from baft_intervention.models.tokenization import encode_pair
from baft_intervention.requests import EditRequest
from edits import FACTS, LEO, adapter_bytes, tiny_editor
from tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    *FACTS,
    EditRequest("Who is the president of the United States?", "city", id="president"),
    EditRequest("He was born in", "France", id="born"),
    EditRequest("Osaka is a city in", "Italy", id="osaka"),
]
JOINT: dict[str, Any] = {"allocation": "joint", "weighting": "constant", "rank": 12, "layers": (2,), "loss_target": 0.0}


def editor_of(**changes: Any) -> BaftEditor:
    return tiny_editor(tiny_model(), tiny_tokenizer(), **changes)


@torch.no_grad()
def loss_of(editor: BaftEditor, request: EditRequest) -> float:
    """Mean over the target's tokens, nats."""
    prompt, target = encode_pair(editor.tokenizer, request.prompt, request.target_new)
    with editor.adapter.prompts([len(prompt)]):
        scores = editor.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(scores, torch.tensor(target)))


def assert_same(one: BaftEditor, other: BaftEditor, tolerance: float) -> None:
    assert [edit.id for edit in one.edits] == [edit.id for edit in other.edits]
    for edit, expected in zip(one.edits, other.edits, strict=True):
        assert edit.requests == expected.requests
        assert edit.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        assert (edit.steps, edit.reached) == (expected.steps, expected.reached)
        for layer, tensors in expected.tensors.items():
            assert torch.allclose(edit.used[layer], expected.used[layer], atol=1e-4)
            for name, tensor in tensors.items():
                assert torch.allclose(edit.tensors[layer][name], tensor, atol=tolerance), name


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_edits_that_compete_are_the_same_one_by_one_and_all_at_once(engine: str) -> None:
    one_by_one, together = (editor_of(engine=engine, steps=20) for _ in range(2))
    for fact in FACTS:
        one_by_one.edit(fact)
    together.edit(FACTS)
    assert_same(together, one_by_one, 1e-4)


@pytest.mark.parametrize("weighting", ["constant", "linear"])
def test_both_engines_train_the_same_joint_edit(weighting: str) -> None:
    changes = {**JOINT, "weighting": weighting, "locality_coefficient": 0.3, "balance_coefficient": 0.2, "steps": 8}
    changes |= {"learning_rate": 0.01, "weight_decay": 0.1, "layers": (1, 2), "augmentations": 1}
    fast, plain = (editor_of(**changes, engine=engine) for engine in ("auto", "reference"))
    for editor in (fast, plain):
        editor.edit(REQUESTS)
        assert len(editor.edits) == 1
    assert_same(fast, plain, 1e-3)


def test_a_joint_edit_teaches_all_requests() -> None:
    editor = editor_of(**JOINT, steps=80)
    before = [loss_of(editor, request) for request in REQUESTS[:4]]
    editor.edit(REQUESTS[:4])
    after = [loss_of(editor, request) for request in REQUESTS[:4]]
    assert all(now < 0.5 * then for now, then in zip(after, before, strict=True))
    assert editor.edits[0].loss == pytest.approx(sum(after) / len(after), abs=0.01)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    editor = editor_of(**JOINT)
    editor.edit(dataclasses.replace(LEO, prompt="Leo was", id="before"))
    state = adapter_bytes(editor)
    with torch.no_grad():
        editor.model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(EditError, match="the loss is nan at step 0; nothing was changed"):
        editor.edit(REQUESTS)
    assert adapter_bytes(editor) == state
