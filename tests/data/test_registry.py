"""Formats by name and by content, and formats of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest

from baft_intervention import EditRequest
from baft_intervention.data import (
    Record,
    format_named,
    formats,
    load_requests,
    register_format,
    tasks,
    unregister_format,
)
from baft_intervention.errors import DataError, RequestError

KNOWEDIT = {"prompt": "A is", "target_new": "b", "locality": {}, "portability": {}}
MEND = {"src": "A is", "alt": "b", "answers": ["c"]}


@pytest.fixture
def trivia() -> Iterator[None]:
    @register_format("trivia", matches=("q", "a"), tasks=("quiz", "exam"))
    def read(record: Record, *, case: Literal["keep", "lower"] = "keep", suffix: str = "") -> Any:
        """Trivia questions."""
        answer = record.text("a")
        if answer == "no text":
            return [1]
        if answer == "fails":
            return record.data["z"]
        if answer == "empty":
            return EditRequest(prompt="", target_new="x")
        return record.request(
            prompt=record.text("q"), target_new=(answer.lower() if case == "lower" else answer) + suffix
        )

    yield
    unregister_format("trivia")


def test_one_call_adds_a_format(trivia: None) -> None:
    data = load_requests([{"q": "Who?", "a": "Me"}], case="lower")
    assert (data.task, data.format, data.options["case"]) == ("quiz", "trivia", "lower")
    assert data.requests[0].target_new == "me"
    assert load_requests([{"q": "Who?", "a": "Me"}], "exam").task == "exam"
    assert format_named("trivia").summary == "Trivia questions."
    assert {"quiz", "exam"} <= set(tasks())


def test_it_is_asked_before_the_shipped_ones(trivia: None) -> None:
    row = {"q": "Who?", "a": "Me", "prompt": "x", "target_new": "y"}
    assert load_requests([row]).format == "trivia"
    assert formats()[0].name == "trivia"
    assert formats()[-1].name == "own"


def test_what_a_reader_of_ones_own_does_wrong_is_a_bad_record(trivia: None) -> None:
    rows = [{"q": "Who?", "a": a} for a in ("no text", "fails", "empty", "fine")]
    for i, message in enumerate(("returned a int, not EditRequest", "failed: KeyError: 'z'", "prompt is empty")):
        with pytest.raises(DataError, match=f"<list>, record 0: .*{message}"):
            load_requests(rows[i:])
    assert load_requests(rows, skip_bad=True).bad_count == 3


def test_names_are_taken_once(trivia: None) -> None:
    with pytest.raises(DataError, match="format 'trivia' is registered already; choose another name or pass replace"):
        register_format("trivia", matches=("q",))(lambda record: [])
    register_format("trivia", matches=("q",), replace=True)(lambda record: [])
    assert format_named("trivia").tasks == ("trivia",)
    with pytest.raises(DataError, match="unknown format 'quizz'"):
        format_named("quizz")


def test_options_must_be_keywords_with_defaults() -> None:
    def read(record: Record, case: str = "") -> Any: ...

    with pytest.raises(DataError, match="option 'case' of the reader must be keyword-only and have a default"):
        register_format("bad", matches=("q",))(read)


def test_unknown_options(trivia: None) -> None:
    with pytest.raises(
        DataError, match="format 'zsre_mend' has no option 'taget'; its options: target, loc; did you mean 'target'"
    ):
        load_requests([MEND], taget="alt")
    with pytest.raises(DataError, match="format 'knowedit' has no option 'target'; its options: none"):
        load_requests([KNOWEDIT], target="alt")


@pytest.mark.parametrize(
    ("row", "task", "fmt"),
    [
        (KNOWEDIT, "wikidata_recent", "knowedit"),
        ({**KNOWEDIT, "ground_truth": "c"}, "wikidata_counterfact", "knowedit"),
        ({**KNOWEDIT, "rephrase_prompt": "x"}, "zsre", "knowedit"),
        (MEND, "zsre", "zsre_mend"),
        ({"text": "A.", "labels": "B.", "concept": "a"}, "wikibio", "wikibio"),
        ({"prompt": "A is", "target_new": "b"}, "own", "own"),
        ({"prompt": "A is", "target_new": "b", "locality": [], "portability": None}, "own", "own"),
        ({"prompt": "A is", "target_new": "b", "locality": {"prompt": "c", "answer": "d"}}, "own", "own"),
        (
            {"prompt": "A is", "target_new": "b", "rephrase": "c", "locality_prompt": "d", "locality_answer": "e"},
            "own",
            "own",
        ),
    ],
)
def test_recognised_by_fields(row: dict[str, Any], task: str, fmt: str) -> None:
    data = load_requests([row])
    assert (data.task, data.format) == (task, fmt)


def test_a_malformed_first_record_does_not_hide_the_format() -> None:
    data = load_requests([{"prompt": "only"}, MEND, MEND, MEND], skip_bad=True)
    assert (data.format, data.bad_count) == ("zsre_mend", 1)


@pytest.mark.parametrize("task", ["zsre", "ZSRE", " zsre_mend", "zsre-mend", "mend", None])
def test_spellings_of_a_task(task: str | None) -> None:
    data = load_requests([MEND], task)
    assert (data.task, data.format) == ("zsre", "zsre_mend")


def test_task_and_content_disagree() -> None:
    with pytest.raises(
        DataError, match=r"task 'counterfact' comes in the format .*counterfact, but the records are zsre_mend"
    ):
        load_requests([MEND], "counterfact")
    with pytest.raises(DataError, match="unknown task 'zsr'; known tasks: .*; did you mean 'zsre'"):
        load_requests([MEND], "zsr")
    with pytest.raises(DataError, match=r"match no known format \(their fields: \['foo'\]\). Name a task, or register"):
        load_requests([{"foo": 1}])
    with pytest.raises(DataError, match="record 0: field 'src' is missing; the record has 'prompt', 'target_new'"):
        load_requests([{"prompt": "x", "target_new": "y", "alt": "z"}], "zsre_mend")  # may be a mistaken field


def test_a_request_error_outside_a_reader_is_not_hidden() -> None:
    with pytest.raises(RequestError):
        load_requests([EditRequest(prompt="x", target_new=" ")])
