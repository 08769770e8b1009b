"""benchmarks/figures.py: what it draws is committed, small, and still drawn from the same fields."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from baft_intervention.analysis.figures import (
    BatchedEditing,
    LengthScore,
    RedundantDimensions,
    Tension,
    WeightsByPosition,
)

plots = pytest.importorskip("baft_intervention.analysis.plots")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _found(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["found"]


def test_every_figure_is_committed_and_shown(script):
    assert {path.stem for path in FOLDER.glob("*.png")} == set(script.FIGURES)
    assert {path.stem for path in FOLDER.glob("*.json")} == set(script.FIGURES)
    assert max(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
    shown = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}.png)" in shown for name in script.FIGURES)


def test_the_committed_numbers_make_the_pictures(script, tmp_path):
    figures = {
        "redundant_dimensions": plots.draw_redundant_dimensions(
            {name: RedundantDimensions(**data) for name, data in _found("redundant_dimensions").items()}
        ),
        "weights_by_position": plots.draw_weights_by_position(
            {name: WeightsByPosition(**data) for name, data in _found("weights_by_position").items()},
            "edited prompt",
            "unrelated text",
        ),
        "batched_editing": plots.draw_batched_editing(
            {
                name: [BatchedEditing(b["size"], tuple(LengthScore(**s) for s in b["scores"])) for b in batches]
                for name, batches in _found("batched_editing").items()
            }
        ),
        "tension": plots.draw_tension(
            {name: [Tension(**data) for data in results] for name, results in _found("tension").items()}
        ),
    }
    assert set(figures) == set(script.FIGURES)
    for name, figure in figures.items():
        assert plots.save(figure, tmp_path / f"{name}.png").stat().st_size > 20_000


def test_the_linear_bound_holds_in_what_is_committed():
    found = _found("tension")
    assert all(edit["leak"] >= edit["least_leak"] for edit in found["LoReFT"])
    for edit in found["LoReFT"]:
        for distance, size in (*edit["paraphrases"], *edit["unrelated"]):
            assert size >= 1 - edit["slope"] * distance - 1e-3


def test_lengths_are_grouped_without_losing_any():
    scores = [LengthScore(str(i), n, 1, 1.0, ()) for i, n in enumerate([5, 5, 5, 6, 7, 9, 9, 12])]
    groups = plots.by_length(scores, "prompt_tokens")
    assert [s.id for group in groups.values() for s in group] == [s.id for s in scores]
    assert list(plots.by_length(scores, "target_tokens")) == ["1"]


def test_paraphrases_are_the_facts_own_and_never_the_edited_prompt(script):
    for fact in script.load_facts():
        asked = script.paraphrases(fact)
        assert fact.prompt not in asked
        assert {probe.prompt for probe in fact.probes_of("rephrase")} <= set(asked)
        assert len(set(asked)) == len(asked)
