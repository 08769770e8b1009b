"""The gate's decisions by themselves: where it is asked, and how an edit follows its own answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from baft_intervention.requests import EditRequest
from baft_intervention.runtime import causal_gate
from baft_intervention.runtime.causal_gate import CausalGate, Reading
from baft_intervention.runtime.token_state import PADDING
from edits import FACTS, FRANCE, LEO, tiny_editor

CPU = torch.device("cpu")
LONDON = EditRequest("The city of Leo is", "London is large", subject="Leo", id="london")


def gate_of(model: Any, tokenizer: Any, *requests: EditRequest) -> CausalGate:
    editor = tiny_editor(model, tokenizer, steps=1)
    editor.edit(list(requests))
    return editor.adapter.gate(CPU)


def reading_of(gate: CausalGate, tokenizer: Any, text: str, before: Any = None) -> tuple[Reading, list[int]]:
    ids = tokenizer(text)["input_ids"]
    return gate.begin(torch.tensor([ids]), before), ids


def acted(gate: CausalGate, reading: Reading, opened: dict[int, tuple[str, float]]) -> list[tuple[str, int, int]]:
    """``(edit, column, stage)`` if the gates are open at these places."""
    actions = gate._actions(reading, {(0, place): found for place, found in opened.items()})
    return [(a.edit, a.column, a.stage) for a in actions]


# ------------------------------------------------------------------------------------------ where it is asked


def test_the_gate_is_asked_from_the_subject_on(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, *FACTS)
    reading, ids = reading_of(gate, tokenizer, "Is Leo in France or not")
    first = len(tokenizer("Is Leo")["input_ids"]) - 1
    both = len(tokenizer("Is Leo in France")["input_ids"]) - 1
    assert [c.place for c in reading.candidates] == list(range(first, len(ids)))
    for candidate in reading.candidates:
        assert candidate.named.keys() == ({"leo", "france"} if candidate.place >= both else {"leo"})
        assert candidate.named["leo"][1] == first
    assert reading_of(gate, tokenizer, "Who is she?")[0].candidates == []


def test_the_last_mention_counts_and_a_distant_one_does_not(tiny_llama, tokenizer, monkeypatch):
    gate = gate_of(tiny_llama, tokenizer, LEO)
    reading, _ = reading_of(gate, tokenizer, "Leo and Leo is")
    second = len(tokenizer("Leo and Leo")["input_ids"]) - 1
    assert reading.candidates[-1].named["leo"][1] == second
    monkeypatch.setattr(causal_gate, "WINDOW", 3)
    reading, _ = reading_of(gate, tokenizer, "Is Leo in the city of London")
    last = len(tokenizer("Is Leo")["input_ids"]) - 1
    assert [c.place for c in reading.candidates] == [last, last + 1, last + 2]


def test_padding_is_no_token(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, LEO)
    ids = tokenizer("Is Leo here")["input_ids"]
    alone = gate.begin(torch.tensor([ids]), None)
    padded = gate.begin(torch.tensor([[PADDING] * 3 + ids, ids + [PADDING] * 3]), None)
    left, right = ([c for c in padded.candidates if c.row == row] for row in (0, 1))
    for own, before, behind in zip(alone.candidates, left, right, strict=True):
        assert own.place == before.place == behind.place
        assert own.named == before.named == behind.named
        assert (before.column, behind.column) == (own.column + 3, own.column)


def test_an_edit_without_a_subject_is_asked_at_every_token(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, EditRequest("the city is", "Rome", id="city"))
    reading, ids = reading_of(gate, tokenizer, "Who is she?")
    assert [c.place for c in reading.candidates] == list(range(len(ids)))


def test_a_token_is_asked_the_same_whatever_follows(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, EditRequest("The capital of Fran is", "Japan", subject="Fran", id="fran"))
    ids = tokenizer("The capital of Frantic is")["input_ids"]
    whole = {c.place: c.named for c in gate.begin(torch.tensor([ids]), None).candidates}
    for end in range(1, len(ids)):
        part = {c.place: c.named for c in gate.begin(torch.tensor([ids[:end]]), None).candidates}
        assert part == {place: named for place, named in whole.items() if place < end}


def test_a_subject_may_be_the_first_token(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(causal_gate, "_ASKED", math.log(0.01))
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(EditRequest("What speaks", "Japan", subject="What", id="what"))
    with editor.adapter.recording() as calls, torch.no_grad():
        tiny_llama(**tokenizer("What speaks", return_tensors="pt"))
    assert calls[0]


# ------------------------------------------------------------------------------------------ along an answer


def test_an_edit_follows_its_own_answer_and_no_other(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, LONDON)
    begin = len(tokenizer("Leo is")["input_ids"]) - 1
    answer = tokenizer(" London is large")["input_ids"]
    own, _ = reading_of(gate, tokenizer, "Leo is London is large and Leo is")
    found = acted(gate, own, {begin: ("london", 0.2)})
    assert found == [("london", begin + n, n) for n in range(len(answer))]  # not behind its last token
    other, _ = reading_of(gate, tokenizer, "Leo is London and large")
    said = len(tokenizer(" London")["input_ids"])
    assert acted(gate, other, {begin: ("london", 0.2)}) == [("london", begin + n, n) for n in range(said + 1)]


def test_right_behind_an_answer_no_edit_begins_but_later_one_may(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, FRANCE)
    reading, ids = reading_of(gate, tokenizer, "France is Japan and more")
    begin = len(tokenizer("France is")["input_ids"]) - 1
    end = begin + len(tokenizer(" Japan")["input_ids"])
    opened = dict.fromkeys(range(begin, len(ids)), ("france", 0.1))
    found = acted(gate, reading, opened)
    assert ("france", end, 0) not in found
    assert (end + 1) in [column for _, column, stage in found if stage == 0]


def test_an_answer_goes_on_over_the_calls(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, LONDON)
    text = "Leo is London is large and"
    whole, ids = reading_of(gate, tokenizer, text)
    begin = len(tokenizer("Leo is")["input_ids"]) - 1
    expected = acted(gate, whole, {begin: ("london", 0.2)})
    for cut in range(begin + 1, len(ids)):
        first = gate.begin(torch.tensor([ids[:cut]]), None)
        first.memory = torch.zeros(1, cut, 2)
        found = acted(gate, first, {begin: ("london", 0.2)})
        second = gate.begin(torch.tensor([ids[cut:]]), first.state())
        found += [(edit, column + cut, stage) for edit, column, stage in acted(gate, second, {})]
        assert found == expected


def test_an_edit_that_was_undone_does_not_go_on(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, steps=1)
    editor.edit([LONDON, FRANCE])
    gate = editor.adapter.gate(CPU)
    begin = len(tokenizer("Leo is")["input_ids"]) - 1
    first, ids = reading_of(gate, tokenizer, "Leo is")
    first.memory = torch.zeros(1, len(ids), 2)
    assert acted(gate, first, {begin: ("london", 0.2)})
    editor.undo("london")
    second = gate.begin(torch.tensor([tokenizer(" London is")["input_ids"]]), first.state())
    assert acted(gate, second, {}) == []
    third, _ = reading_of(gate, tokenizer, "France is Leo")
    assert {edit for c in third.candidates for edit in c.named} == {"france"}
    place = third.candidates[0].place
    assert [a.index for a in gate._actions(third, {(0, place): ("france", 0.1)})] == [0]


def test_in_chat_an_edit_acts_on_its_answers_last_token_too(tiny_llama, tokenizer):
    gate = gate_of(tiny_llama, tokenizer, FRANCE)
    text = "France: is Japan and"
    begin = len(tokenizer("France: is")["input_ids"]) - 1
    plain = acted(gate, reading_of(gate, tokenizer, text)[0], {begin: ("france", 0.1)})
    gate.header = tuple(tokenizer(": is")["input_ids"])
    chat = acted(gate, reading_of(gate, tokenizer, text)[0], {begin: ("france", 0.1)})
    assert chat == [*plain, ("france", begin + len(plain), len(plain))]


def test_explaining_agrees_with_deciding(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(list(FACTS))
    from baft_intervention.analysis.inspection import let_read, read_ids

    for text in (FRANCE.prompt, f"{LEO.prompt} city and {FRANCE.prompt}", "Who is she?"):
        ids = tokenizer(text)["input_ids"]
        gate = editor.adapter.gate(CPU)
        reading = let_read(gate, editor.adapter, ids, read_ids(editor, ids))
        heard = gate.explain(reading)
        assert len(heard) == len(reading.candidates)
        thresholds = gate.weighting.state["threshold"].tolist()
        begun = {a.column: a for a in gate.decide(reading) if a.stage == 0}
        for candidate, own in zip(reading.candidates, heard, strict=True):
            assert own.keys() == candidate.named.keys()
            if (action := begun.get(candidate.column)) is not None:
                score, _, begins, is_open = own[action.edit]
                assert begins
                assert is_open
                assert score - thresholds[action.index] == pytest.approx(action.score, abs=1e-4)
