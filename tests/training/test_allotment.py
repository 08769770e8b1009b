"""Bases that are allotted: orthogonal to the earlier edits' while the dimension lasts, then along the least used directions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from baft_intervention.config import BaftConfig
from baft_intervention.core.basis_map import BasisWeightedMap
from baft_intervention.core.orthonormal import orthonormality_error, random_orthonormal
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import ConfigError
from baft_intervention.requests import EditRequest
from baft_intervention.training import allotment as allotment_module
from baft_intervention.training.allotment import Allotment
from edits import FRANCE, LEO, TOWER, adapter_bytes, tiny_editor
from tiny import tiny_model, tiny_tokenizer

D, R = 32, 4
SUBJECTS = ("France", "Leo", "Rome", "Osaka", "London", "Italy", "Japan", "Danielle", "Tokyo", "He")
REQUESTS = [EditRequest(f"The name of {name} is", "city", subject=name, id=name) for name in SUBJECTS]


def orthogonal(**changes: Any) -> BaftEditor:
    return tiny_editor(tiny_model(), tiny_tokenizer(), **{"bases": "orthogonal", "steps": 4, **changes})


def bases(editor: BaftEditor, layer: int) -> Tensor:
    """Of all edits, one below the other: ``(T r, d)``."""
    return torch.cat([edit.tensors[layer]["rotation"] for edit in editor.edits])


# ------------------------------------------------------------------------------------------ the loads


def test_directions_are_new_while_there_are_any_and_then_all_of_them_again():
    allotment, found = Allotment(D), []
    for edit in range(12):
        directions = allotment.next(R)
        assert len(directions) == D - R * (edit % (D // R))
        assert orthonormality_error(directions) < 1e-10
        found.append((random_orthonormal(R, len(directions)).double() @ directions).float())
        allotment.add(found[-1])
    for first in range(0, 12, D // R):
        assert orthonormality_error(torch.cat(found[first : first + D // R])) < 1e-5


def test_where_fewer_than_the_rank_are_left_the_least_used_are_taken():
    allotment = Allotment(D)
    for _ in range(3):
        allotment.add(torch.eye(D)[:10])
    allotment.add(torch.eye(D)[10:30])
    directions = allotment.next(R)  # 30 and 31 are free, 10 to 29 carry one edit, 0 to 9 three
    assert len(directions) == 22
    assert directions[:, :10].abs().max() < 1e-6
    directions = allotment.next(23)
    assert len(directions) == D


def test_what_goes_leaves_no_trace():
    torch.manual_seed(0)
    several = [random_orthonormal(R, D) for _ in range(40)]
    grown, without = Allotment(D, several), Allotment(D, reversed(several[20:]))
    assert not torch.equal(grown.load, without.load)
    for basis in several[:20]:
        grown.remove(basis)
    assert torch.equal(grown.load, without.load)


# ------------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize("init", ["identity", "random"])
def test_a_map_stays_within_its_directions_whatever_trains_it(init: Any):
    torch.manual_seed(0)
    module = BasisWeightedMap(D, R, weighting="constant", init=init)
    h, directions = torch.randn(5, D), random_orthonormal(6, D)
    assert (module(h) - h).abs().max() < 1e-6 or init == "random"
    before = module.rotation.detach().clone()
    module.allot(directions)
    assert not torch.allclose(module.rotation, before, atol=1e-2)
    assert (module(h) - h).abs().max() < 1e-6 or init == "random"
    optimiser = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(5):
        optimiser.zero_grad()
        (module(h) - 1.0).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            module.basis.add_(0.1 * torch.randn(R, D))  # an optimiser that knows nothing of it
    outside = torch.eye(D) - directions.mT @ directions
    assert (module.basis @ outside).abs().max() > 0.1
    for rotation in (module.rotation, module.rotation.detach()):
        assert (rotation @ outside).abs().max() < 1e-6
        assert orthonormality_error(rotation) < 1e-6


@pytest.mark.parametrize("shape", [(R - 1, D), (R, D + 1), (D,)])
def test_directions_that_do_not_fit_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"they must be \(n, 32\), n >= 4"):
        BasisWeightedMap(D, R, weighting="constant").allot(torch.zeros(shape))


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="bases is 'new'; it must be one of free, orthogonal"):
        BaftConfig(bases="new")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ the editor


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": "reference"},
        {"weighting": "linear", "layers": (1, 3), "weight_decay": 0.1},
        {"weighting": "constant", "allocation": "joint", "init": "identity"},
    ],
    ids=["default", "reference", "summed, two layers", "joint"],
)
def test_edits_are_orthonormal_to_earlier_ones_while_the_dimension_lasts(changes: dict[str, Any]):
    editor, free = orthogonal(**changes), tiny_editor(tiny_model(), tiny_tokenizer(), **{"steps": 4, **changes})
    for each in (editor, free):
        each.edit(REQUESTS[0])
        for request in REQUESTS[1:8] if "allocation" in changes else [REQUESTS[1:8]]:
            each.edit(request)
        each.edit(REQUESTS[8])
    for layer in editor.adapter.layers:
        found = bases(editor, layer)
        assert found.shape == (9 * R, D)
        assert orthonormality_error(found[: 8 * R]) < 1e-5
        assert orthonormality_error(found[8 * R :]) < 1e-5
        assert orthonormality_error(bases(free, layer)[: 8 * R]) > 0.1


def test_the_first_edit_has_all_directions():
    editor, free = orthogonal(), tiny_editor(tiny_model(), tiny_tokenizer(), steps=4)
    for each in (editor, free):
        each.edit(FRANCE)
    for name, tensor in free.edits[0].tensors[editor.adapter.layers[0]].items():
        assert torch.allclose(tensor, editor.edits[0].tensors[editor.adapter.layers[0]][name], atol=1e-4), name


@pytest.mark.parametrize("layers", [(2,), (1, 3)])
def test_the_fast_engine_trains_within_the_directions_as_the_reference_does(layers: tuple[int, ...]):
    fast, plain = (
        orthogonal(engine=engine, layers=layers, weighting="linear", steps=10, learning_rate=0.02)
        for engine in ("auto", "reference")
    )
    for each in (fast, plain):
        each.edit(REQUESTS[:4])
    for one, other in zip(fast.edits, plain.edits, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-6)
        for layer in layers:
            for name, tensor in other.tensors[layer].items():
                assert torch.allclose(one.tensors[layer][name], tensor, atol=1e-3), name


def test_a_batch_is_a_stream():
    together, alone = orthogonal(), orthogonal()
    together.edit([FRANCE, LEO, TOWER])
    for request in (FRANCE, LEO, TOWER):
        alone.edit(request)
    assert adapter_bytes(together) == adapter_bytes(alone)


def test_undo_frees_the_directions_and_leaves_no_trace():
    editor, never = orthogonal(), orthogonal()
    layer = editor.adapter.layers[0]
    for each in (editor, never):
        each.edit(FRANCE)
    editor.edit(TOWER)
    editor.undo("tower")
    for each in (editor, never):
        each.edit(REQUESTS[1:8])  # with France's the dimension is full
    assert adapter_bytes(editor) == adapter_bytes(never)
    assert orthonormality_error(bases(editor, layer)) < 1e-5
    editor.undo("Rome")
    gone = next(edit for edit in never.edits if edit.id == "Rome").tensors[layer]["rotation"]
    editor.edit(TOWER)  # it gets Rome's directions: no others are free
    assert orthonormality_error(bases(editor, layer)) < 1e-5
    found = editor.edits[-1].tensors[layer]["rotation"]
    assert torch.allclose(torch.linalg.svdvals(found @ gone.mT), torch.ones(R), atol=1e-5)


def test_a_failing_call_takes_no_directions(monkeypatch: pytest.MonkeyPatch):
    editor, never = orthogonal(weighting="constant"), orthogonal(weighting="constant")
    for each in (editor, never):
        each.edit(FRANCE)
    commit = editor._commit

    def fail(edit: Any, gone: Any) -> None:
        commit(edit, gone)
        if edit.id == "leo":
            raise RuntimeError("no more")

    monkeypatch.setattr(editor, "_commit", fail)
    with pytest.raises(RuntimeError, match="no more"):
        editor.edit([TOWER, LEO])
    monkeypatch.undo()
    for each in (editor, never):
        each.edit(LEO)
    assert adapter_bytes(editor) == adapter_bytes(never)


def test_an_adapter_that_was_loaded_goes_on_as_one_that_was_not(tmp_path: Any):
    editor = orthogonal()
    editor.edit([FRANCE, LEO])
    editor.save_pretrained(tmp_path / "a")
    loaded = orthogonal()
    loaded.load_adapter(tmp_path / "a")
    for each in (editor, loaded):
        each.edit(TOWER)
    assert adapter_bytes(loaded) == adapter_bytes(editor)


def test_edits_with_bases_of_their_own_choice_are_kept_clear_of():
    editor = tiny_editor(tiny_model(), tiny_tokenizer(), steps=4)
    editor.edit([FRANCE, LEO])
    editor.config = dataclasses.replace(editor.config, bases="orthogonal")
    editor.edit(TOWER)
    one, other, new = (edit.tensors[editor.adapter.layers[0]]["rotation"] for edit in editor.edits)
    assert (one @ other.mT).abs().max() > 0.05
    assert (torch.cat([one, other]) @ new.mT).abs().max() < 1e-5


def test_loads_are_counted_once_however_many_edits_there_are(monkeypatch: pytest.MonkeyPatch):
    counted, original = [], allotment_module._own_load
    monkeypatch.setattr(allotment_module, "_own_load", lambda basis: counted.append(1) or original(basis))
    editor = orthogonal(steps=1)
    for edits, request in enumerate(REQUESTS[:6], 1):
        editor.edit(request)
        assert len(counted) == edits
    editor.undo(REQUESTS[0].id)
    assert len(counted) == 7
