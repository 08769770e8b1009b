"""``baft demo`` on the real model, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(900)]

LIMIT = 60.0  # seconds after set-up, on two cores that are free


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    place = tmp_path_factory.mktemp("demo") / "adapter"
    command = [sys.executable, "-m", "baft_intervention.cli", "demo", "--json", "--out", str(place)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _questions(demo, kind):
    return [q for fact in demo["facts"] for q in fact["questions"] if q["kind"] == kind]


def test_at_least_three_facts_with_a_paraphrase_and_two_neighbours_each(demo):
    assert len(demo["facts"]) >= 3
    for fact in demo["facts"]:
        kinds = [question["kind"] for question in fact["questions"]]
        assert kinds == ["edit", "paraphrase", "neighbour", "neighbour"]


def test_the_model_knew_the_facts_and_freely_writes_the_targets_afterwards(demo):
    for fact in demo["facts"]:
        question = fact["questions"][0]
        assert question["before"].strip().startswith(fact["target_true"][0])
        assert question["after"].strip().startswith(fact["target_new"])


def test_paraphrases_follow_and_neighbours_stay(demo):
    for fact in demo["facts"]:
        assert fact["questions"][1]["after"].strip().startswith(fact["target_new"])
    neighbours = _questions(demo, "neighbour")
    assert sum(q["before"] == q["after"] for q in neighbours) >= len(neighbours) - 1


def test_the_marks_say_what_happened(demo):
    for fact in demo["facts"]:
        for question in fact["questions"]:
            if question["kind"] == "neighbour":
                expected = "same" if question["before"] == question["after"] else "moved"
            else:
                expected = "ok" if question["after"].strip().startswith(fact["target_new"]) else "missed"
            assert question["mark"] == expected


def test_everything_is_as_before_in_the_end(demo):
    assert all(demo["checks"].values())
    assert len(demo["checks"]) == 5
    assert demo["old_answer_back_after_one_undo"]
    for kind in ("edit", "paraphrase", "neighbour"):
        assert all(q["all_undone"] == q["before"] for q in _questions(demo, kind))


def test_it_takes_less_than_a_minute_where_the_cores_are_free(demo):
    crowded = os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5
    assert demo["seconds"]["total_after_set_up"] < LIMIT * (5 if crowded else 1)


def test_a_mark_is_computed_and_not_assumed():
    from baft_intervention.cli.demo import Question

    neighbour, paraphrase = Question(0, "neighbour", "p", "Osaka"), Question(0, "paraphrase", "p", "Osaka")
    assert neighbour.mark("Paris.", "Paris.") == "same"
    assert neighbour.mark("Paris.", "Paris!") == "moved"
    assert paraphrase.mark("Tokyo", " Osaka, Japan") == "ok"
    assert paraphrase.mark("Tokyo", " not Osaka") == "missed"
