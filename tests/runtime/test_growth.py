"""What an edit costs does not depend on how many there are: counted in numbers that torch writes and texts that are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.runtime import adapter as adapter_module
from edits import FRANCE, LEO, TOWER, next_word, tiny_editor
from tiny import tiny_model, tiny_tokenizer


class Written(TorchDispatchMode):
    """Counts the numbers in all results of torch's operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers += sum(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]) if _is_dense(t))
        return out


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor)


def crowd(editor: BaftEditor, count: int) -> None:
    """Put copies of the first edit behind the others, until there are ``count``."""
    first = editor.edits[0]
    copies = []
    for i in range(len(editor.edits), count):
        request = dataclasses.replace(first.requests[0], id=f"copy {i}", prompt=f"{i}: {first.requests[0].prompt}")
        copies.append(dataclasses.replace(first, id=request.id, requests=(request,)))
    editor.adapter.extend(copies)


@pytest.mark.parametrize("changes", [{}, {"weighting": "cosine", "positions": "subject"}])
def test_an_edit_writes_the_same_numbers_at_three_thousand_as_at_three_hundred(changes: dict[str, Any]) -> None:
    editor = tiny_editor(tiny_model(), tiny_tokenizer(), steps=2, loss_target=0.0, **changes)
    editor.edit(FRANCE)
    next_word(editor.model, editor.tokenizer, FRANCE.prompt)  # the stacks are there, as in use
    editor.edit(TOWER)
    found = []
    for count in (300, 3000):
        crowd(editor, count)
        editor.edit(LEO)  # the room doubles, which the stack's own test counts
        editor.undo(LEO.id)
        with Written() as written:
            editor.edit(LEO)
        found.append(written.numbers)
        editor.undo(LEO.id)
    assert found[0] == found[1] > 0


def test_the_subjects_of_earlier_edits_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = adapter_module.subject_variants
    monkeypatch.setattr(adapter_module, "subject_variants", lambda t, names: read.extend(names) or original(t, names))
    changes = {"weighting": "constant", "positions": "subject", "layers": (0, 1), "steps": 1}
    editor = tiny_editor(tiny_model(), tiny_tokenizer(), **changes)
    for number, fact in enumerate([FRANCE, LEO, TOWER], 1):
        editor.edit(fact)
        next_word(editor.model, editor.tokenizer, fact.prompt)
        assert len(read) == number
    before = {prompt: next_word(editor.model, editor.tokenizer, prompt) for prompt in ("Leo and France", "Leo is")}
    again = dataclasses.replace(LEO, prompt="Who is Leo", id="again")
    editor.edit(again)
    assert read == ["France", "Leo", "The Eiffel Tower", "Leo"]
    editor.undo("again")
    ids = torch.tensor([editor.tokenizer("Leo and France")["input_ids"]])
    subjects = editor.adapter.subjects()
    assert subjects is not None
    assert subjects.mask(ids)[0].tolist() == [True, True, False, True, True], "another edit has Leo still"
    assert {prompt: next_word(editor.model, editor.tokenizer, prompt) for prompt in before} == before
    editor.undo("leo")
    assert subjects.mask(ids)[0].tolist() == [False, False, False, True, True]
