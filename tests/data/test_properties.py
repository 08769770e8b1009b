"""Whatever a record holds, a reader gives requests or a DataError, never anything else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baft_intervention import EditRequest
from baft_intervention.data import formats, load_requests
from baft_intervention.data.files import RawRecord, Table
from baft_intervention.data.record import Record
from baft_intervention.errors import DataError, RequestError

FIELDS = (
    *(
        "prompt",
        "target_new",
        "subject",
        "ground_truth",
        "rephrase_prompt",
        "locality",
        "portability",
        "text",
        "labels",
    ),
    *(
        "concept",
        "question",
        "success",
        "K_F",
        "ent",
        "pos",
        "neg",
        "requested_rewrite",
        "paraphrase_prompts",
        "questions",
    ),
    *(
        "neighborhood_prompts",
        "str",
        "src",
        "alt",
        "answers",
        "rephrase",
        "loc",
        "target",
        "object",
        "yes_question",
        "question_2hop",
        "alternative_subject",
        "inverse question",
        "loc_ans",
        "locality_prompt",
        "prediction",
    ),
    *(
        "locality_ground_truth",
        "ood_rephrase",
        "new_answer",
        "new_single_hops",
        "answer",
        "case_id",
        "id",
        "probes",
        "kind",
    ),
    *(
        "attribute",
        "template",
        "relation_id",
        "New Question",
        "New Answer",
        "target_true",
        "rephrase_2",
        "group",
        "contrast",
    ),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["{}", "a {} b", "nq question: ", "rephrase", "\ud800", " "]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
keys = st.one_of(st.sampled_from(FIELDS), texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=5)),
    max_leaves=20,
)
NAMES = [fmt.name for fmt in formats()]


def _read(name: str, value: Any, siblings: tuple[Any, ...] = (), document: Any = None) -> list[EditRequest]:
    fmt = next(fmt for fmt in formats() if fmt.name == name)
    table = Table("<list>", "<list>", (), document=document)
    record = Record.of_row(table, RawRecord(value, "record 0"), 0, (value, *siblings), Counter())
    result = fmt.read(record)
    return [result] if isinstance(result, EditRequest) else list(result)


def check(read: Callable[[], Iterable[EditRequest]], place: str) -> None:
    """Requests that can be written down, or an error that says where; any other exception goes through."""
    message = None
    try:
        requests = list(read())
    except (DataError, RequestError) as error:
        message = str(error)
    else:
        assert all(isinstance(request, EditRequest) for request in requests)
        json.dumps([request.to_dict() for request in requests], ensure_ascii=False).encode()
    assert message is None or place in message


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_json_value(name: str, data: st.DataObject) -> None:
    """The readers themselves, without the net that ``load_requests`` spreads for readers from outside."""
    value = data.draw(json_values)
    if isinstance(value, dict):  # most random keys are nobody's: put the format's own fields in
        for key in data.draw(st.lists(st.sampled_from(FIELDS), max_size=6)):
            value[key] = data.draw(json_values)
    siblings = tuple(data.draw(st.lists(json_values, max_size=3)))
    document = data.draw(st.none() | st.dictionaries(keys, json_values, max_size=3))
    check(lambda: _read(name, value, siblings, document), "record 0")


def well_formed(name: str) -> dict[str, Any]:
    question = {"prompt": "b is", "ground_truth": "c"}
    answer = {"str": "new", "id": "Q1"}
    rewrite = {"prompt": "{} is", "subject": "a", "target_new": answer, "target_true": answer, "question": "a is?"}
    hop = {"question": "a is?", "cloze": "a, then, is", "answer": "new", "answer_alias": ["n"]}
    one_hop = {"New Question": "b?", "New Answer": "c"}
    knowedit = {
        "prompt": "a is",
        "target_new": "new",
        "subject": "a",
        "locality": {"L": [question]},
        "portability": {"P": [question]},
    }
    return {
        "knowedit": knowedit,
        "wikibio": {"text": "a.", "labels": "b.", "concept": "a", "locality": {"L": [question]}},
        "sanitation": {"question": "a?", "ground_truth": "b", "target_new": "c"},
        "convsent": {"ent": "a", "pos": ["b"], "neg": ["c"]},
        "counterfact": {
            "requested_rewrite": rewrite,
            "paraphrase_prompts": ["p"],
            "neighborhood_prompts": ["n"],
            "portability": one_hop,
        },
        "counterfact_flat": {
            "prompt": "a is",
            "target_new": "b",
            "ground_truth": "c",
            "rephrase_prompt": "a, then, is",
            "locality_prompt": "d is",
            "locality_ground_truth": "c",
        },
        "zsre_mend": {
            "src": "a?",
            "alt": "b",
            "answers": ["c"],
            "rephrase": "a??",
            "loc": "nq question: d",
            "loc_ans": "e",
            "portability": one_hop,
        },
        "wikibigedit": {
            "prompt": "a is",
            "target_new": "b",
            "rephrase_prompt": "a, then, is",
            "locality_prompt": "d is",
            "locality_ground_truth": "c",
        },
        "qaedit": {"prompt": "a?", "target": "b", "rephrase": "a??", "locality": [{"loc": "c", "loc_ans": "d"}]},
        "hallueditbench": {
            "subject": "a",
            "question": "a?",
            "object": "b",
            "paraphrased_question": "a??",
            "multiple_choice_with_letters": "A. b  B. c",
            "multiple_choice_labels": "A",
            "yes_question": "b?",
            "locality_question": "d?",
            "question_2hop": "e?",
            "answer_2hop": "f",
        },
        "wise": {
            "prompt": "a",
            "target_new": "b",
            "ood_rephrase": "a c",
            "locality_prompt": "d e",
            "locality_ground_truth": "f",
        },
        "mquake": {
            "case_id": 1,
            "requested_rewrite": [rewrite, rewrite],
            "questions": ["q?"],
            "new_answer": "x",
            "new_answer_alias": ["y"],
            "new_single_hops": [hop],
        },
        "known": {
            "subject": "a",
            "attribute": "b",
            "template": "{} is",
            "prediction": "b",
            "prompt": "a is",
            "relation_id": "P1",
        },
        "own": {
            "prompt": "a is",
            "target_new": "b",
            "rephrase": ["c"],
            "locality": [question],
            "probes": [{"prompt": "x", "kind": "rephrase"}],
        },
    }[name]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@pytest.mark.parametrize("name", NAMES)
def test_well_formed_records_are_recognised_and_read(name: str) -> None:
    assert load_requests([well_formed(name)]).format == name


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_well_formed_record_with_one_place_changed(name: str, data: st.DataObject) -> None:
    value = json.loads(json.dumps(well_formed(name)))
    place = data.draw(st.sampled_from(_places(value)))
    change = data.draw(json_values)
    if not place:
        value = change
    else:
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = change
    check(lambda: _read(name, value), "record 0")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(json_values, max_size=4), skip_bad=st.booleans())
def test_any_list_through_the_front_door(rows: list[Any], skip_bad: bool) -> None:
    try:
        data = load_requests(rows, skip_bad=skip_bad)
    except (DataError, RequestError):
        return
    assert data.requests
    json.dumps(data.describe())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(st.binary(max_size=60), st.text(alphabet='[]{}",:\n \\u0tfn', max_size=40).map(str.encode)))
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_any_bytes(tmp_path: Path, suffix: str, raw: bytes) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(raw)
    check(lambda: load_requests(path).requests, f"any{suffix}")
