"""Selection, skipping, unrelated pools and the description of what was loaded."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from baft_intervention.data import load_requests, unrelated_probes
from baft_intervention.errors import DataError


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Fact {i} is", "target_new": f"answer {i}"} for i in range(n)]


def pool(n: int) -> list[dict[str, str]]:
    return [{"loc": f"nq question: what is thing {i}", "loc_ans": f"it {i}"} for i in range(n)]


def test_limit_takes_the_first_or_a_seeds_draw() -> None:
    data = load_requests(rows(50), limit=5)
    assert [r.prompt for r in data.requests] == [f"Fact {i} is" for i in range(5)]
    assert (data.records, len(data)) == (50, 5)
    small, large = load_requests(rows(50), limit=5, seed=1), load_requests(rows(50), limit=20, seed=1)
    assert set(small.requests) < set(large.requests)
    positions = [int(r.prompt.split()[1]) for r in large.requests]
    assert positions == sorted(positions)
    assert positions != list(range(20))
    assert load_requests(rows(50), limit=20, seed=1).requests == large.requests
    assert load_requests(rows(50), limit=20, seed=2).requests != large.requests
    assert len(load_requests(rows(3), limit=10)) == 3


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_bad_limit(limit: Any) -> None:
    with pytest.raises(DataError, match="limit is .*; it must be a whole number of at least 1"):
        load_requests(rows(3), limit=limit)


def test_skip_bad_counts_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    mixed = [*rows(2), {"prompt": "x"}, None, *rows(1)]
    with caplog.at_level(logging.WARNING, logger="baft_intervention"):
        data = load_requests(mixed, skip_bad=True)
    assert (len(data), data.bad_count) == (3, 2)
    assert "record 2: field 'target_new' is missing" in data.bad[0]
    assert "record 3" in data.bad[1]
    assert "2 of 5 records are malformed and were skipped" in caplog.text
    assert data.bad[0] in caplog.text
    with pytest.raises(
        DataError, match="none of its 2 records can be used; the first error: <list>, record 0: field 'target_new'"
    ):
        load_requests([{"prompt": "x"}, {"prompt": "y"}], skip_bad=True)


def test_the_whole_source_is_checked_whatever_the_limit() -> None:
    with pytest.raises(DataError, match="record 3"):
        load_requests([*rows(3), {"prompt": "x"}], limit=1)


@pytest.mark.parametrize("source", [3, None, b"bytes", 1.5])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(DataError, match="a source must be a path, a datasets.Dataset, a hub id or a list of records"):
        load_requests(source)


def test_unrelated_slices_of_one_pool(tmp_path: Path) -> None:
    path = tmp_path / "nq.json"
    path.write_text(json.dumps(pool(30)))
    data = load_requests(rows(7), unrelated=path, unrelated_per_record=2, unrelated_pool=6, seed=5)
    asked = [p for r in data.requests for p in r.probes_of("unrelated")]
    assert len(asked) == 14
    assert {p.group for p in asked} == {"nq"}
    assert tuple(asked[:6]) == unrelated_probes(path, 6, seed=5)
    assert asked[6:12] == asked[:6]  # the seventh request begins the pool again
    assert data.options["unrelated"] == "nq.json"
    assert len(data.options["unrelated_sha256"]) == 64
    assert (data.options["unrelated_pool"], data.options["unrelated_per_record"]) == (6, 2)
    fewer = load_requests(rows(7), limit=3, unrelated=path, unrelated_per_record=2, unrelated_pool=6, seed=None)
    assert (
        load_requests(rows(7), limit=5, unrelated=path, unrelated_per_record=2, unrelated_pool=6).requests[:3]
        == fewer.requests
    )


def test_unrelated_leaves_out_what_training_used_and_what_is_edited() -> None:
    edited = {"prompt": "What is thing 3?", "target_new": "x"}
    data = load_requests(
        [*rows(3), edited],
        unrelated=pool(6),
        unrelated_per_record=2,
        unrelated_exclude=["WHAT is  thing 0", "what is thing 1?"],
    )
    asked = {p.prompt for r in data.requests for p in r.probes}
    assert asked == {f"what is thing {i}?" for i in (2, 4, 5)}
    with pytest.raises(DataError, match="4 unrelated probes wanted for each record, but the pool has 3"):
        load_requests([edited], unrelated=pool(4), unrelated_per_record=4)


def test_description_is_plain_json_and_data_can_be_pickled() -> None:
    data = load_requests(rows(4), limit=2, seed=0, unrelated=pool(5))
    described = json.loads(json.dumps(data.describe()))
    assert described["task"] == "own"
    assert described["requests"] == 2
    assert described["records"] == 4
    assert described["options"]["limit"] == 2
    assert described["probes"] == {"unrelated/nq": 4}
    assert pickle.loads(pickle.dumps(data)) == data
    assert load_requests(rows(4)).sha256 == load_requests(rows(4)).sha256 != load_requests(rows(5)).sha256


def test_without_takes_out_what_another_set_asks() -> None:
    data = load_requests([*rows(4), {"prompt": "Other is", "target_new": "x", "rephrase": "FACT 9 is?"}])
    test = load_requests([{"prompt": "fact 2 is", "target_new": "y", "rephrase": ["Fact 0 is"]}])
    left = data.without(test)
    assert [r.prompt for r in left.requests] == ["Fact 1 is", "Fact 3 is", "Other is"]
    assert left.options["left_out"] == 2
    assert [r.prompt for r in left.without(["Fact 9 is"]).requests] == ["Fact 1 is", "Fact 3 is"]
