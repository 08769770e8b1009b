"""What an edit and a question about it are: checked when made, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baft_intervention import EditRequest, Probe
from baft_intervention.errors import RequestError
from baft_intervention.requests import PROBE_KINDS

text = st.text(min_size=1, max_size=20).filter(str.strip)
probes = st.builds(
    Probe,
    prompt=text,
    kind=st.sampled_from(PROBE_KINDS),
    answers=st.lists(text, max_size=3),
    contrast=st.lists(text, max_size=2),
    group=st.text(max_size=5),
)
requests = st.builds(
    EditRequest,
    prompt=text,
    target_new=text,
    subject=st.none() | text,
    target_true=st.lists(text, max_size=3),
    probes=st.lists(probes, max_size=3),
    case_id=st.text(max_size=5),
)


@settings(deadline=None)
@given(requests)
def test_a_request_survives_json(request_made: EditRequest) -> None:
    again = EditRequest.from_dict(json.loads(json.dumps(request_made.to_dict())))
    assert again == request_made
    assert again.id == request_made.id
    assert hash(again) == hash(request_made)


def test_the_id_is_of_what_is_asked() -> None:
    one = EditRequest("The capital of Japan is", "Osaka", subject="Japan")
    assert one.id == EditRequest("The capital of Japan is", "Osaka", subject="Japan", case_id="x").id
    others = [
        EditRequest("The capital of Japan is", "Osaka"),
        EditRequest("The capital of Japan is", "Kyoto", subject="Japan"),
        EditRequest("The capital of Japan was", "Osaka", subject="Japan"),
    ]
    assert len({one.id, *(other.id for other in others)}) == 4
    assert EditRequest("a", "b", id="mine").id == "mine"
    assert EditRequest("\ud800", "b").id, "a lone surrogate is text too"


def test_requests_are_frozen_and_their_lists_tuples() -> None:
    answers = ["Tokyo"]
    made = EditRequest("a", "b", target_true=answers, probes=[Probe("c", "rephrase")])  # pyright: ignore[reportArgumentType]
    answers.append("x")
    assert made.target_true == ("Tokyo",)
    assert isinstance(made.probes, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.prompt = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_where_it_was_read_is_for_messages_alone() -> None:
    one, other = EditRequest("a", "b", id="i", origin="edits.json:3"), EditRequest("a", "b", id="i")
    assert one == other
    assert one.where == "edits.json:3: edit 'i' ('a')"
    assert other.where == "edit 'i' ('a')"


def test_probes_by_kind() -> None:
    given_probes = tuple(Probe(f"p{i}", kind) for i, kind in enumerate([*PROBE_KINDS, "rephrase"]))  # pyright: ignore[reportArgumentType]
    made = EditRequest("a", "b", probes=given_probes)
    assert [p.prompt for p in made.probes_of("rephrase")] == ["p0", "p4"]
    assert [p.prompt for p in made.probes_of("unrelated")] == ["p3"]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty; give a non-empty text"),
        ({"prompt": 3}, "prompt must be a string, got int: 3"),
        ({"target_new": ""}, "target_new is empty"),
        ({"target_new": None}, "target_new must be a string, got NoneType"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": 5}, "subject must be a string"),
        ({"target_true": "Tokyo"}, "target_true must be a list of strings, got 'Tokyo'"),
        ({"target_true": ["Tokyo", 3]}, r"target_true\[1\] must be a string"),
        ({"target_true": [""]}, r"target_true\[0\] is empty"),
        ({"probes": 3}, "probes must be a list"),
        ({"probes": [{"prompt": "a"}]}, r"probes\[0\]: field 'kind' is missing"),
        ({"probes": ["a"]}, r"probes\[0\]: a probe must be an object, got str"),
        ({"probes": [{"prompt": "a", "kind": "other"}]}, r"probes\[0\]: probe.kind is 'other'; it must be one of"),
        ({"probes": [{"prompt": "a", "kind": "locality", "x": 1}]}, r"probes\[0\]: unknown field 'x'; known fields"),
        ({"probes": [{"prompt": " ", "kind": "locality"}]}, r"probes\[0\]: probe.prompt is empty"),
        (
            {"probes": [{"prompt": "a", "kind": "locality", "answers": "x"}]},
            r"probes\[0\]: probe.answers must be a list of str",
        ),
        ({"id": 3}, "id must be a string"),
        ({"case_id": None}, "case_id must be a string"),
        ({"target": "x"}, "unknown field 'target'; known fields: case_id, chat_template, id"),
    ],
)
def test_a_bad_field_is_named_with_its_place(fields: dict[str, Any], match: str) -> None:
    good = {"prompt": "a", "target_new": "b"}
    with pytest.raises(RequestError, match=f"^edits.json:3: {match}"):
        EditRequest.from_dict({**good, **fields}, origin="edits.json:3")


@pytest.mark.parametrize("field", ["prompt", "target_new"])
def test_a_missing_field_is_named(field: str) -> None:
    data = {"prompt": "a", "target_new": "b"}
    del data[field]
    with pytest.raises(RequestError, match=f"here: field '{field}' is missing"):
        EditRequest.from_dict(data, origin="here")


@pytest.mark.parametrize("data", [None, 3, "a", ["prompt"]])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(RequestError, match="here: a request must be an object"):
        EditRequest.from_dict(data, origin="here")


def test_a_probe_must_be_one() -> None:
    with pytest.raises(RequestError, match=r"probes\[0\] must be a Probe, got dict"):
        EditRequest("a", "b", probes=({"prompt": "a", "kind": "locality"},))  # pyright: ignore[reportArgumentType]
