"""WikiBigEdit, QAEdit, HalluEditBench and EasyEdit's portability files: which field becomes which probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baft_intervention import EditRequest
from baft_intervention.data import load_requests
from baft_intervention.errors import DataError

WIKIBIGEDIT = {
    "prompt": "What position does Ann hold?",
    "target_new": "head coach",
    "subject": "Ann",
    "rephrase_prompt": "What is Ann's role?",
    "locality_prompt": "What position does Anne hold?",
    "locality_ground_truth": "referee",
}
QAEDIT = {
    "id": 3,
    "source": "NQ",
    "prompt": "who wrote the book?",
    "target": "Ann",
    "subject": "wrote the book",
    "rephrase": "Which author wrote the book?",
    "locality": [{"loc": "where is paris", "loc_ans": "France"}, {"loc": "who was here?", "loc_ans": "Bo"}],
}
HALLUEDIT = {
    "topic": "places_city",
    "subject": "Toronto",
    "relation": "head of government",
    "object": "Olivia Chow",
    "question": "Who is the head of government of Toronto?",
    "output_llama_2_7b_chat_hf": "John Tory",
    "paraphrased_question": "Who governs Toronto?",
    "multiple_choice_with_letters": "A. John Tory  B. Olivia Chow",
    "multiple_choice_labels": "B",
    "yes_question": "Does Olivia Chow govern Toronto?",
    "no_question": "Does John Tory govern Toronto?",
    "locality_question": "What is a landmark in Toronto?",
    "reversed_relation_question": "Which city does Olivia Chow govern?",
    "question_2hop": "To which party does the head of government of Toronto belong?",
    "answer_2hop": "NDP",
}


def probes_of(request: EditRequest) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(p.kind, p.group, p.prompt, p.answers) for p in request.probes]


def test_wikibigedit() -> None:
    data = load_requests([WIKIBIGEDIT])
    (request,) = data.requests
    assert data.task == data.format == "wikibigedit"
    assert (request.subject, request.target_true) == ("Ann", ())
    assert probes_of(request) == [
        ("rephrase", "rephrase", "What is Ann's role?", ("head coach",)),
        ("locality", "near_subject", "What position does Anne hold?", ("referee",)),
    ]


@pytest.mark.parametrize(
    ("row", "fmt"),
    [
        ({**WIKIBIGEDIT, "ground_truth": "x"}, "counterfact_flat"),
        ({k: v for k, v in WIKIBIGEDIT.items() if k != "rephrase_prompt"}, "wise"),
    ],
)
def test_wikibigedit_is_not_taken_for_its_neighbours(row: dict[str, Any], fmt: str) -> None:
    assert load_requests([row]).format == fmt


def test_qaedit() -> None:
    data = load_requests([QAEDIT])
    (request,) = data.requests
    assert data.format == "qaedit"
    assert (request.prompt, request.target_new, request.subject) == ("who wrote the book?", "Ann", "wrote the book")
    assert probes_of(request) == [
        ("rephrase", "rephrase", "Which author wrote the book?", ("Ann",)),
        ("unrelated", "nq", "where is paris?", ("France",)),
        ("unrelated", "nq", "who was here?", ("Bo",)),
    ]
    with pytest.raises(DataError, match=r"record 0: field 'locality\[1\].loc' is missing"):
        load_requests([{**QAEDIT, "locality": [{"loc": "where", "loc_ans": "x"}, {"loc_ans": "y"}]}])


def test_own_facts_with_a_misspelt_target_are_not_taken_for_qaedit() -> None:
    with pytest.raises(DataError, match="field 'target' is unknown; the field is called 'target_new'"):
        load_requests([{"prompt": "a", "target": "b", "rephrase": "c", "locality": [{"prompt": "d"}]}])


def test_hallueditbench(tmp_path: Path) -> None:
    path = tmp_path / "places_city.csv"
    path.write_text(",".join(HALLUEDIT) + "\n" + ",".join(HALLUEDIT.values()) + "\n", encoding="utf-8")
    data = load_requests(path)
    (request,) = data.requests
    assert (data.format, data.split) == ("hallueditbench", "test")
    assert (request.target_new, request.target_true, request.subject) == ("Olivia Chow", ("John Tory",), "Toronto")
    choices = "Who is the head of government of Toronto? A. John Tory  B. Olivia Chow"
    assert probes_of(request) == [
        ("rephrase", "paraphrase", "Who governs Toronto?", ("Olivia Chow",)),
        ("rephrase", "multiple_choice", choices, ("B",)),
        ("rephrase", "yes", "Does Olivia Chow govern Toronto?", ("Yes",)),
        ("rephrase", "no", "Does John Tory govern Toronto?", ("No",)),
        ("portability", "reversed", "Which city does Olivia Chow govern?", ("Toronto",)),
        ("portability", "2hop", "To which party does the head of government of Toronto belong?", ("NDP",)),
        ("locality", "same_subject", "What is a landmark in Toronto?", ()),
    ]


def test_portability_of_mend_records() -> None:
    row = {"subject": "Ann", "src": "Who is Ann's son?", "alt": "Bo", "answers": ["Cy"], "rephrase": "Ann's son?"}
    row |= {"alternative_subject": "Annie", "alter_subject_question": "Who is Annie's son?"}
    row |= {"inverse question": "Who is Bo's mother?"}
    (request,) = load_requests([row]).requests
    assert probes_of(request)[1:] == [
        ("portability", "subject_alias", "Who is Annie's son?", ("Bo",)),
        ("portability", "inverse", "Who is Bo's mother?", ("Ann",)),
    ]
    (request,) = load_requests([row], target="answers").requests  # the inverse question names ``alt``
    assert probes_of(request)[1:] == [("portability", "subject_alias", "Who is Annie's son?", ("Cy",))]


def test_portability_of_counterfact_records() -> None:
    rewrite = {"prompt": "{} died in", "subject": "Ann", "target_new": {"str": "Rome"}, "target_true": {"str": "Bonn"}}
    (request,) = load_requests([{"requested_rewrite": rewrite, "alternative_subject": "Annie"}]).requests
    assert probes_of(request) == [("portability", "subject_alias", "Annie died in", ("Rome",))]
    (request,) = load_requests(
        [{"requested_rewrite": rewrite, "alternative_subject": "Annie"}], include="paraphrase"
    ).requests
    assert request.probes == ()
