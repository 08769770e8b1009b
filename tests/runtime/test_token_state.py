"""What is kept beside a KV cache: it is cut, selected, repeated and copied as the cache is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from baft_intervention.runtime.token_state import PADDING, TokenState, keep_state, state_of


def state() -> TokenState:
    ids = torch.tensor([[1, 2, 3, 4], [PADDING, 5, 6, 7]])
    return TokenState(ids, {"memory": torch.arange(16.0).view(2, 4, 2)}, [[(1, "a"), (3, "b")], [(2, "c")]])


def cache() -> DynamicCache:
    made = DynamicCache()
    for layer in range(2):
        made.update(torch.rand(2, 1, 4, 3), torch.rand(2, 1, 4, 3), layer)
    return made


def same(one: TokenState, other: TokenState) -> bool:
    return (
        torch.equal(one.ids, other.ids)
        and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
        and one.fires == other.fires
    )


def test_a_cut_state_has_the_first_columns():
    cut = state().cut(3)
    assert cut.width == 3
    assert torch.equal(cut.ids, state().ids[:, :3])
    assert torch.equal(cut.tensors["memory"], state().tensors["memory"][:, :3])
    assert cut.fires == [[(1, "a")], [(2, "c")]]
    whole = state()
    assert whole.cut(4) is whole


def test_a_state_is_continued():
    new = TokenState(torch.tensor([[8], [9]]), {"memory": torch.ones(2, 1, 2)}, [[(1, "a"), (3, "b"), (4, "a")], []])
    joined = state().joined(new)
    assert joined.ids.tolist() == [[1, 2, 3, 4, 8], [PADDING, 5, 6, 7, 9]]
    assert joined.tensors["memory"].shape == (2, 5, 2)
    assert joined.fires == new.fires


def test_rows_are_selected_and_repeated():
    own = state()
    own.select(torch.tensor([1, 1, 0]))
    assert own.ids[:, 1].tolist() == [5, 5, 2]
    assert own.fires == [[(2, "c")], [(2, "c")], [(1, "a"), (3, "b")]]
    own.fires[0].append((3, "d"))
    assert own.fires[1] == [(2, "c")]  # rows share nothing
    own = state()
    own.repeat(2)
    assert own.ids[:, 1].tolist() == [2, 2, 5, 5]
    assert own.tensors["memory"][:, 0, 0].tolist() == [0.0, 0.0, 8.0, 8.0]


@pytest.mark.parametrize("move", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_the_caches_methods_move_its_states(move):
    made = cache()
    if not hasattr(made, move):
        pytest.skip(f"this version's cache has no {move}")
    keep_state(made, "one", state())
    keep_state(made, "two", state().cut(4))
    expected = state()
    if move == "batch_repeat_interleave":
        made.batch_repeat_interleave(3)
        expected.repeat(3)
    else:
        getattr(made, move)(torch.tensor([1, 0]))
        expected.select(torch.tensor([1, 0]))
    assert isinstance(made, DynamicCache)
    assert same(state_of(made, "one"), expected)
    assert same(state_of(made, "two"), expected)
    assert state_of(made, "three") is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copied_cache_has_its_own_state(duplicate):
    made = cache()
    keep_state(made, "one", state())
    other = duplicate(made)
    assert type(other) is type(made)
    assert other.get_seq_length() == 4
    assert same(state_of(other, "one"), state())
    if duplicate is not copy.copy:  # a shallow copy shares what it holds
        state_of(other, "one").select(torch.tensor([1]))
        assert same(state_of(made, "one"), state())


def test_a_cache_without_a_state_holds_nothing_and_the_legacy_form_holds_one():
    assert state_of(cache(), "one") is None
    assert state_of(None, "one") is None
    legacy = ((torch.zeros(1), torch.zeros(1)),)
    kept = state()
    keep_state(legacy, "one", kept)
    assert state_of(legacy, "one") is kept
