"""What the hooks know of a running call: padding, cached tokens, repeated rows, and who else is on the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baft_intervention.core.positions import IdSequences, PositionRule
from baft_intervention.errors import PositionError
from baft_intervention.models.structure import block_owner
from baft_intervention.runtime.call_state import CallTracker, hook_block
from edits import hooks


class _Tracked:
    """A tiny model whose first block tells which positions a rule finds in each call."""

    def __init__(self, model, rule: str, subjects=()):
        self.model, self.rule, self.subjects = model, PositionRule.parse(rule), IdSequences(subjects)
        self.tracker = CallTracker(model, block_owner(model))
        self.tracker.attach()
        self.seen: list[list[tuple[int, int]]] = []
        hook_block(model.model.layers[0], self._look)

    def _look(self, hidden):
        found = self.tracker.current(*hidden.shape[:2]).positions(self.rule, self.subjects, *hidden.shape[:2])
        self.seen.append([] if found is None else list(zip(found[0].tolist(), found[1].tolist(), strict=True)))

    def call(self, ids, mask=None, **kwargs) -> list[tuple[int, int]]:
        mask = None if mask is None else torch.tensor(mask)
        with torch.no_grad():
            self.output = self.model(input_ids=torch.tensor(ids), attention_mask=mask, **kwargs)
        return self.seen[-1]


RIGHT = ([[5, 6, 7, 8], [5, 6, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT = ([[5, 6, 7, 8], [0, 0, 5, 6]], [[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("rule", "right", "left"),
    [
        ("last", [(0, 3), (1, 1)], [(0, 3), (1, 3)]),
        ("prompt", [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]),
        ("all", [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]),
        ("f1+l1", [(0, 0), (0, 3), (1, 0), (1, 1)], [(0, 0), (0, 3), (1, 2), (1, 3)]),
        ("subject", [(0, 1), (1, 1)], [(0, 1), (1, 3)]),
        ("subject_all", [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 2), (1, 3)]),
    ],
)
def test_positions_of_padded_batches(tiny_llama, rule, right, left):
    tracked = _Tracked(tiny_llama, rule, subjects=[[5, 6]])
    assert tracked.call(*RIGHT) == right
    assert tracked.call(*LEFT) == left


def test_a_decoding_step_is_not_a_prompt_but_is_part_of_all(tiny_llama):
    for rule, first, second in (("last", [(0, 2)], []), ("all", [(0, 0), (0, 1), (0, 2)], [(0, 0)])):
        tracked = _Tracked(tiny_llama, rule)
        assert tracked.call([[5, 6, 7]], [[1, 1, 1]], use_cache=True) == first
        assert tracked.call([[8]], [[1, 1, 1, 1]], past_key_values=tracked.output.past_key_values) == second


def test_a_known_prompt_length_holds_without_a_cache_and_in_chunks(tiny_llama):
    tracked = _Tracked(tiny_llama, "last")
    with tracked.tracker.prompts([3]):
        assert tracked.call([[5, 6, 7, 8, 9]], use_cache=False) == [(0, 2)]  # prompt and answer together
        assert tracked.call([[5, 6]], use_cache=True) == []  # the prompt in two chunks: its last token comes later
        assert tracked.call([[7, 8]], past_key_values=tracked.output.past_key_values) == [(0, 0)]
    assert tracked.call([[5, 6, 7, 8, 9]], use_cache=False) == [(0, 4)]  # outside, a call is all prompt


def test_arguments_may_be_given_by_position(tiny_llama):
    tracked = _Tracked(tiny_llama, "last")
    with torch.no_grad():
        tiny_llama(torch.tensor(LEFT[0]), torch.tensor(LEFT[1]))
    assert tracked.seen[-1] == [(0, 3), (1, 3)]
    with torch.no_grad():
        tiny_llama(torch.tensor(RIGHT[0]), torch.tensor(RIGHT[1]))
    assert tracked.seen[-1] == [(0, 3), (1, 1)]


@pytest.mark.parametrize("kind", ["bool", "float", "dict"])
@pytest.mark.parametrize(("side", "expected"), [(RIGHT, [(0, 3), (1, 1)]), (LEFT, [(0, 3), (1, 3)])])
def test_padding_is_read_from_the_masks_of_a_fixed_size_cache(tiny_llama, kind, side, expected):
    """``(B, 1, T, K)`` with K the cache's whole size, as ``generate`` makes it."""
    tracked = _Tracked(tiny_llama, "last")
    kept = torch.tensor(side[1], dtype=torch.bool)
    seen = torch.zeros(2, 1, 4, 9, dtype=torch.bool)
    seen[..., :4] = kept[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    mask = seen if kind != "float" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    call = {"input_ids": torch.tensor(side[0]), "attention_mask": {"full_attention": mask} if kind == "dict" else mask}
    tracked.tracker._enter(block_owner(tiny_llama), (), call)
    found = tracked.tracker.current(2, 4).positions(tracked.rule, None, 2, 4)
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected


def test_beams_repeat_the_length_of_their_prompt(tiny_llama):
    tracked = _Tracked(tiny_llama, "last")
    rows = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 7, 9]]
    with tracked.tracker.prompts([2, 3]):
        assert tracked.call(rows, use_cache=False) == [(0, 1), (1, 1), (2, 2), (3, 2)]


def test_lengths_that_do_not_fit_the_rows_are_an_error_that_says_so(tiny_llama):
    tracked = _Tracked(tiny_llama, "last")
    with tracked.tracker.prompts([2, 3]), pytest.raises(PositionError, match="2 lengths.*3 rows"):
        tracked.call([[5, 6, 7]] * 3)


def test_a_failing_call_leaves_no_call_behind(tiny_llama):
    tracked = _Tracked(tiny_llama, "last")

    def fail(*_):
        raise RuntimeError("from a user's hook")

    handle = tiny_llama.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from a user"):
        tracked.call(*LEFT)
    handle.remove()
    assert tracked.tracker._state.calls == []
    assert tracked.call([[5, 6]]) == [(0, 1)]


def test_detach_takes_off_what_attach_put_on_and_nothing_else(tiny_llama):
    own = tiny_llama.register_forward_pre_hook(lambda *_: None)
    before = hooks(tiny_llama)
    tracker = CallTracker(tiny_llama, block_owner(tiny_llama))
    tracker.attach()
    tracker.attach()  # twice is once
    assert hooks(tiny_llama) == {"": before[""] + 2, "model": 2}
    tracker.detach()
    assert hooks(tiny_llama) == before
    own.remove()


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_a_block_may_give_a_tensor_or_a_tuple(kind):
    class Block(nn.Module):
        def forward(self, x):
            return x if kind == "tensor" else (x, "attention", None)

    block = Block()
    hook_block(block, lambda h: h + 1)
    output = block(torch.zeros(1, 2, 3))
    if kind == "tuple":
        assert output[1:] == ("attention", None)
        output = output[0]
    assert torch.equal(output, torch.ones(1, 2, 3))


def test_a_change_of_none_gives_the_very_same_output():
    block = nn.Identity()
    hook_block(block, lambda h: None)
    x = torch.randn(1, 2, 3)
    assert block(x) is x
