"""ConvSent: directions that are drawn once and recorded, wordings, other topics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baft_intervention.data import direction_of, load_requests
from baft_intervention.data.convsent import TEMPLATES
from baft_intervention.errors import DataError


def rows(n: int = 12) -> list[dict[str, Any]]:
    return [{"ent": f"Topic {i}", "pos": [f" Good {i}! ", " "], "neg": [f"Bad {i}.", f"Worse {i}."]} for i in range(n)]


def test_serac_wordings() -> None:
    assert len(set(TEMPLATES)) == 13
    assert TEMPLATES[0] == "What do you think of {}?"
    assert "What is your sentiment of {}?" in TEMPLATES


def test_explicit_direction() -> None:
    data = load_requests(rows(), direction="negative")
    request = data.requests[3]
    assert data.task == "convsent"
    assert data.options["direction"] == "negative"
    assert (request.prompt, request.subject) == ("What do you think of Topic 3?", "Topic 3")
    assert (request.target_new, request.target_true) == ("Bad 3.", ("Good 3!",))
    (asked,) = request.probes_of("rephrase")
    assert (asked.group, asked.answers, asked.contrast) == ("sentiment", ("Bad 3.", "Worse 3."), ("Good 3!",))
    assert "Topic 3" in asked.prompt
    assert asked.prompt != request.prompt
    others = request.probes_of("locality")
    assert [(p.group, p.answers) for p in others] == [
        ("other_topic", ("Good 4!", "Bad 4.", "Worse 4.")),
        ("other_topic", ("Good 5!", "Bad 5.", "Worse 5.")),
    ]
    assert all("Topic 3" not in p.prompt for p in others)


def test_random_direction_depends_on_seed_and_entity_only() -> None:
    def directions(data: Any) -> list[bool]:
        return [request.target_new.startswith("Good") for request in data.requests]

    data = load_requests(rows(40), seed=3)
    assert data.options["seed"] == 3
    assert data.options["direction"] == "random"
    assert directions(data) == [direction_of(f"Topic {i}", 3) == "positive" for i in range(40)]
    assert 8 < sum(directions(data)) < 32
    assert directions(load_requests(rows(40), seed=4)) != directions(data)
    assert directions(load_requests(rows(10), seed=3)) == directions(data)[:10]
    assert load_requests(rows(40), seed=3) == data


def test_instructed_prompt_and_numbers_of_probes() -> None:
    (first, *_) = load_requests(rows(), direction="positive", instructed=True, rephrases=12, others=0).requests
    assert first.prompt == "From the sentiment dataset, answer What do you think of Topic 0? positively."
    assert len({p.prompt for p in first.probes_of("rephrase")}) == 12
    assert first.probes_of("locality") == ()
    (alone,) = load_requests(rows(1)).requests
    assert alone.probes_of("locality") == ()


def test_malformed_siblings_are_passed_over() -> None:
    data = load_requests([rows()[0], {"ent": 3, "pos": {}, "neg": 2}, "x", rows()[0], rows()[1]], skip_bad=True)
    assert [p.answers[0] for p in data.requests[0].probes_of("locality")] == ["Good 1!"]
    assert data.bad_count == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ent": ""}, "field 'ent' is empty"),
        ({"pos": []}, "field 'pos' holds no reply"),
        ({"neg": [" "]}, "field 'neg' holds no reply"),
        ({"neg": [None]}, r"field 'neg\[0\]' must be a text, got null"),
        ({"pos": None}, "field 'pos' holds no reply"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "replies.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows()[0], {**rows()[1], **changes}]))
    with pytest.raises(DataError, match=rf"replies\.json, line 2: {message}"):
        load_requests(path)


def test_options_are_checked() -> None:
    with pytest.raises(DataError, match="option 'rephrases' of format 'convsent' is 'many'; it must be a whole number"):
        load_requests(rows(), rephrases="many")
    with pytest.raises(DataError, match="option 'instructed' of format 'convsent' is 3; it must be true or false"):
        load_requests(rows(), instructed=3)
    assert load_requests(rows(), rephrases="2", instructed="true").options["rephrases"] == 2
