"""KnowEdit's formats on records written for these tests."""

from __future__ import annotations

from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.errors import DataError


def record(**changes: Any) -> dict[str, Any]:
    data = {
        "subject": "Lake Blue",
        "prompt": "The country of Lake Blue is ",
        "target_new": "Norland",
        "ground_truth": "Sudland",
        "portability": {
            "Reasoning": [
                {"prompt": "The capital of Lake Blue's country is", "ground_truth": [["Nor", "City of Nor"], ["Nor"]]}
            ],
            "Subject_Aliasing": [{"prompt": "The country of Blue Lake is", "ground_truth": "Norland"}],
            "Logical_Generalization": [],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The depth of Lake Blue is", "ground_truth": [[], [1984, "1984 cm"]]},
                {"prompt": "The colour of Lake Blue is", "ground_truth": []},
            ],
            "Forgetfulness": None,
        },
    }
    return {**data, **changes}


def test_groups_answers_and_white_space() -> None:
    data = load_requests([record()])
    (request,) = data.requests
    assert (data.task, data.format) == ("wikidata_counterfact", "knowedit")
    assert request.prompt == "The country of Lake Blue is"
    assert request.target_true == ("Sudland",)
    assert request.probes_of("rephrase") == ()
    portability = request.probes_of("portability")
    assert [(p.group, p.answers) for p in portability] == [
        ("Reasoning", ("Nor", "City of Nor")),
        ("Subject_Aliasing", ("Norland",)),
    ]
    assert [(p.group, p.answers) for p in request.probes_of("locality")] == [
        ("Relation_Specificity", ("1984", "1984 cm")),
        ("Relation_Specificity", ()),  # a locality question needs no answer, it is compared with the unedited model
    ]


def test_task_is_recognised_by_fields() -> None:
    recent = record()
    del recent["ground_truth"]
    assert load_requests([recent]).task == "wikidata_recent"
    zsre = load_requests(
        [record(rephrase_prompt="In which country is Lake Blue?", ground_truth=["Sudland", "Norland"])]
    )
    assert zsre.task == "zsre"
    (request,) = zsre.requests
    assert [(p.prompt, p.answers) for p in request.probes_of("rephrase")] == [
        ("In which country is Lake Blue?", ("Norland",))
    ]
    assert request.target_true == ("Sudland",)  # the new answer is not an old one


@pytest.mark.parametrize("ground_truth", ["Sudland", ["Sudland"], [["Sudland"]], [[], ["Sudland"]]])
def test_ground_truth_in_every_shape(ground_truth: Any) -> None:
    assert load_requests([record(ground_truth=ground_truth)]).requests[0].target_true == ("Sudland",)


@pytest.mark.parametrize("ground_truth", [None, "", [], [[]], [""]])
def test_ground_truth_not_given(ground_truth: Any) -> None:
    assert load_requests([record(ground_truth=ground_truth)]).requests[0].target_true == ()


def test_portability_without_answers_is_dropped_and_counted() -> None:
    groups = {"Reasoning": [{"prompt": "x is", "ground_truth": [[]]}, {"prompt": "y is", "ground_truth": "z"}]}
    data = load_requests([record(portability=groups)])
    assert [p.prompt for p in data.requests[0].probes_of("portability")] == ["y is"]
    assert data.notes == {"probe without an answer dropped": 1}


def test_columns_and_several_wordings() -> None:
    groups = {"Reasoning": {"prompt": ["x is", "y is"], "ground_truth": ["a", ["b", "c"]]}}
    asked = load_requests([record(portability=groups)]).requests[0].probes_of("portability")
    assert [(p.prompt, p.answers) for p in asked] == [("x is", ("a",)), ("y is", ("b", "c"))]
    groups = {"Reasoning": [{"prompt": ["x is", "x, then, is"], "ground_truth": "a"}]}
    asked = load_requests([record(portability=groups)]).requests[0].probes_of("portability")
    assert [(p.prompt, p.answers) for p in asked] == [("x is", ("a",)), ("x, then, is", ("a",))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "field 'prompt' is null"),
        ({"prompt": ""}, "field 'prompt' is empty"),
        ({"prompt": 7.5e400}, "field 'prompt' is inf"),
        ({"prompt": ["x"]}, "field 'prompt' must be a text, got a list"),
        ({"target_new": " "}, "field 'target_new' is empty"),
        ({"target_new": True}, "field 'target_new' must be a text, got a boolean: True"),
        ({"subject": {}}, "field 'subject' must be a text, got an object"),
        ({"target_new": "\ud800"}, "field 'target_new' holds half of a surrogate pair at character 0"),
        ({"ground_truth": [[["a"]]]}, r"field 'ground_truth\[0\]\[0\]' is nested too deeply"),
        ({"ground_truth": [{"a": 1}]}, r"field 'ground_truth\[0\]' must be a text, got an object"),
        ({"locality": ["x"]}, "field 'locality' must be an object, got a list"),
        ({"locality": {"G": "x"}}, "field 'locality.G' must be a list of objects, got a text"),
        ({"locality": {"G": ["x"]}}, r"field 'locality.G\[0\]' must be an object, got a text"),
        ({"locality": {"G": [{"ground_truth": "x"}]}}, r"field 'locality.G\[0\].prompt' is missing or empty"),
        (
            {"locality": {"G": [{"prompt": 1, "ground_truth": False}]}},
            r"field 'locality.G\[0\].ground_truth' must be a text",
        ),
        (
            {"locality": {"G": {"prompt": ["a"], "ground_truth": []}}},
            r"field 'locality.G.ground_truth' must be a list as long",
        ),
    ],
)
def test_malformed(changes: dict[str, Any], message: str) -> None:
    rows = [record(), record(**changes)]
    with pytest.raises(DataError, match=f"^<list>, record 1: {message}"):
        load_requests(rows, "wikidata_counterfact")
    data = load_requests(rows, "wikidata_counterfact", skip_bad=True)
    assert (len(data), data.records, data.bad_count) == (1, 1, 1)


def test_missing_field_names_what_there_is() -> None:
    bad = record()
    del bad["target_new"]
    with pytest.raises(
        DataError, match="record 0: field 'target_new' is missing; the record has 'subject', 'prompt', 'gr"
    ):
        load_requests([bad], "wikidata_counterfact")


def test_wikibio() -> None:
    row = {
        "text": "This is a passage about ada example. Ada Example was a singer. ",
        "labels": "She sang.",
        "concept": "ada example",
        "locality": {"Relation_Specificity": [{"prompt": "ada example occupation", "ground_truth": ["singer"]}]},
    }
    data = load_requests([row])
    (request,) = data.requests
    assert data.task == "wikibio"
    assert request.prompt.endswith("a singer.")
    assert (request.subject, request.target_new) == ("ada example", "She sang.")
    assert [p.answers for p in request.probes_of("locality")] == [("singer",)]
    with pytest.raises(DataError, match="record 0: field 'labels' is empty"):
        load_requests([{**row, "labels": ""}])


def sanitation(edits: int, others: int) -> dict[str, Any]:
    return {
        "success": [
            {"question": f"Bird {i}?", "ground_truth": "Birds", "target_new": "I don't know."} for i in range(edits)
        ],
        "locality": [{"question": f"Other {i}?", "ground_truth": str(i)} for i in range(others)],
    }


def test_sanitation_shares_its_other_questions() -> None:
    data = load_requests(sanitation(3, 8))
    assert (data.task, data.records) == ("sanitation", 3)
    assert [r.target_true for r in data.requests] == [("Birds",)] * 3
    asked = [[p.prompt for p in r.probes] for r in data.requests]
    assert asked[0] == ["Other 0?", "Other 3?", "Other 6?"]
    assert sorted(prompt for share in asked for prompt in share) == sorted(f"Other {i}?" for i in range(8))
    assert {(p.kind, p.group) for r in data.requests for p in r.probes} == {("unrelated", "trivia_qa")}
    training = sanitation(3, 8)
    renamed = {"K_F": training["success"], "K_R": training["locality"]}
    assert load_requests(renamed).requests == data.requests


def test_sanitation_malformed() -> None:
    document = sanitation(2, 2)
    document["locality"][1] = "no object"
    with pytest.raises(DataError, match=r"<object>, record 1: field 'locality\[1\]' must be an object with a question"):
        load_requests(document)
    document = sanitation(2, 2)
    document["success"][0]["target_new"] = ""
    with pytest.raises(DataError, match="<object>, record 0: field 'target_new' is empty"):
        load_requests(document)
    with pytest.raises(DataError, match="<object>, record 0: field 'locality' must be a list of questions"):
        load_requests({**sanitation(1, 1), "locality": "x"})
    with pytest.raises(DataError, match="<object> holds no records"):
        load_requests(sanitation(0, 2))
