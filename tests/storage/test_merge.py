"""Two adapters as one: what both have, where they differ, and what cannot be put together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, ConfigError
from baft_intervention.requests import EditRequest
from edits import BANK, FRANCE, LEO, TOWER, adapter_bytes, config, next_word, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer

CITY = dataclasses.replace(FRANCE, target_new="city", id="city")


def editor_of(*requests: EditRequest, **changes) -> BaftEditor:
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), **changes)
    for request in requests:
        editor.edit(request)
    return editor


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """An adapter with another answer to France's prompt, and an edit of its own."""
    return editor_of(CITY, LEO).save_pretrained(tmp_path_factory.mktemp("theirs") / "a")


def test_edits_come_in_and_act(theirs):
    editor, whole = editor_of(TOWER), editor_of(TOWER, CITY, LEO)
    report = editor.merge(theirs)
    assert (report.added, report.replaced, report.same, report.conflicts) == (("city", "leo"), (), (), ())
    assert adapter_bytes(editor) == adapter_bytes(whole)
    for fact in (TOWER, CITY, LEO):
        assert next_word(editor.model, editor.tokenizer, fact.prompt) == fact.target_new


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_prompt_with_two_answers_is_reported_and_one_of_them_stays(theirs, whose):
    editor = editor_of(FRANCE, LEO)
    report = editor.merge(theirs, on_conflict=whose)
    [conflict] = report.conflicts
    assert (conflict.prompt, conflict.ours, conflict.theirs) == (FRANCE.prompt, "Japan", "city")
    assert (conflict.ours_id, conflict.theirs_id) == ("france", "city")
    assert report.same == ("leo",)
    expected = editor_of(FRANCE, LEO) if whose == "ours" else editor_of(LEO, CITY)
    assert adapter_bytes(editor) == adapter_bytes(expected)
    assert report.to_dict()["conflicts"][0]["prompt"] == FRANCE.prompt


def test_a_conflict_is_an_error_that_changes_nothing_unless_one_says_whose_answer_stays(theirs):
    editor = editor_of(FRANCE, TOWER)
    with unchanged(editor), pytest.raises(AdapterError, match="1 prompt has two answers, e.g. .*nothing was merged"):
        editor.merge(theirs)
    with unchanged(editor), pytest.raises(ConfigError, match="on_conflict is 'mine'; it must be one of error, ours"):
        editor.merge(theirs, on_conflict="mine")


def test_an_id_that_another_prompts_edit_has_is_changed(theirs):
    editor = editor_of(
        dataclasses.replace(TOWER, id="leo"), dataclasses.replace(TOWER, prompt="He is in", id="leo-2", subject=None)
    )
    report = editor.merge(theirs)
    assert report.renamed == {"leo": "leo-3"}
    assert [edit.id for edit in editor.edits] == ["leo", "leo-2", "city", "leo-3"]
    assert editor.edits[-1].requests[0].id == "leo-3"
    editor.undo("leo-3")


def test_what_is_merged_is_on_the_disk_in_one_step(theirs, tmp_path, monkeypatch):
    editor = editor_of(FRANCE)
    editor.keep_in(tmp_path / "a")
    editor.merge(theirs, on_conflict="theirs")
    editor.close()
    again = editor_of()
    again.keep_in(tmp_path / "a")
    assert adapter_bytes(again) == adapter_bytes(editor)

    def fail(*_args):
        raise OSError(28, "No space left on device")

    other = editor_of(dataclasses.replace(CITY, target_new="capital")).save_pretrained(tmp_path / "other")
    monkeypatch.setattr("os.fsync", fail)
    with unchanged(again), pytest.raises(AdapterError, match="No space left"):
        again.merge(other, on_conflict="theirs")
    monkeypatch.undo()
    again.close()


def test_into_an_adapter_without_edits_and_from_one(theirs, tmp_path):
    editor = editor_of()
    editor.merge(theirs)
    assert adapter_bytes(editor) == adapter_bytes(editor_of(CITY, LEO))
    empty = editor_of().save_pretrained(tmp_path / "empty")
    with unchanged(editor):
        assert editor.merge(empty).added == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: editor_of(FRANCE, rank=3), "the adapter has rank = 4, but this editor has 3"),
        (lambda: editor_of(FRANCE, layers=(1,)), r"layers = None, but this editor has \(1,\)"),
        (
            lambda: BaftEditor(
                tiny_model("llama", seed=1), tiny_tokenizer(), config(), model_name="tiny", bank_texts=BANK
            ),
            "weights differ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(theirs, make, message):
    editor = make()
    editor.edit(TOWER)
    with unchanged(editor), pytest.raises(AdapterError, match=message):
        editor.merge(theirs)


def test_gates_of_another_bank_are_refused(tmp_path):
    other = editor_of(LEO, weighting="cosine").save_pretrained(tmp_path / "other")
    editor = BaftEditor(
        tiny_model("llama"), tiny_tokenizer(), config(weighting="cosine"), model_name="tiny", bank_texts=BANK[:9]
    )
    editor.edit(TOWER)
    with (
        unchanged(editor),
        pytest.raises(AdapterError, match="fitted to another bank.*the same version and bank_texts"),
    ):
        editor.merge(other)


def test_edits_that_add_up_are_not_merged(tmp_path):
    place = editor_of(FRANCE, weighting="constant").save_pretrained(tmp_path / "a")
    editor = editor_of(LEO, weighting="constant")
    with (
        unchanged(editor),
        pytest.raises(AdapterError, match="'constant' add up and were trained on top of each other"),
    ):
        editor.merge(place)
