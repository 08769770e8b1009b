"""Edits on a running model: padding, dtype, who else has hooks, and what an adapter refuses."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from baft_intervention.config import BaftConfig
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, ConfigError
from baft_intervention.models.tokenization import encode_prompt, pad_rows
from baft_intervention.runtime.call_state import hook_block
from edits import BANK, FACTS, FRANCE, LEO, PROMPTS, digest, hooks, logits, next_word, tiny_editor

RULES = ("last", "prompt", "all", "f2+l1", "subject", "subject_all")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_prompt_what_it_has_alone(tiny_llama, tokenizer, rule, side):
    editor = tiny_editor(tiny_llama, tokenizer, positions=rule, weighting="constant", layers=(1,))
    editor.edit([FRANCE, LEO])
    rows = [encode_prompt(tokenizer, p) for p in PROMPTS]
    assert len({len(row) for row in rows}) > 2
    ids, mask = pad_rows(rows, tokenizer.pad_token_id, side)
    with torch.no_grad():
        batch = tiny_llama(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    moved = 0
    for i, prompt in enumerate(PROMPTS):
        alone = logits(tiny_llama, tokenizer, prompt)
        last = -1 if side == "left" else len(rows[i]) - 1
        torch.testing.assert_close(batch[i, last], alone, atol=1e-4, rtol=1e-4)
        with editor.enabled(False):
            moved += not torch.allclose(alone, logits(tiny_llama, tokenizer, prompt), atol=1e-3)
    assert moved >= 2  # the comparison is about something: the edits act on these prompts


def test_an_edit_acts_in_a_plain_call_of_the_model(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    before = next_word(tiny_llama, tokenizer, FRANCE.prompt)
    assert before != FRANCE.target_new
    editor.edit(FRANCE)
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new


def test_the_answer_is_not_edited_where_prompt_and_answer_are_fed_together(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    prompt, answer = encode_prompt(tokenizer, FRANCE.prompt), encode_prompt(tokenizer, " Japan city")
    seen = {}

    def look(_module, _args, output):
        seen["hidden"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    handle = editor.adapter.blocks[editor.adapter.layers[0]].register_forward_hook(look)  # behind the editor's own
    call = {"input_ids": torch.tensor([prompt + answer])}
    with torch.no_grad(), editor.adapter.prompts([len(prompt)]):
        tiny_llama(**call)
        edited = seen["hidden"]
        with editor.enabled(False):
            tiny_llama(**call)
    handle.remove()
    changed = (edited != seen["hidden"]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [len(prompt) - 1]


def test_detach_gives_back_the_model_bit_for_bit_and_attach_the_edits(tiny_llama, tokenizer):
    weights, clean = digest(tiny_llama), [logits(tiny_llama, tokenizer, p) for p in PROMPTS]
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    edited = [logits(tiny_llama, tokenizer, p) for p in PROMPTS]
    assert not torch.equal(edited[0], clean[0])
    editor.detach()
    assert hooks(tiny_llama) == {}
    assert not editor.adapter.attached
    assert all(torch.equal(a, logits(tiny_llama, tokenizer, p)) for a, p in zip(clean, PROMPTS, strict=True))
    editor.attach()
    editor.attach()  # twice is once
    assert all(torch.equal(a, logits(tiny_llama, tokenizer, p)) for a, p in zip(edited, PROMPTS, strict=True))
    assert digest(tiny_llama) == weights


def test_enabled_false_is_the_unedited_model_and_comes_back_after_an_error(tiny_llama, tokenizer):
    clean = logits(tiny_llama, tokenizer, FRANCE.prompt)
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    edited = logits(tiny_llama, tokenizer, FRANCE.prompt)
    with editor.enabled(False):
        assert torch.equal(logits(tiny_llama, tokenizer, FRANCE.prompt), clean)
        with editor.enabled(True):
            assert torch.equal(logits(tiny_llama, tokenizer, FRANCE.prompt), edited)
        assert torch.equal(logits(tiny_llama, tokenizer, FRANCE.prompt), clean)
    with pytest.raises(KeyError), editor.enabled(False):
        raise KeyError
    assert torch.equal(logits(tiny_llama, tokenizer, FRANCE.prompt), edited)


@pytest.mark.parametrize("first_off", [0, 1])
def test_two_editors_and_a_users_hook_live_on_one_model(tiny_llama, tokenizer, first_off):
    calls = []
    own = tiny_llama.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    clean = {p: next_word(tiny_llama, tokenizer, p) for p in PROMPTS}
    editors = [tiny_editor(tiny_llama, tokenizer), tiny_editor(tiny_llama, tokenizer, layers=(2,))]
    for editor, fact in zip(editors, (FRANCE, LEO), strict=True):
        editor.edit(fact)
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == LEO.target_new
    editors[first_off].detach()
    off, on = (FRANCE, LEO) if first_off == 0 else (LEO, FRANCE)
    assert next_word(tiny_llama, tokenizer, off.prompt) == clean[off.prompt]
    assert next_word(tiny_llama, tokenizer, on.prompt) == on.target_new
    editors[1 - first_off].detach()
    calls.clear()
    assert {p: next_word(tiny_llama, tokenizer, p) for p in PROMPTS} == clean
    assert len(calls) == len(PROMPTS)  # the user's hook was never taken off
    assert hooks(tiny_llama) == {"model.layers.3": 1}
    own.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_dtype_and_takes_the_edit(tiny_llama, tokenizer, dtype):
    model = tiny_llama.to(dtype)
    editor = tiny_editor(model, tokenizer)
    report = editor.edit(FRANCE)
    seen = []  # of the block, not of the logits: 4.45.1 makes those float32
    handle = hook_block(editor.adapter.blocks[-1], lambda hidden: seen.append(hidden.dtype))
    logits(model, tokenizer, FRANCE.prompt)
    handle.remove()
    assert seen == [dtype]
    assert next_word(model, tokenizer, FRANCE.prompt) == FRANCE.target_new
    assert {t.dtype for tensors in report.edits[0].tensors.values() for t in tensors.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (7,)}, "layers has 7; this model has blocks 0 to 3"),
        ({"layers": (-5,)}, "layers has -5"),
        ({"layers": (1, -3)}, "a block occurs twice"),
        ({"rank": 33}, "rank is 33, but the model's hidden size is 32"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_is_touched(tiny_llama, tokenizer, change, message):
    with pytest.raises((ConfigError, AdapterError), match=message):
        tiny_editor(tiny_llama, tokenizer, **change)
    assert hooks(tiny_llama) == {}


def test_two_edits_of_one_name_are_refused_and_the_old_list_stays(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    edit = editor.edit(FRANCE).edits[0]
    with pytest.raises(AdapterError, match="two edits are called 'france'"):
        editor.adapter.set_edits([edit, edit])
    assert editor.edits == (edit,)


def test_several_layers_at_once(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, layers=(1, -1))
    assert editor.adapter.layers == (1, 3)
    editor.edit([FRANCE, LEO])
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new
    assert sorted(editor.edits[0].tensors) == [1, 3]


def test_num_stored_counts_what_is_stored_for_the_edits(tiny_llama, tokenizer):
    editor = BaftEditor(tiny_llama, tokenizer, BaftConfig(rank=4, weighting="constant"), bank_texts=BANK)
    assert editor.adapter.num_stored() == 0
    editor.edit([FRANCE, LEO])
    per_edit = 4 * 32 + 4 * 32 + 4 + 4  # rotation, source weight, source bias, the constant weights
    assert editor.adapter.num_stored() == 2 * per_edit


def test_adding_and_taking_out_changes_the_stack_that_is_there_and_gives_what_a_new_one_gives(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    stack = editor.adapter.stack(editor.adapter.layers[0], torch.device("cpu"))
    editor.edit(LEO)
    editor.edit(FACTS[2])
    editor.undo("leo")
    assert editor.adapter.stack(editor.adapter.layers[0], torch.device("cpu")) is stack
    assert len(stack) == 2
    grown = [logits(tiny_llama, tokenizer, prompt) for prompt in PROMPTS]
    editor.adapter.set_edits(editor.edits)  # built anew
    assert editor.adapter.stack(editor.adapter.layers[0], torch.device("cpu")) is not stack
    for prompt, before in zip(PROMPTS, grown, strict=True):
        assert torch.equal(logits(tiny_llama, tokenizer, prompt), before)


def test_edits_are_found_by_id_and_by_prompt(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    adapter = editor.adapter
    assert len(adapter) == 3
    assert adapter.find("leo") is editor.edits[1]
    assert adapter.find("paris") is None
    assert [e.id for e in adapter.asking([FACTS[2].prompt, "Who?", FRANCE.prompt])] == ["tower", "france"]
    adapter.remove("tower")
    assert adapter.asking([FACTS[2].prompt]) == []
    with pytest.raises(AdapterError, match="there is no edit 'tower'"):
        adapter.remove("tower")


def test_the_use_of_bases_is_the_sum_over_the_edits_that_are_there(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    layer = editor.adapter.layers[0]
    assert editor.adapter.used()[layer].tolist() == [0.0] * 4
    for fact in FACTS:
        editor.edit(fact)
    editor.undo("leo")
    editor.edit(LEO)
    expected = sum(edit.used[layer] for edit in editor.edits)
    assert torch.equal(editor.adapter.used()[layer], expected)
    assert expected.min() > 0


@pytest.mark.parametrize("weighting", ["constant", "linear", "cosine", "fact"])
def test_stored_bytes_are_those_of_the_state(tiny_llama, tokenizer, weighting):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, layers=(1, 2), steps=1)
    assert editor.adapter.stored_bytes() == 0
    editor.edit([FRANCE, LEO])
    state = editor.adapter.state()
    assert editor.adapter.stored_bytes() == sum(t.numel() * t.element_size() for t in state.values())


def test_a_long_text_is_encoded_in_pieces_with_the_same_result(tiny_llama, tokenizer, monkeypatch):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    whole = [logits(tiny_llama, tokenizer, prompt) for prompt in PROMPTS]
    monkeypatch.setattr("baft_intervention.runtime.causal_gate._AT_ONCE", 2)
    for prompt, before in zip(PROMPTS, whole, strict=True):
        torch.testing.assert_close(logits(tiny_llama, tokenizer, prompt), before, atol=1e-5, rtol=1e-5)


def test_threads_on_one_model_get_what_each_gets_alone(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    alone = {prompt: logits(tiny_llama, tokenizer, prompt) for prompt in PROMPTS}
    with editor.enabled(False):
        unedited = {prompt: logits(tiny_llama, tokenizer, prompt) for prompt in PROMPTS}
    assert any(not torch.equal(alone[prompt], unedited[prompt]) for prompt in PROMPTS)

    def work(number: int) -> float:
        worst = 0.0
        for i in range(200):
            prompt = PROMPTS[(i + number) % len(PROMPTS)]
            if number % 2:  # half of the threads switch the edits off for themselves
                found, expected = logits(tiny_llama, tokenizer, prompt), alone[prompt]
            else:
                with editor.enabled(False):
                    found, expected = logits(tiny_llama, tokenizer, prompt), unedited[prompt]
            worst = max(worst, float((found - expected).abs().max()))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-4


def test_a_call_inside_a_call_gets_its_own_prompt(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    expected = [logits(tiny_llama, tokenizer, prompt) for prompt in (FRANCE.prompt, LEO.prompt)]
    inner: list[torch.Tensor] = []

    def ask(*_: object) -> None:  # a user's hook that calls the model itself
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = logits(tiny_llama, tokenizer, LEO.prompt)

    handle = tiny_llama.model.layers[0].register_forward_hook(ask)
    outer = logits(tiny_llama, tokenizer, FRANCE.prompt)
    handle.remove()
    torch.testing.assert_close(outer, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inner[0], expected[1], atol=1e-5, rtol=1e-5)


def test_a_model_with_edits_can_be_copied(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    assert next_word(copy.deepcopy(tiny_llama), tokenizer, FRANCE.prompt) == next_word(
        tiny_llama, tokenizer, FRANCE.prompt
    )
