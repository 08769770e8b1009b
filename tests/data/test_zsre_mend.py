"""ZsRE in MEND's form: two targets, and the unrelated question."""

from __future__ import annotations

from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.data.zsre_mend import plain_question
from baft_intervention.errors import DataError


def record(**changes: Any) -> dict[str, Any]:
    data = {
        "subject": "Mr Example",
        "src": "Where was Mr Example born?",
        "rephrase": "What is the birthplace of Mr Example?",
        "alt": " Oslo",
        "answers": ["Rome", "Roma"],
        "pred": "Paris",
        "loc": "nq question: who wrote the odd book",
        "loc_ans": "Ms Odd",
        "cond": "…",
        "portability": {
            "Recalled Relation": "…",
            "New Question": "In which country was he born?",
            "New Answer": "Norway",
        },
    }
    return {**data, **changes}


def test_alt_is_the_default_and_recorded() -> None:
    data = load_requests([record()])
    (request,) = data.requests
    assert (data.task, data.format) == ("zsre", "zsre_mend")
    assert data.options["target"] == "alt"
    assert data.describe()["options"]["target"] == "alt"
    assert (request.target_new, request.target_true) == ("Oslo", ("Rome", "Roma"))
    assert [(p.kind, p.group, p.prompt, p.answers) for p in request.probes] == [
        ("rephrase", "rephrase", "What is the birthplace of Mr Example?", ("Oslo",)),
        ("portability", "one_hop", "In which country was he born?", ("Norway",)),
        ("unrelated", "nq", "who wrote the odd book?", ("Ms Odd",)),
    ]


def test_answers_as_target() -> None:
    data = load_requests([record()], "zsre", target="answers")
    (request,) = data.requests
    assert data.options["target"] == "answers"
    assert (request.target_new, request.target_true) == ("Rome", ())
    assert request.probes_of("rephrase")[0].answers == ("Rome", "Roma")
    with pytest.raises(
        DataError, match="record 0: field 'answers' holds no answer; give one, or load with target='alt'"
    ):
        load_requests([record(answers=[])], target="answers")
    with pytest.raises(
        DataError, match="option 'target' of format 'zsre_mend' is 'pred'; it must be one of 'alt', 'answers'"
    ):
        load_requests([record()], target="pred")


def test_alt_that_is_true_already() -> None:
    assert load_requests([record(alt="Roma")]).requests[0].target_true == ("Rome",)


def test_loc_verbatim() -> None:
    (request,) = load_requests([record()], loc="verbatim").requests
    assert request.probes_of("unrelated")[0].prompt == "nq question: who wrote the odd book"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("nq question: who is it", "who is it?"),
        ("  NQ question:who is it? ", "who is it?"),
        ("Who is it", "Who is it"),
        ("nq question: ", ""),
    ],
)
def test_plain_question(text: str, plain: str) -> None:
    assert plain_question(text) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alt": ""}, "field 'alt' is empty"),
        ({"src": None}, "field 'src' is null"),
        ({"answers": [[["x"]]]}, r"field 'answers\[0\]\[0\]' is nested too deeply"),
        ({"loc": "nq question:"}, "field 'loc' holds no question after 'nq question:'"),
        ({"loc": 3, "loc_ans": {}}, "field 'loc_ans' must be a text, got an object"),
        ({"rephrase": [1, None]}, r"field 'rephrase\[1\]' must be a text, got null"),
    ],
)
def test_malformed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^<list>, record 0: ({message})"):
        load_requests([record(**changes)])
