"""The stream of ten thousand edits, and what is asked of it."""

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


def test_a_sample_lies_evenly_and_its_neighbours_are_about_nobody_who_is_edited(many):
    probes = (Probe("old", "locality"), Probe("again", "rephrase", answers=("x",)))
    requests = [EditRequest(f"of s{i} c", "x", subject=f"s{i}", probes=probes) for i in range(10)]
    sample = many.spread(requests, 4, ["s3", "a", "b", "a", "c"])
    assert [r.subject for r in sample] == ["s0", "s2", "s5", "s7"]
    assert all(p.kind == "rephrase" for r in sample for p in r.probes[2:])
    near = [[p.prompt for p in r.probes if p.kind == "locality"] for r in sample]
    assert near == [["of a c", "of b c"], ["of c c", "of a c"], ["of b c", "of c c"], ["of a c", "of b c"]]
    assert [r.prompt for r in many.spread(requests[:2], 5, ["a"])] == ["of s0 c", "of s1 c"]
