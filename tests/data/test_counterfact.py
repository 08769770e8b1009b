"""CounterFact in ROME's form and in EasyEdit's."""

from __future__ import annotations

from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.errors import DataError


def rome(**changes: Any) -> dict[str, Any]:
    data = {
        "case_id": 5,
        "requested_rewrite": {
            "prompt": "{} plays the",
            "relation_id": "P1303",
            "subject": "Ann {Lee}",
            "target_new": {"str": "harp", "id": "Q1"},
            "target_true": {"str": "drum", "id": "Q2"},
        },
        "paraphrase_prompts": ["It rained. Ann {Lee} plays the instrument", "Ann {Lee} is good at the"],
        "neighborhood_prompts": ["Bo plays the", "Cy plays the"],
        "attribute_prompts": ["Di plays the"],
        "generation_prompts": ["Ann {Lee} is known for", "Ann {Lee} is known for"],
        "portability": {"Recalled Relation": "(…)", "New Question": "How many strings?", "New Answer": 47},
    }
    return {**data, **changes}


def test_rome_form() -> None:
    data = load_requests([rome()])
    (request,) = data.requests
    assert (data.task, data.format) == ("counterfact", "counterfact")
    assert (request.prompt, request.subject) == ("Ann {Lee} plays the", "Ann {Lee}")
    assert (request.target_new, request.target_true) == ("harp", ("drum",))
    assert {(p.group, p.answers, p.contrast) for p in request.probes_of("rephrase")} == {
        ("paraphrase", ("harp",), ("drum",))
    }
    assert {(p.group, p.answers, p.contrast) for p in request.probes_of("locality")} == {
        ("neighborhood", ("drum",), ("harp",))
    }
    assert [(p.group, p.answers) for p in request.probes_of("portability")] == [("one_hop", ("47",))]
    assert data.options["include"] == ("paraphrase", "neighborhood", "portability")
    assert request.case_id == ""  # every record stands alone


def test_attribute_and_generation_prompts_on_demand() -> None:
    for include in (("attribute", "generation"), "attribute, generation"):
        (request,) = load_requests([rome()], include=include).requests
        attribute, generation = request.probes
        assert (attribute.kind, attribute.answers, attribute.contrast) == ("locality", ("harp",), ("drum",))
        assert (generation.kind, generation.group, generation.answers) == ("portability", "generation", ())
    with pytest.raises(
        DataError, match="option 'include' of format 'counterfact' holds 'paraphrases'; .* paraphrase, neigh"
    ):
        load_requests([rome()], include="paraphrases")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("requested_rewrite", "prompt"),
            "Ann plays the",
            "field 'requested_rewrite.prompt' has no {} where the subject",
        ),
        (("requested_rewrite", "subject"), None, "field 'requested_rewrite.subject' is null"),
        (("requested_rewrite", "target_new"), {"id": "Q1"}, "field 'requested_rewrite.target_new.str' is missing"),
        (("requested_rewrite", "target_true"), {"str": ""}, "field 'requested_rewrite.target_true.str' is empty"),
        (("paraphrase_prompts",), [["x"]], r"field 'paraphrase_prompts\[0\]' must be a text, got a list"),
        (("neighborhood_prompts",), {"x": 1}, r"field 'neighborhood_prompts\[0\]' must be a text, got an object"),
        (("portability",), {"New Question": "x"}, None),
        (("portability",), {"New Answer": "x"}, "field 'portability.New Question' is missing"),
        (("portability",), "x", "field 'portability' must be an object, got a text"),
    ],
)
def test_rome_form_malformed(path: tuple[str, ...], value: Any, message: str | None) -> None:
    row = rome()
    place = row
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    if message is None:  # a question without an answer only costs its probe
        assert load_requests([row]).notes == {"probe without an answer dropped": 1}
        return
    with pytest.raises(DataError, match=f"^<list>, record 0: {message}"):
        load_requests([row], "counterfact")


def test_plain_text_targets_and_equal_targets() -> None:
    row = rome()
    row["requested_rewrite"] |= {"target_new": "drum", "target_true": "drum"}
    (request,) = load_requests([row]).requests
    assert request.target_true == ()
    assert all(p.contrast == () for p in request.probes)


def test_flat_form() -> None:
    row = {
        "case_id": 1,
        "prompt": "Ann plays the",
        "target_new": "harp",
        "subject": "Ann",
        "ground_truth": "drum",
        "rephrase_prompt": "What Ann plays is the",
        "locality_prompt": "Bo plays the",
        "locality_ground_truth": "drum",
    }
    data = load_requests([row])
    (request,) = data.requests
    assert (data.task, data.format) == ("counterfact", "counterfact_flat")
    assert [(p.kind, p.group, p.answers, p.contrast) for p in request.probes] == [
        ("rephrase", "rephrase", ("harp",), ("drum",)),
        ("locality", "neighborhood", ("drum",), ("harp",)),
    ]
    with pytest.raises(DataError, match="record 0: field 'target_new' is empty"):
        load_requests([{**row, "target_new": ""}])
    more = {**row, "portability_prompt": "The family of Ann's instrument is", "portability_ground_truth": ["strings"]}
    assert load_requests([more]).probe_counts()["portability/one_hop"] == 1
