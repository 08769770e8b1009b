"""Bytes to rows: every way a file can be wrong, and what the message says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from baft_intervention.data import load_requests
from baft_intervention.data.files import read_file
from baft_intervention.errors import DataError

FACT = {"prompt": "The moon is made of", "target_new": "cheese"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_list_with_a_byte_order_mark(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + json.dumps([FACT]).encode()
    path = write(tmp_path, "facts.json", raw)
    data = load_requests(path)
    assert data.requests[0].target_new == "cheese"
    assert data.sha256 == hashlib.sha256(raw).hexdigest()
    assert data.path == str(path)
    assert data.requests[0].origin == "facts.json, record 0"


def test_json_lines_are_known_by_content_not_by_name(tmp_path: Path) -> None:
    text = json.dumps(FACT) + "\r\n\r\n" + json.dumps({**FACT, "target_new": "a\u2028b"}, ensure_ascii=False) + "\n"
    for name in ("facts.json", "facts.jsonl", "facts.ndjson"):
        data = load_requests(write(tmp_path, name, text))
        assert [r.origin for r in data.requests] == [f"{name}, line 1", f"{name}, line 3"]
        assert data.requests[1].target_new == "a\u2028b"


def test_one_object_is_one_record(tmp_path: Path) -> None:
    assert len(load_requests(write(tmp_path, "fact.json", json.dumps(FACT)))) == 1
    assert len(load_requests(FACT)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"a\.json is empty"),
        ("a.json", "\ufeff \n", r"a\.json is empty"),
        ("a.json", "[]", r"a\.json holds no records"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.csv", "prompt,target_new\n", r"a\.csv holds no records"),
        ("a.json", "prompt: x", r"a\.json, line 1, column 1: not valid JSON"),
        ("a.json", '[\n {"prompt": "x"},\n {"prompt": "y', r"a\.json, line 3, column 13: .*truncated"),
        ("a.json", '[{"prompt": "x"}', r"a\.json, line 1, column 17: .*truncated"),
        ("a.json", '[{"prompt": "x"},, 1]', r"a\.json, line 1, column 18: .*correct it there"),
        ("a.json", '"a text"', r"a\.json: the top level is a text; expected a list of records"),
        ("a.json", "12", r"the top level is a number"),
        ("a.json", "null", r"the top level is null"),
        ("a.json", "[" * 100_000, r"a\.json, line 1, column 1: not valid JSON \(nested too deeply\)"),
        ("a.json", "[" + "1" * 5000 + "]", r"a\.json, line 1, column 1: not valid JSON \(Exceeds the limit"),
        ("a.json", b'[{"prompt": "\xff"}]', r"a\.json, line 1: byte 13 is not UTF-8"),
        ("a.json", "[{}]".encode("utf-16"), r"a\.json is UTF-16; save it as UTF-8"),
        ("a.csv", "prompt,,target_new\na,b,c\n", r"a\.csv, line 1: column 2 has no name"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv, line 1: column 'prompt' occurs twice"),
        ("a.csv", 'prompt,target_new\nx,y\n"open,1\n', r"a\.csv, line 3: not valid CSV"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        load_requests(path)
    with pytest.raises(DataError):  # skipping records does not help a file that cannot be read
        load_requests(path, skip_bad=True)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json: no such file; check the path"):
        load_requests(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="is a folder; give one file"):
        load_requests(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_requests("a\0b.json")


def test_a_broken_json_line_is_one_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps(FACT) + '\n{"prompt": "cut\n' + json.dumps(FACT) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: column 12: not valid JSON"):
        load_requests(path)
    data = load_requests(path, skip_bad=True)
    assert len(data) == 2
    assert data.bad_count == 1
    assert "a.jsonl, line 2" in data.bad[0]


def test_csv_quotes_lines_and_delimiters(tmp_path: Path) -> None:
    text = 'prompt,target_new,subject\n"A, b\nand c is", d ,\n\n,,\nThe moon is,cheese,moon\n'
    table = read_file(write(tmp_path, "a.csv", text))
    assert [row.place for row in table.rows] == ["line 2", "line 6"]
    assert table.rows[0].value == {"prompt": "A, b\nand c is", "target_new": "d", "subject": None}
    semicolons = write(tmp_path, "b.csv", "prompt;target_new\nThe moon, they say, is;cheese\n")
    assert load_requests(semicolons).requests[0].prompt == "The moon, they say, is"
    tabs = write(tmp_path, "c.tsv", "prompt\ttarget_new\nThe moon, is\tcheese\n")
    assert load_requests(tabs).requests[0].prompt == "The moon, is"


def test_csv_row_with_too_many_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,target_new\nThe moon, they say, is,cheese\nThe sun is,hot\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: 4 cells, but 2 columns; quote each text"):
        load_requests(path)
    assert load_requests(path, skip_bad=True).requests[0].prompt == "The sun is"


@pytest.mark.parametrize(("value", "kind"), [("x", "a text"), (1, "a number"), (None, "null"), ([1], "a list")])
def test_records_that_are_no_objects(value: object, kind: str) -> None:
    with pytest.raises(DataError, match=rf"<list>, record 1: a record must be an object with named fields, got {kind}"):
        load_requests([FACT, value])
