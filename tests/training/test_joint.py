"""Requests one after another and all at once, with bases of their own and with shared ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import EditError
from baft_intervention.models.tokenization import encode_pair
from baft_intervention.requests import EditRequest
from baft_intervention.training.joint import JointEngine
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
        assert edit.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        assert (edit.steps, edit.reached) == (expected.steps, expected.reached)
        for layer, tensors in expected.tensors.items():
            assert torch.allclose(edit.used[layer], expected.used[layer], atol=1e-4)
            for name, tensor in tensors.items():
                assert torch.allclose(edit.tensors[layer][name], tensor, atol=tolerance), name


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_edits_that_compete_are_the_same_one_by_one_and_all_at_once(engine: str) -> None:
    depth, breadth = (editor_of(order=order, engine=engine, steps=20) for order in ("depth", "breadth"))
    for editor in (depth, breadth):
        editor.edit(FACTS)
    assert_same(breadth, depth, 1e-4)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("weighting", ["constant", "linear"])
def test_one_mini_batch_of_all_requests_is_what_the_engines_do(weighting: str, engine: str) -> None:
    changes = {**JOINT, "weighting": weighting, "locality_coefficient": 0.3, "balance_coefficient": 0.2, "steps": 8}
    changes |= {"learning_rate": 0.01, "weight_decay": 0.1, "layers": (1, 2)}
    whole, pieces = editor_of(**changes, engine=engine), editor_of(**changes, engine=engine, mini_batch=6, epochs=8)
    for editor in (whole, pieces):
        editor.edit(REQUESTS)
    assert_same(pieces, whole, 1e-3)


@pytest.mark.parametrize("changes", [{"mini_batch": 2, "epochs": 3}, {"order": "depth", "steps": 3}])
def test_both_engines_go_the_same_way(changes: dict[str, Any]) -> None:
    fast, plain = (editor_of(**JOINT, **changes, engine=engine, learning_rate=0.01) for engine in ("auto", "reference"))
    for editor in (fast, plain):
        editor.edit(REQUESTS[:5])
    assert_same(fast, plain, 1e-3)
    assert fast.edits[0].steps == {2: 9, 0: 15}[fast.config.mini_batch]  # 3 epochs of 3 batches; 3 steps on each of 5


def test_epochs_of_mini_batches_teach_all_requests_where_one_pass_forgets_the_first() -> None:
    depth, breadth = editor_of(**JOINT, order="depth", steps=20), editor_of(**JOINT, mini_batch=2, epochs=40)
    before = [loss_of(depth, request) for request in REQUESTS[:4]]
    for editor in (depth, breadth):
        editor.edit(REQUESTS[:4])
        assert len(editor.edits) == 1
    assert depth.edits[0].steps == breadth.edits[0].steps == 80
    one, other = ([loss_of(editor, request) for request in REQUESTS[:4]] for editor in (depth, breadth))
    assert all(now < 0.5 * then for now, then in zip(other, before, strict=True))
    assert one[-1] < 0.5 * before[-1], "the last is what was trained last"
    assert one[0] > 2 * other[0], "the first is forgotten"
    assert breadth.edits[0].loss == pytest.approx(sum(other) / len(other), abs=0.01)
    assert depth.edits[0].loss == pytest.approx(sum(one) / len(one), abs=0.01), "told as it is at the end"
    assert not depth.edits[0].reached


def test_it_stops_where_every_mini_batch_is_there() -> None:
    editor = editor_of(**{**JOINT, "loss_target": 2.0}, mini_batch=1, epochs=60)
    report = editor.edit(FACTS)
    assert report.edits[0].reached
    assert report.edits[0].loss < 2.0
    assert report.edits[0].steps < 180
    assert report.edits[0].steps % 3 == 0
    again = editor_of(**{**JOINT, "loss_target": 2.0}, mini_batch=1, epochs=60)
    again.edit(FACTS)
    assert adapter_bytes(again) == adapter_bytes(editor)


def test_a_depth_first_request_takes_its_augmentations_along() -> None:
    editor, seen = editor_of(**JOINT, order="depth", steps=1, augmentations=2), []
    train = JointEngine.train

    def watch(self: JointEngine, job: Any, context: Any) -> Any:
        inner = self.engine.train

        def note(own: Any, near: Any) -> Any:
            seen.append(
                (own.requests[0].id, [editor.tokenizer.decode(row.ids[: row.prompt_length]) for row in own.rows])
            )
            return inner(own, near)

        self.engine.train = note
        return train(self, job, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointEngine, "train", watch)
        editor.edit(FACTS)
    assert [name for name, _ in seen] == [fact.id for fact in FACTS]
    for (_, prompts), fact in zip(seen, FACTS, strict=True):
        assert len(prompts) == 3
        assert all(prompt.endswith(fact.prompt) for prompt in prompts)


@pytest.mark.parametrize("changes", [{"order": "depth"}, {"mini_batch": 2}])
def test_a_loss_that_is_not_finite_changes_nothing(changes: dict[str, Any]) -> None:
    editor = editor_of(**JOINT, **changes)
    editor.edit(dataclasses.replace(LEO, prompt="Leo was", id="before"))
    state = adapter_bytes(editor)
    with torch.no_grad():
        editor.model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(EditError, match="the loss is nan at step 0; nothing was changed"):
        editor.edit(REQUESTS)
    assert adapter_bytes(editor) == state
