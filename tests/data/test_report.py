"""``validate``: whole files, never stopping, counting."""

from __future__ import annotations

import json
from pathlib import Path

from baft_intervention.data import validate

FACT = {"prompt": "A is", "target_new": "b", "rephrase": ["A, then, is"], "locality": [{"prompt": "C is"}]}


def test_report(tmp_path: Path) -> None:
    (tmp_path / "good_train.json").write_text(json.dumps([FACT, FACT]))
    (tmp_path / "mixed.json").write_text(json.dumps([FACT, {"prompt": "x"}, 3]))
    (tmp_path / "torn.json").write_text("[{")
    (tmp_path / "notes.md").write_text("not data")
    report = validate(tmp_path)
    good, mixed, torn = report.files
    assert (good.task, good.format, good.split, good.records, good.ok) == ("own", "own", "train", 2, True)
    assert good.probes == {"locality/": 2, "rephrase/rephrase": 2}
    assert good.notes == {"repeated edit, id numbered": 1}
    assert (mixed.records, len(mixed.bad), mixed.ok) == (1, 2, False)
    assert "mixed.json, record 1: field 'target_new' is missing" in mixed.bad[0]
    assert "torn.json, line 1" in torn.error
    assert not torn.ok
    assert (report.ok, report.records, report.bad_count) == (False, 3, 2)
    assert json.loads(json.dumps(report.to_dict()))["files"][1]["bad"] == list(mixed.bad)
    text = report.to_text(messages=1)
    assert "2 records, 0 bad" in text
    assert "BAD " + mixed.bad[0] in text
    assert "… and 1 more" in text
    assert "ERROR " + torn.error in text
    assert validate(tmp_path / "good_train.json", [tmp_path / "good_train.json"]).ok


def test_missing_files_and_empty_folders_are_errors_in_the_report(tmp_path: Path) -> None:
    report = validate(tmp_path, tmp_path / "none.json")
    assert [file.ok for file in report.files] == [False, False]
    assert "is a folder" in report.files[0].error
    assert "no such file" in report.files[1].error


def test_a_task_can_be_pinned(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"src": "A is", "alt": "b"}]))
    assert validate(path, task="zsre").ok
    assert "but the records are zsre_mend" in validate(path, task="convsent").files[0].error
