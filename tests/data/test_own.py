"""One's own facts: JSON, CSV, EditRequest.to_dict, and misspelt fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baft_intervention import EditRequest, Probe
from baft_intervention.data import load_requests
from baft_intervention.errors import DataError

FACT = {"prompt": "The capital of Japan is", "target_new": "Osaka"}


def test_minimal_and_full() -> None:
    (request,) = load_requests([FACT]).requests
    assert (request.subject, request.target_true, request.probes) == (None, (), ())
    full = {
        **FACT,
        "subject": "Japan",
        "target_true": "Tokyo",
        "rephrase": ["Japan's capital is", "Its capital is"],
        "portability": [{"prompt": "Its mayor governs", "answers": ["Osaka", "Ōsaka"]}],
        "locality": {"prompt": "The capital of France is", "answer": "Paris"},
        "unrelated": [{"prompt": "Two and two is", "answer": 4}, {"question": "Why?"}],
        "case_id": 3,
        "id": "japan",
    }
    data = load_requests([full])
    (request,) = data.requests
    assert data.task == "own"
    assert (request.id, request.case_id, request.target_true) == ("japan", "3", ("Tokyo",))
    assert [(p.kind, p.prompt, p.answers) for p in request.probes] == [
        ("rephrase", "Japan's capital is", ("Osaka",)),
        ("rephrase", "Its capital is", ("Osaka",)),
        ("portability", "Its mayor governs", ("Osaka", "Ōsaka")),
        ("locality", "The capital of France is", ("Paris",)),
        ("unrelated", "Two and two is", ("4",)),
        ("unrelated", "Why?", ()),
    ]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "prompt,target_new,subject,target_true,rephrase,rephrase_2,locality_prompt,locality_answer,locality_prompt_2\n"
        "The capital of Japan is,Osaka,Japan,Tokyo,Japan's capital is,,The capital of France is,Paris,The sea is\n"
        "The year of the war is,1914,,,,,,,\n"
    )
    first, second = load_requests(path).requests
    assert [(p.kind, p.prompt, p.answers) for p in first.probes] == [
        ("rephrase", "Japan's capital is", ("Osaka",)),
        ("locality", "The capital of France is", ("Paris",)),
        ("locality", "The sea is", ()),
    ]
    assert (second.target_new, second.subject, second.probes) == ("1914", None, ())
    assert second.origin == "facts.csv, line 3"


def test_what_to_dict_writes_is_read_back() -> None:
    request = EditRequest(
        prompt="The capital of Japan is ",
        target_new=" Osaka",
        subject="Japan",
        target_true=("Tokyo", "Tokyo"),
        probes=(Probe("x ", "rephrase"), Probe("y", "locality", ("a", "a"), ("b",), "g")),
        case_id="7",
        origin="elsewhere",
    )
    for source in ([request.to_dict()], [request], [json.loads(json.dumps(request.to_dict()))]):
        (again,) = load_requests(source).requests
        assert again == request
        assert again.id == request.id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_new": None, "target": "Osaka"}, "field 'target' is unknown; the field is called 'target_new'"),
        ({"ground_truth": "Tokyo"}, "field 'ground_truth' is unknown; the field is called 'target_true'"),
        ({"Subject": "Japan"}, "field 'Subject' is unknown; it is written 'subject'"),
        ({"paraphrase_2": "x"}, "field 'paraphrase_2' is unknown; the field is called 'rephrase'"),
        ({"subjekt": "Japan"}, "field 'subjekt' is unknown; did you mean 'subject'"),
        ({"zzz": 1}, "field 'zzz' is unknown; known fields: prompt, target_new"),
        ({"target_new": None}, "field 'target_new' is null"),
        ({"target_new": ["Osaka"]}, "field 'target_new' must be a text, got a list"),
        ({"prompt": "  "}, "field 'prompt' is empty"),
        (
            {"probes": [{"prompt": "x", "kind": "para"}]},
            r"field 'probes\[0\].kind' must be one of rephrase, port.*'para'",
        ),
        ({"probes": [{"kind": "rephrase"}]}, r"field 'probes\[0\].prompt' is missing"),
        (
            {"probes": [{"prompt": "x", "kind": "rephrase", "anwser": 1}]},
            r"field 'probes\[0\]': unknown field 'anwser'",
        ),
        ({"probes": "x"}, "field 'probes' must be a list of objects"),
        ({"portability_prompt": "x"}, "field 'portability_answer' is missing; 'portability_prompt' needs the answer"),
        ({"locality": [{"answer": "x"}]}, r"field 'locality\[0\].prompt' is missing or empty"),
    ],
)
def test_malformed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^<list>, record 1: {message}"):
        load_requests([FACT, {**FACT, **changes}])


def test_a_misspelt_column_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("prompt,target\nThe capital of Japan is,Osaka\n")
    with pytest.raises(
        DataError, match=r"facts\.csv, line 2: field 'target' is unknown; the field is called 'target_new'"
    ):
        load_requests(path)


def test_duplicates_are_kept_with_ids_of_their_own() -> None:
    data = load_requests([FACT, FACT, FACT, {**FACT, "id": "x"}, {**FACT, "id": "x"}, {**FACT, "id": "x-2"}])
    ids = [r.id for r in data.requests]
    assert ids == [ids[0], ids[0] + "-2", ids[0] + "-3", "x", "x-2", "x-2-2"]
    assert data.notes == {"repeated edit, id numbered": 4}
    assert [r.id for r in load_requests([FACT, FACT, FACT]).requests] == ids[:3]
