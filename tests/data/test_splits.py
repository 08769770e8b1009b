"""Test files are refused where settings are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from baft_intervention.data import refuse_test_files, split_of
from baft_intervention.data.files import SUFFIXES
from baft_intervention.errors import DataError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/knowedit/ZsRE/ZsRE-test-all.json", "test"),
        ("TEST_CF.json", "test"),
        ("train_cf.json", "train"),
        ("blender_val.json", "validation"),
        ("zsre_mend_edit.json", "test"),
        ("zsre_mend_eval.json", "validation"),
        ("counterfact.json", "test"),
        ("MQuAKE-hard.json", "test"),
        ("counterfact-edit.json", "test"),
        ("counterfact-val.json", "validation"),
        ("counterfact-train.json", "train"),
        ("wikibigedit_3k.json", "test"),
        ("QAEdit_inter_1k.json", "test"),
        ("portability/zsre_inverse_relation.json", "test"),
        ("hallueditbench/geography_forest.csv", "validation"),
        ("hallueditbench/geography_volcano.csv", "test"),
        ("my_facts_dev.csv", "validation"),
        ("train_and_test.json", "test"),
        ("train_dev.json", None),
        ("latest.json", None),
        ("test/facts.json", None),
        ("facts.json", None),
    ],
)
def test_split_of(name: str, split: str | None) -> None:
    assert split_of(name) == split
    assert split_of(Path("/some/where") / name) == split


def test_refusal() -> None:
    refuse_test_files("train_cf.json", ["facts.json", Path("blender_val.json")])
    with pytest.raises(
        DataError, match=r"a/test_cf\.json is test data and must not be used for a sweep; take .*train_cf\.json"
    ):
        refuse_test_files("train_cf.json", ["a/test_cf.json"], purpose="a sweep")


def test_every_file_at_hand_has_a_split(data_dir: Path) -> None:
    files = [path for path in sorted(data_dir.rglob("*")) if path.suffix in SUFFIXES]
    assert [path.name for path in files if split_of(path) is None] == []
    for path in files:
        if split_of(path) == "test":
            with pytest.raises(DataError, match=path.name):
                refuse_test_files(path)


def test_halluedit_topics_are_cut_in_alphabetical_order(data_dir: Path) -> None:
    topics = sorted((data_dir / "hallueditbench").glob("*.csv"))
    if not topics:
        pytest.skip(f"hallueditbench is not in {data_dir}")
    assert [split_of(path) for path in topics] == ["validation"] * 6 + ["test"] * 7
