"""ROME's known facts."""

from __future__ import annotations

from typing import Any

import pytest

from baft_intervention.data import load_requests
from baft_intervention.errors import DataError


def rows() -> list[dict[str, Any]]:
    facts = [
        ("Mount A", "Asia", "P30"),
        ("Mount B", "Europe", "P30"),
        ("Mount C", "Africa", "P30"),
        ("Ann", "harp", "P1303"),
    ]
    return [
        {
            "known_id": i,
            "subject": subject,
            "attribute": attribute,
            "template": "{} is in",
            "prompt": f"{subject} is in",
            "prediction": f" {attribute}.",
            "relation_id": relation,
        }
        for i, (subject, attribute, relation) in enumerate(facts)
    ]


def test_known_and_counterfactual() -> None:
    data = load_requests(rows())
    assert (data.task, data.options["target"]) == ("known", "known")
    assert [(r.target_new, r.target_true) for r in data.requests[:2]] == [("Asia", ()), ("Europe", ())]
    changed = load_requests(rows()[:3], target="counterfactual", seed=1)
    for before, after in zip(data.requests, changed.requests, strict=False):
        assert after.target_true == (before.target_new,)
        assert after.target_new in {"Asia", "Europe", "Africa"} - {before.target_new}
    assert changed == load_requests(rows()[:3], target="counterfactual", seed=1)
    assert (
        len(
            {
                tuple(r.target_new for r in load_requests(rows()[:3], target="counterfactual", seed=s).requests)
                for s in range(9)
            }
        )
        > 1
    )


def test_malformed() -> None:
    with pytest.raises(
        DataError, match="record 3: field 'relation_id' is 'P1303', and no record with it has another attribute"
    ):
        load_requests(rows(), target="counterfactual")
    with pytest.raises(DataError, match="record 0: field 'attribute' is empty"):
        load_requests([{**rows()[0], "attribute": ""}])
