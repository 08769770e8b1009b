"""``datasets``: loaded objects, and hub ids through the real ``load_dataset`` on a local folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.data.hub import is_hub_id
from baft_intervention.errors import DataError

datasets = pytest.importorskip("datasets", reason="datasets is not installed; pip install 'baft_intervention[data]'")

ROWS = [
    {
        "prompt": f"Fact {i} is",
        "target_new": f"answer {i}",
        "locality": {"G": [{"prompt": f"Near {i} is", "ground_truth": "x"}]},
    }
    for i in range(4)
]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a data repository has it: two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, rows in (("train.json", ROWS[:3]), ("test.json", ROWS[3:])):
        (folder / name).write_text(json.dumps(rows))
    return folder


def test_dataset_object_equals_the_list() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    data = load_requests(dataset)
    assert data.requests == load_requests(ROWS).requests
    assert data.format == "knowedit"
    assert data.requests[2].origin == "<datasets.Dataset>, record 2"
    assert len(data.sha256) == 64
    assert (data.path, data.split) == ("", None)


def test_fields_that_arrow_fills_with_null() -> None:
    rich: dict[str, Any] = {**ROWS[0], "portability": {"R": [{"prompt": "So is", "ground_truth": "y"}]}}
    rows = [rich, *ROWS[1:]]  # a data set has the columns of its first row
    assert datasets.Dataset.from_list(rows)[1]["portability"] is None
    data = load_requests(datasets.Dataset.from_list(rows))
    assert data.requests == load_requests(rows).requests
    malformed = datasets.Dataset.from_list([*ROWS, {"prompt": "no target"}])
    with pytest.raises(DataError, match="record 4: field 'target_new' is null"):
        load_requests(malformed)


def test_dataset_dict() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    assert len(load_requests(datasets.DatasetDict({"only": dataset}))) == 4
    with pytest.raises(DataError, match="has the splits train, test; name one"):
        load_requests(datasets.DatasetDict({"train": dataset, "test": dataset}))


def test_iterable_dataset() -> None:
    assert len(load_requests(datasets.Dataset.from_list(ROWS).to_iterable_dataset())) == 4


def test_hub_id_goes_through_load_dataset(repository: Path) -> None:
    data = load_requests(f"hub:{repository}", hub={"split": "train"})
    assert data.requests == load_requests(ROWS[:3]).requests
    assert data.split == "train"
    assert data.options["hub"] == {"split": "train"}
    assert load_requests(f"hub:{repository}", hub={"split": "test"}).split == "test"
    named = load_requests("hub:json", hub={"data_files": str(repository / "test.json"), "split": "train"})
    assert (len(named), named.split) == (1, "test")  # the file's name counts, not the split that the loader made up
    with pytest.raises(DataError, match="has the splits train, test; name one"):
        load_requests(f"hub:{repository}")


def test_hub_failures_are_data_errors(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"nowhere/at-all: there is no such file, and datasets\.load_dataset\('nowhere/at-all'\) failed"
    ):
        load_requests("nowhere/at-all")
    with pytest.raises(DataError, match="'trust_remote_code' is refused"):
        load_requests(f"hub:{repository}", hub={"trust_remote_code": True})
    with pytest.raises(DataError, match="hub options .* were given, but the source is not a hub id"):
        load_requests(ROWS, hub={"split": "test"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs 'datasets' \(pip install 'baft_intervention\[data\]'\)"):
        load_requests("owner/name")
    assert len(load_requests(ROWS)) == 4  # nothing else needs it


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("owner/name", True),
        ("hub:x", True),
        ("owner/name.json", False),
        ("a/b/c", False),
        ("name", False),
        ("../name", False),
    ],
)
def test_what_a_hub_id_looks_like(source: str, is_one: bool) -> None:
    assert is_hub_id(source) is is_one


def test_a_file_that_is_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    assert load_requests("owner/name").path == "owner/name"
