"""General ability before and after edits: slices of one adapter, going on after a cut, and the report's table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baft_intervention.errors import DataError
from baft_intervention.evaluation import report
from baft_intervention.evaluation.ability import ability_lines, read_abilities
from baft_intervention.requests import EditRequest
from benchmarks.test_benchmarks import script
from edits import FACTS, tiny_editor
from tiny import tiny_model, tiny_tokenizer

FACTS_OF_RUN = {"model": "tiny", "weighting": "constant", "edits_sha256": "x", "data": "some"}


@pytest.fixture(scope="module")
def module() -> Any:
    return script("general_ability")


@pytest.fixture
def editor() -> Any:
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), weighting="constant", layers=(1,), steps=2)
    editor.edit(FACTS)
    return editor


def asker(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[list[str]]:
    """In place of the harness: a tenth less a edit, one likelihood of three moved by any; which edits were there is kept."""
    asked: list[list[str]] = []

    def ask(editor: Any) -> dict[str, Any]:
        asked.append([edit.id for edit in editor.edits])
        n = len(editor.edits)
        return {"accuracy": 0.9 - n / 10, "likelihoods": [-1.0, -2.0, -3.0 - n]}

    monkeypatch.setattr(module, "ask", ask)
    return asked


def test_after_n_edits_is_with_the_first_n_of_them(module, editor, monkeypatch, capsys):
    asked = asker(monkeypatch, module)
    rows = module.measure(editor, [1, 3, 7], None, FACTS_OF_RUN)
    ids = [fact.id for fact in FACTS]
    assert asked == [[], ids[:1], ids]
    assert [(r["edits"], round(r["accuracy"], 3), r["unmoved"]) for r in rows] == [
        (0, 0.9, 3),
        (1, 0.8, 2),
        (3, 0.6, 2),
    ]
    assert "there are 3 edits, not 7" in capsys.readouterr().err
    assert [edit.id for edit in editor.edits] == ids  # all are there again


def test_a_run_that_was_cut_off_goes_on(module, editor, monkeypatch, tmp_path):
    asked, file = asker(monkeypatch, module), tmp_path / "r" / "x.json"
    module.measure(editor, [1], file, FACTS_OF_RUN)
    assert len(asked) == 2
    rows = module.measure(editor, [1, 2], file, FACTS_OF_RUN)
    assert [len(ids) for ids in asked[2:]] == [0, 2]  # the likelihoods to compare with, and what is new
    assert rows == json.loads(file.read_text())["rows"]
    assert [row["edits"] for row in rows] == [0, 1, 2]
    assert module.measure(editor, [1, 2], file, FACTS_OF_RUN) == rows
    assert len(asked) == 4
    other = module.measure(
        editor, [1], file, {**FACTS_OF_RUN, "edits_sha256": "y"}
    )  # other edits: nothing is taken over
    assert [row["edits"] for row in other] == [0, 1]
    assert len(asked) == 6


def test_training_passes_over_what_is_edited_and_what_cannot_be(module, editor):
    more = [EditRequest(f"The name of number {i} is", "Japan") for i in range(2)]
    too_long = EditRequest("He was " * 200, "Japan")
    module.train(editor, [FACTS[0], more[0], too_long, more[1]], 6)
    assert [e.requests[0].prompt for e in editor.edits] == [f.prompt for f in FACTS] + [m.prompt for m in more]
    module.train(editor, [EditRequest("They are", "city")], 5)  # there are so many already
    assert len(editor.edits) == 5


def test_the_reports_table(tmp_path):
    rows = [{"edits": n, "accuracy": a, "unmoved": u} for n, a, u in ((0, 0.875, 192), (1000, 0.75, 150))]
    for place in (tmp_path / "tiny" / "general_ability" / "a.json", tmp_path / "general_ability" / "tiny.b.json"):
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"weighting": place.stem, "data": "facts", "rows": rows}))
    (tmp_path / "general_ability" / "other.c.json").write_text("of another folder")
    results = read_abilities(tmp_path / "tiny")
    assert [r["method"] for r in results] == ["a", "tiny.b"]
    lines = ability_lines(results)
    assert "| a | facts | 0 | 87.5 | – | 192 of 192 |" in lines
    assert "| a | facts | 1,000 | 75.0 | -12.5 | 150 of 192 |" in lines
    assert read_abilities(tmp_path / "tiny" / "none") == ability_lines([]) == []


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weighting": "x", "rows": []}', '{"weighting": "x", "rows": [{"edits": 1}]}']
)
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    (tmp_path / "general_ability").mkdir()
    (tmp_path / "general_ability" / "bad.json").write_text(text)
    with pytest.raises(DataError, match=r"bad\.json.*again"):
        read_abilities(tmp_path)


def test_the_report_has_the_table(tmp_path, monkeypatch):
    rows = [{"edits": n, "accuracy": 0.5, "unmoved": 4} for n in (0, 10)]
    (tmp_path / "general_ability").mkdir()
    (tmp_path / "general_ability" / "a.json").write_text(json.dumps({"method": "mine", "rows": rows}))
    monkeypatch.setattr(report, "read_summaries", lambda folder: [])
    monkeypatch.setattr(report, "draw_plane", lambda summaries, path: None)
    text = report.write_report(tmp_path)["md"].read_text()
    assert "## General ability" in text
    assert "| mine |  | 10 | 50.0 | +0.0 | 4 of 4 |" in text
