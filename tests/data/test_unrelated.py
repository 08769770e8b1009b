"""Unrelated questions: chosen by seed and content, disjoint from training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baft_intervention import EditRequest
from baft_intervention.data import attach_unrelated, read_pool, split_pool, unrelated_probes
from baft_intervention.errors import DataError

TEXTS = [f"what is thing {i}?" for i in range(40)]


def test_pool_from_every_kind_of_source(tmp_path: Path) -> None:
    lines = tmp_path / "pool.txt"
    lines.write_text("Who is it?\n\n Where?  \nwho is IT\n")
    assert [(p.prompt, p.answers) for p in read_pool(lines)] == [("Who is it?", ()), ("Where?", ())]
    array = tmp_path / "pool.json"
    array.write_text(
        json.dumps(
            ["Who is it?", {"question": "Where?", "answer": ["here", "there"]}, {"prompt": "When?", "ground_truth": 9}]
        )
    )
    assert [(p.prompt, p.answers) for p in read_pool(array)] == [
        ("Who is it?", ()),
        ("Where?", ("here", "there")),
        ("When?", ("9",)),
    ]
    mend = tmp_path / "pool.jsonl"
    mend.write_text(json.dumps({"prompt": "edited", "loc": "nq question: who is it", "loc_ans": "me"}) + "\n")
    (probe,) = read_pool(mend, group="natural")
    assert (probe.prompt, probe.answers, probe.kind, probe.group) == ("who is it?", ("me",), "unrelated", "natural")
    table = tmp_path / "pool.csv"
    table.write_text("question,answer\nWho?,me\nWhy?,\n")
    assert [(p.prompt, p.answers) for p in read_pool(table)] == [("Who?", ("me",)), ("Why?", ())]
    assert read_pool(read_pool(lines)) == read_pool(lines)


def test_bad_pools(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"<texts>, record 1: no question found; give 'question' and 'answer'.*got \{'foo': 1\}"
    ):
        read_pool(["Who?", {"foo": 1}])
    with pytest.raises(
        DataError, match="<texts>, record 0: a record must be an object with named fields, got a number"
    ):
        read_pool([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"<texts>, record 0: field 'text' has no words: '\?!'"):
        read_pool(["?!"])
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt is empty; give one question a line"):
        read_pool(empty)
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_pool(tmp_path / "none.txt")
    single = tmp_path / "one.json"
    single.write_text("{}")
    with pytest.raises(DataError, match="the top level is one object; a pool is a list of questions"):
        read_pool(single)


def test_too_few_are_left() -> None:
    with pytest.raises(
        DataError, match=r"<texts>: 40 unrelated questions wanted, but 39 left of 40 distinct ones \(1 excluded\)"
    ):
        unrelated_probes(TEXTS, 40, exclude=["nq question: What is thing 7"])
    assert len(unrelated_probes(TEXTS, exclude=TEXTS[:3])) == 37


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 99), st.randoms())
def test_larger_pools_contain_smaller_ones_in_any_order(a: int, b: int, seed: int, random: object) -> None:
    small, large = sorted((a, b))
    chosen = unrelated_probes(TEXTS, large, seed=seed)
    assert chosen[:small] == unrelated_probes(TEXTS, small, seed=seed)
    shuffled = list(TEXTS)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert unrelated_probes(shuffled, large, seed=seed) == chosen


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 9))
def test_split_is_disjoint_and_does_not_move_the_questions(train: int, ask: int, seed: int) -> None:
    texts, probes = split_pool(TEXTS, train, ask, seed=seed)
    assert (len(texts), len(probes)) == (train, ask)
    assert not set(texts) & {p.prompt for p in probes}
    assert probes == unrelated_probes(TEXTS, ask, seed=seed)


def test_attach() -> None:
    requests = [EditRequest(prompt=f"x {i}", target_new="y") for i in range(3)]
    pool = unrelated_probes(TEXTS, 4)
    attached = attach_unrelated(requests, pool, 3)
    assert [r.probes for r in attached] == [pool[:3], (pool[3], pool[0], pool[1]), (pool[2], pool[3], pool[0])]
    assert [r.id for r in attached] == [r.id for r in requests]
    assert attach_unrelated(requests, pool, 0) == tuple(requests)
    assert attach_unrelated(requests, (), 0) == tuple(requests)
    with pytest.raises(DataError, match="5 unrelated probes wanted for each record, but the pool has 4"):
        attach_unrelated(requests, pool, 5)
