"""WISE: passages as paraphrases, and web text that was cut inside words."""

from __future__ import annotations

import pytest

from baft_intervention.data import load_requests
from baft_intervention.data.wise import mend_cut, split_passage
from baft_intervention.errors import DataError

TEMPORAL = {
    "prompt": "Rocketry is",
    "target_new": "the art of going up.",
    "subject": "Rocketry is",
    "ood_rephrase": "Rocketry, long a hobby,  has become a trade.",
    "locality_prompt": "We sell a map, histor",
    "locality_ground_truth": "ical print or plan",
}


def test_temporal() -> None:
    data = load_requests([TEMPORAL])
    (request,) = data.requests
    assert data.task == "temporal"
    assert [(p.kind, p.group, p.prompt, p.answers) for p in request.probes] == [
        ("rephrase", "ood", "Rocketry,", ("long a hobby,  has become a trade.",)),
        ("unrelated", "web", "We sell a map,", ("historical print or plan",)),
    ]
    (request,) = load_requests([TEMPORAL], locality="verbatim").requests
    assert request.probes[1].prompt == "We sell a map, histor"
    assert request.probes[1].answers == ("ical print or plan",)


def test_hallucination_with_an_empty_continuation() -> None:
    row = {name: value for name, value in TEMPORAL.items() if name != "ood_rephrase"}
    data = load_requests([{**row, "prompt": "A passage. ", "locality_ground_truth": ""}])
    assert data.task == "hallucination"
    assert data.requests[0].prompt == "A passage."
    assert [(p.prompt, p.answers) for p in data.requests[0].probes] == [("We sell a map, histor", ())]


@pytest.mark.parametrize(
    ("prompt", "passage", "parts"),
    [
        ("The Games", "The games, then, began", ("The games,", "then, began")),
        ("Ethics, a", "The ethics of it", ("The", "ethics of it")),
        ("One two three", "One two three", ("One two", "three")),
        ("One", "One", ("One", "")),
    ],
)
def test_split_passage(prompt: str, passage: str, parts: tuple[str, str]) -> None:
    assert split_passage(prompt, passage) == parts


@pytest.mark.parametrize(
    ("halves", "mended"),
    [
        (("a b", "c d"), ("a", "bc d")),
        (("a b ", "c d"), ("a b", "c d")),
        (("a b", " c d"), ("a b", "c d")),
        (("a\nb", "c"), ("a", "bc")),
        (("ab", "c"), ("ab", "c")),
        ((" ab", "c"), ("ab", "c")),
        (("a b", ""), ("a b", "")),
    ],
)
def test_mend_cut(halves: tuple[str, str], mended: tuple[str, str]) -> None:
    assert mend_cut(*halves) == mended


def test_malformed() -> None:
    with pytest.raises(DataError, match="record 0: field 'target_new' is null"):
        load_requests([{**TEMPORAL, "target_new": None}])
    with pytest.raises(DataError, match="record 1: field 'locality_prompt' must be a text, got an object"):
        load_requests([TEMPORAL, {**TEMPORAL, "locality_prompt": {}}])
    with pytest.raises(
        DataError, match="option 'locality' of format 'wise' is 'torn'; it must be one of 'mended', 'verba"
    ):
        load_requests([TEMPORAL], locality="torn")
