"""MQuAKE: several edits a case, multi-hop questions with every alias."""

from __future__ import annotations

from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.errors import DataError


def case(**changes: Any) -> dict[str, Any]:
    def edit(prompt: str, subject: str, new: str, question: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "subject": subject,
            "relation_id": "P1",
            "question": question,
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": "old " + new, "id": "Q2"},
        }

    data = {
        "case_id": 17,
        "requested_rewrite": [
            edit("{} was sung by", "Song", "Ann", "Who sang Song?"),
            edit("{} lives in", "Ann", "Oslo", "Where does Ann live?"),
        ],
        "questions": ["Wording 1?", "Wording 2?", "Wording 3?"],
        "answer": "Rome",
        "answer_alias": [],
        "new_answer": "Norway",
        "new_answer_alias": ["Kingdom of Norway", "Norway", "NO"],
        "new_single_hops": [
            {"question": "Who sang Song?", "cloze": "Song was sung by", "answer": "Ann", "answer_alias": ["Anne"]},
            {"question": "Where does Ann live?", "cloze": "The home of Ann is", "answer": "Oslo", "answer_alias": []},
            {
                "question": "In which country is Oslo?",
                "cloze": "Oslo is in",
                "answer": "Norway",
                "answer_alias": ["NO"],
            },
        ],
    }
    return {**data, **changes}


def test_a_case_is_several_requests() -> None:
    data = load_requests([case(), case(case_id=18)], limit=1)
    assert (data.task, data.records) == ("mquake", 2)
    first, second = data.requests
    assert [r.case_id for r in data.requests] == ["17", "17"]
    assert [r.id for r in data.requests] == ["17.0", "17.1"]
    assert data.cases == ((first, second),)
    assert (first.prompt, first.target_new, first.target_true) == ("Song was sung by", "Ann", ("old Ann",))
    assert [(p.kind, p.group, p.prompt, p.answers) for p in first.probes] == [
        ("rephrase", "single_hop", "Who sang Song?", ("Ann", "Anne")),  # the cloze is the prompt itself
    ]
    assert [(p.kind, p.group, p.prompt, p.answers) for p in second.probes] == [
        ("rephrase", "single_hop", "Where does Ann live?", ("Oslo",)),
        ("rephrase", "single_hop", "The home of Ann is", ("Oslo",)),
        ("portability", "single_hop", "In which country is Oslo?", ("Norway", "NO")),
        *(("portability", "multi_hop", f"Wording {i}?", ("Norway", "Kingdom of Norway", "NO")) for i in (1, 2, 3)),
    ]


def test_without_case_id_the_position_serves() -> None:
    data = load_requests([case(case_id=None), case(case_id=None)])
    assert [r.case_id for r in data.requests] == ["case-0", "case-0", "case-1", "case-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requested_rewrite": []}, "field 'requested_rewrite' is empty or missing"),
        ({"requested_rewrite": ["x"]}, r"field 'requested_rewrite\[0\]' must be an object, got a text"),
        ({"requested_rewrite": [{"subject": "a"}]}, r"field 'requested_rewrite\[0\].target_new' is missing"),
        ({"new_answer": None}, "field 'new_answer' is null"),
        ({"questions": [3, {}]}, r"field 'questions\[1\]' must be a text, got an object"),
        ({"new_single_hops": [{"answer": "x"}]}, r"field 'new_single_hops\[0\].question' is missing"),
        ({"case_id": [1]}, "field 'case_id' must be a text, got a list"),
    ],
)
def test_malformed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^<list>, record 1: {message}"):
        load_requests([case(), case(**changes)])
