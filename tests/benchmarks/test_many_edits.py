"""The stream of ten thousand edits, and what is asked of it."""

import dataclasses

import pytest

from baft_intervention.requests import EditRequest, Probe
from benchmarks.test_benchmarks import script


@pytest.fixture(scope="module")
def many():
    return script("many_edits")


def test_ten_thousand_different_prompts_that_name_their_subjects(many, data_dir):
    requests = many.stream(data_dir)
    assert len(requests) >= 10_000
    assert len({r.prompt for r in requests}) == len({r.id for r in requests}) == len(requests)
    assert all(r.subject and r.subject in r.prompt and r.target_new for r in requests)
    own = [r for r in requests if r.probes]
    assert requests[: len(own)] == own  # the data set's own come first, then subjects without an edit
    others = [r.subject for r in requests[len(own) :]]
    new = len({*others} - {r.subject for r in own})
    assert len({*others[:new]} - {r.subject for r in own}) == new


def test_a_sample_lies_evenly_and_asks_no_neighbour_that_is_edited(many):
    neighbours = (Probe("c 1", "locality"), Probe("free", "locality"))
    requests = [EditRequest(f"c {i}", "x", probes=neighbours) for i in range(10)]
    sample = many.spread(requests, 4)
    assert [r.prompt for r in sample] == ["c 0", "c 2", "c 5", "c 7"]
    assert all([p.prompt for p in r.probes] == ["free"] for r in sample)
    assert many.spread(requests[:2], 5) == [dataclasses.replace(r, probes=neighbours[1:]) for r in requests[:2]]
