"""Editing and taking back: what changes, what must not, and that nothing changes where something fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from baft_intervention.core.positions import prompt_positions
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, BaftError, ConfigError, EditError, PositionError, RequestError
from baft_intervention.models.tokenization import encode_prompt
from baft_intervention.requests import EditRequest
from baft_intervention.runtime.call_state import hook_block
from baft_intervention.training.encoding import encode_request
from edits import (
    BANK,
    FACTS,
    FRANCE,
    LEO,
    PROMPTS,
    TOWER,
    adapter_bytes,
    config,
    digest,
    hooks,
    logits,
    next_word,
    tiny_editor,
    unchanged,
)  # fmt: skip
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def editor(tiny_llama, tokenizer) -> BaftEditor:
    return tiny_editor(tiny_llama, tokenizer)


# ------------------------------------------------------------------------------------------ editing


def test_edits_are_answered_and_what_is_far_from_them_stays_bit_for_bit(editor):
    model, tokenizer = editor.model, editor.tokenizer
    before = logits(model, tokenizer, "He was")
    report = editor.edit(FACTS)
    assert [edit.id for edit in report.edits] == ["france", "leo", "tower"]
    assert all(edit.reached and 0 < edit.steps <= 40 for edit in report.edits)
    assert [next_word(model, tokenizer, fact.prompt) for fact in FACTS] == [fact.target_new for fact in FACTS]
    assert torch.equal(logits(model, tokenizer, "He was"), before)
    assert report.to_dict()["edits"][0]["requests"][0]["prompt"] == FRANCE.prompt


@pytest.mark.parametrize("weighting", ["constant", "linear", "mlp", "cosine"])
def test_every_weighting_network_edits_and_keeps_several_edits_apart_enough(tiny_llama, tokenizer, weighting):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, locality_coefficient=0.1)
    editor.edit(FRANCE)
    editor.edit(LEO)
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == LEO.target_new
    if weighting == "cosine":  # the others add up: the second may cost the first
        assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new


def test_an_ending_is_trained_behind_the_target_and_is_not_of_it(tiny_llama, tokenizer):
    plain, ended = (encode_request(tokenizer, FRANCE, config(ending=ending)) for ending in ("", "?"))
    (end,) = tokenizer("?", add_special_tokens=False)["input_ids"]
    assert ended.ids == [*plain.ids, end]
    assert ended.labels[-1] == end
    assert (plain.ending, ended.ending) == (0, 1)
    n = plain.prompt_length
    assert plain.positions == [n - 1]  # the default gate: where the answer begins, and on its own tokens
    assert ended.positions == [n - 1, n]
    at_last = config(ending="?", weighting="linear")
    assert encode_request(tokenizer, FRANCE, at_last).positions == plain.positions
    stopped = dataclasses.replace(FRANCE, target_new="Japan.")
    assert encode_request(tokenizer, stopped, config(ending="?")).ending == 0  # it ends already
    eos = encode_request(tokenizer, FRANCE, config(ending="?", append_eos=True))
    assert eos.ids == [*plain.ids, tokenizer.eos_token_id]
    for row, last in ((plain, 1.0), (ended, 0.3), (eos, 0.3)):
        n = len(plain.ids) - row.prompt_length
        share, own = row.token_weights()
        assert own == [1 / n] * n + [0.0] * row.ending
        assert share == [1 / n] * n + [last] * row.ending
    # attention carries little in a random model: edit each token, the target's too
    editor = tiny_editor(tiny_llama, tokenizer, ending="?", weighting="constant", positions="all", rank=12, steps=200)
    done = editor.edit(FRANCE)
    assert done.edits[0].reached
    assert editor.generate(FRANCE.prompt, max_new_tokens=2).strip() == "Japan?"


JOINT = {"allocation": "joint", "loss_target": 0.05}


@pytest.mark.parametrize(
    "changes",
    [{}, JOINT],
    ids=["alone", "joint"],
)
def test_the_output_loss_keeps_what_is_said_elsewhere(tiny_llama, tokenizer, changes):
    texts = BANK[:4]

    def moved(coefficient):
        """Mean KL at the texts' ends, nats, after an edit that nothing else holds back."""
        editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", output_coefficient=coefficient, **changes)
        before = [logits(tiny_llama, tokenizer, text).log_softmax(-1) for text in texts]
        editor.edit([FRANCE, LEO] if changes else FRANCE)
        after = [logits(tiny_llama, tokenizer, text).log_softmax(-1) for text in texts]
        asked = LEO if changes else FRANCE
        assert next_word(tiny_llama, tokenizer, asked.prompt) == asked.target_new
        editor.detach()
        return sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)) / len(texts)

    assert moved(1.0) < 0.5 * moved(0.0)


@pytest.mark.parametrize("rule", ["last", "subject", "subject_all", "prompt", "all", "f1+l2"])
def test_every_position_rule_edits(tiny_llama, tokenizer, rule):
    # attention carries little in a random model: a subject's token reaches the answer from several layers
    changes = {"weighting": "constant", "layers": (0, 1, 2), "rank": 12, "steps": 100, "learning_rate": 0.1}
    editor = tiny_editor(tiny_llama, tokenizer, positions=rule, **changes)
    editor.edit(FRANCE)
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new


def test_training_leaves_the_model_and_its_flags_alone(editor):
    model = editor.model
    model.train()
    model.model.layers[1].eval()
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 == 0)
    weights, modes = digest(model), [m.training for m in model.modules()]
    editor.edit(FACTS)
    editor.undo("leo")
    assert digest(model) == weights
    assert [p.requires_grad for p in parameters] == [i % 3 == 0 for i in range(len(parameters))]
    assert [p.grad for p in parameters] == [None] * len(parameters)
    assert model.training
    assert [m.training for m in model.modules()] == modes
    editor.detach()
    assert digest(model) == weights
    assert hooks(model) == {}


def test_the_users_random_state_is_not_touched(editor):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    editor.edit(FRANCE)
    assert torch.equal(torch.rand(4), expected)


def test_a_later_edit_of_a_prompt_supersedes_the_earlier(editor):
    editor.edit([FRANCE, LEO])
    again = dataclasses.replace(FRANCE, target_new="city", id="france again")
    report = editor.edit(again)
    assert report.replaced == ("france",)
    assert [edit.id for edit in editor.edits] == ["leo", "france again"]
    assert next_word(editor.model, editor.tokenizer, FRANCE.prompt) == "city"
    editor.undo("france again")
    assert next_word(editor.model, editor.tokenizer, FRANCE.prompt) not in ("city", FRANCE.target_new)


def test_the_same_edit_again_gives_the_same_bytes(editor):
    editor.edit(FRANCE)
    before = adapter_bytes(editor)
    assert editor.edit(FRANCE).replaced == ("france",)
    assert adapter_bytes(editor) == before


def test_a_joint_edit_is_one_set_of_bases_and_is_undone_as_a_whole(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, allocation="joint", weighting="constant", rank=12, steps=80)
    clean = [logits(tiny_llama, tokenizer, p) for p in PROMPTS]
    report = editor.edit([FRANCE, LEO])
    assert len(report.edits) == 1
    assert report.edits[0].requests == (FRANCE, LEO)
    assert next_word(tiny_llama, tokenizer, FRANCE.prompt) == FRANCE.target_new
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == LEO.target_new
    with pytest.raises(EditError, match="'leo' was trained jointly in edit 'france'; undo that one as a whole"):
        editor.undo("leo")
    editor.undo("france")
    assert all(torch.equal(a, logits(tiny_llama, tokenizer, p)) for a, p in zip(clean, PROMPTS, strict=True))


# ------------------------------------------------------------------------------------------ undo


@pytest.mark.parametrize("taken", ["france", "leo", "tower"])
def test_undo_gives_the_adapter_that_never_had_the_edit(taken):
    one, other = (tiny_editor(tiny_model("llama"), tiny_tokenizer()) for _ in range(2))
    for fact in FACTS:
        one.edit(fact)
        if fact.id != taken:
            other.edit(fact)
    assert one.undo(taken).id == taken
    assert adapter_bytes(one) == adapter_bytes(other)
    for prompt in PROMPTS:
        assert torch.equal(logits(one.model, one.tokenizer, prompt), logits(other.model, other.tokenizer, prompt))


def test_undoing_everything_gives_the_unedited_answers_bit_for_bit(editor):
    clean = [logits(editor.model, editor.tokenizer, p) for p in PROMPTS]
    editor.edit(FACTS)
    for name in ("leo", "france", "tower"):
        editor.undo(name)
    assert editor.edits == ()
    assert all(torch.equal(a, logits(editor.model, editor.tokenizer, p)) for a, p in zip(clean, PROMPTS, strict=True))


def test_undoing_what_is_not_there_names_what_is(editor):
    editor.edit([FRANCE, LEO])
    with unchanged(editor), pytest.raises(EditError, match="there is no edit 'paris'; edits: france, leo"):
        editor.undo("paris")


# ------------------------------------------------------------------------------------------ what fails


def _poison(editor: BaftEditor) -> None:
    with torch.no_grad():
        editor.model.lm_head.weight[7, 3] = float("nan")


NOWHERE = EditRequest("The capital of France is", "city", subject="Japan", origin="edits.json:3")
TWICE = EditRequest("Leo and Leo speak", "city", subject="Leo")
NAMELESS = EditRequest("The capital of France is", "city")
FAILING = {
    "no request": ([], {}, RequestError, "there is no request to edit"),
    "not a request": ([{"prompt": "x"}], {}, RequestError, r"requests\[0\] is .*it must be an EditRequest"),
    "the same prompt twice": (
        [LEO, FRANCE, dataclasses.replace(FRANCE, target_new="city", id="b")], {}, RequestError,
        "'b'.*the same prompt is edited twice in one call, to 'Japan' and to 'city'",
    ),
    "the same id twice": ([LEO, dataclasses.replace(FRANCE, id="leo")], {}, RequestError, "the id 'leo' is taken"),
    "an id that is taken": ([dataclasses.replace(FRANCE, id="tower")], {}, RequestError, "the id 'tower' is taken"),
    "subject not in the prompt": (
        [LEO, NOWHERE], {"weighting": "linear", "positions": "subject"}, PositionError,
        "edits.json:3: .*the subject 'Japan' does not occur in the prompt 'The capital of France is'",
    ),
    "subject not in the prompt, by the default gate": (
        [LEO, NOWHERE], {}, RequestError, "edits.json:3: .*the subject 'Japan' is not in the prompt; did you mean 'France'",
    ),
    "subject twice in the prompt": (
        [TWICE], {"weighting": "linear", "positions": "subject_all"}, PositionError, "'Leo' occurs 2 times",
    ),
    "no subject": ([NAMELESS], {"weighting": "linear", "positions": "subject"}, PositionError, "has no subject"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_bad_requests_change_nothing_and_say_what_and_where(tiny_llama, tokenizer, name):
    requests, changes, kind, message = FAILING[name]
    editor = tiny_editor(tiny_llama, tokenizer, layers=(1,), **changes)
    editor.edit(TOWER)
    with unchanged(editor), pytest.raises(kind, match=message):
        editor.edit(requests)


@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_an_empty_target_is_refused_where_the_request_is_made(target):
    with pytest.raises(RequestError, match="e.json:2: target_new is empty"):
        EditRequest("The capital of France is", target, origin="e.json:2")


def test_poisoned_weights_are_an_error_that_names_the_edit(editor):
    editor.edit(TOWER)
    _poison(editor)
    with (
        unchanged(editor),
        pytest.raises(EditError, match="edit 'france'.*the loss is nan at step 0; nothing was changed"),
    ):
        editor.edit([FRANCE, LEO])


@pytest.mark.parametrize("weighting", ["cosine", "constant"])
def test_a_loss_that_goes_wrong_in_the_middle_rolls_everything_back(tiny_llama, tokenizer, weighting):
    # the reference engine runs every block at each step
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, loss_target=0.0, engine="reference")
    editor.edit(TOWER)
    calls = []

    def spoil(hidden):
        calls.append(1)
        return hidden * float("nan") if len(calls) > 12 else None

    handle = hook_block(tiny_llama.model.layers[-1], spoil)
    state, kept = adapter_bytes(editor), hooks(tiny_llama)
    with pytest.raises(EditError, match="the loss is nan at step [1-9]"):
        editor.edit([FRANCE, LEO])
    assert len(calls) > 12
    assert adapter_bytes(editor) == state
    assert hooks(tiny_llama) == kept
    handle.remove()
    editor.edit([FRANCE, LEO])  # and it goes on working
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == LEO.target_new


def test_finished_edits_of_a_failing_call_are_taken_back_and_replaced_ones_put_back(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", engine="reference")  # one after the other
    editor.edit([TOWER, dataclasses.replace(LEO, target_new="capital", id="old leo")])
    seen = []

    def spoil(hidden):
        seen.append([edit.id for edit in editor.edits])
        return hidden * float("nan") if "france" in seen[-1] else None

    handle = hook_block(tiny_llama.model.layers[0], spoil)
    state = adapter_bytes(editor)
    with pytest.raises(EditError, match="edit 'leo'.*the loss is nan at step 0"):
        editor.edit([FRANCE, LEO])
    handle.remove()
    assert ["tower", "france"] in seen  # the first was finished, and the old one gone
    assert adapter_bytes(editor) == state
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == "capital"


def test_a_users_failing_hook_rolls_back_too(editor):
    editor.edit(TOWER)

    def fail(*_):
        if editor.model.lm_head.weight.requires_grad is False:
            raise RuntimeError("out of memory")

    handle = editor.model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        editor.edit([FRANCE, LEO])
    handle.remove()
    assert [edit.id for edit in editor.edits] == ["tower"]
    assert all(p.requires_grad for p in editor.model.parameters())
    assert next_word(editor.model, editor.tokenizer, TOWER.prompt) == TOWER.target_new


def test_an_interrupt_keeps_the_finished_edits(tiny_llama, tokenizer):
    # trained one after the other, by the engine that runs every block at each step
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", engine="reference")
    editor.edit(dataclasses.replace(LEO, target_new="capital", id="old leo"))

    def interrupt(*_):
        if "france" in [edit.id for edit in editor.edits]:
            raise KeyboardInterrupt

    handle = tiny_llama.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.edit([FRANCE, LEO, TOWER])
    handle.remove()
    # the old edit of Leo's prompt was to be replaced by one that was not finished: it is back
    assert [edit.id for edit in editor.edits] == ["old leo", "france"]
    assert all(p.requires_grad for p in tiny_llama.parameters())
    editor.undo("france")
    assert next_word(tiny_llama, tokenizer, LEO.prompt) == "capital"


def test_an_edit_that_does_not_get_there_says_so(tiny_llama, tokenizer, caplog):
    editor = tiny_editor(tiny_llama, tokenizer, steps=1, learning_rate=1e-6)
    report = editor.edit(FRANCE)
    assert not report.edits[0].reached
    assert "edit 'france'" in caplog.text
    assert "does not produce the whole target" in caplog.text
    assert caplog.text.rstrip().endswith("raise steps or rank")


def test_a_long_target_that_is_not_reached_is_told_of_a_lower_block(tiny_llama, tokenizer, caplog):
    long = dataclasses.replace(FRANCE, target_new=" ".join(["Japan"] * 20))
    # 6 blocks, the default is block 5
    for layers, hint in ((None, "edit a lower block, layers=(4,)"), ((4,), "raise steps or rank")):
        caplog.clear()
        editor = tiny_editor(tiny_model(layers=6), tokenizer, steps=1, learning_rate=1e-6, layers=layers)
        assert not editor.edit(long).edits[0].reached
        assert hint in caplog.text


def test_settings_of_an_adapter_cannot_be_overridden(editor, tmp_path):
    editor.edit(FRANCE)
    editor.save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="is an adapter and has its own settings; leave config out"):
        BaftEditor.from_pretrained(tmp_path / "a", config())


def test_every_error_of_the_library_is_one_family():
    for kind in (RequestError, PositionError, EditError, ConfigError):
        assert issubclass(kind, BaftError)


# ------------------------------------------------------------------------------------------ generating


def _by_hand(editor: BaftEditor, request: EditRequest, count: int) -> list[int]:
    """Greedy continuation by the definition: no cache, no batch, no padding, and not through the editor's hooks.

    Every step reads prompt and answer anew; the update is added at the prompt's edited positions (for ``all``: at
    every position), found in the text.
    """
    model, tokenizer, adapter = editor.model, editor.tokenizer, editor.adapter
    prompt = encode_prompt(tokenizer, request.prompt)
    ids = list(prompt)
    editor.detach()
    try:
        while len(ids) < len(prompt) + count:
            where = prompt_positions(
                adapter.config.rule, tokenizer, request.prompt, prompt, request.subject, len(ids) - len(prompt)
            )
            layer = adapter.layers[0]

            def change(hidden, where=where, layer=layer):
                hidden = hidden.clone()
                hidden[0, where] += adapter.stack(layer, hidden.device).update(hidden[0, where])
                return hidden

            handle = hook_block(adapter.blocks[layer], change)
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            handle.remove()
    finally:
        editor.attach()
    return ids[len(prompt) :]


@pytest.mark.parametrize("rule", ["last", "prompt", "all", "subject", "f2+l1"])
@pytest.mark.parametrize("weighting", ["cosine", "constant"])
def test_greedy_text_is_that_of_the_definition(tiny_llama, tokenizer, rule, weighting):
    editor = tiny_editor(tiny_llama, tokenizer, positions=rule, weighting=weighting, layers=(1,))
    editor.edit([FRANCE, LEO])
    tiny_llama.generation_config.eos_token_id = None  # the definition goes on as well
    expected = [tokenizer.decode(_by_hand(editor, fact, 8), skip_special_tokens=True) for fact in (FRANCE, LEO)]
    with editor.enabled(False):
        assert editor.generate([FRANCE.prompt, LEO.prompt], max_new_tokens=8) != expected
    for cache in (True, False):
        assert [editor.generate(f.prompt, max_new_tokens=8, use_cache=cache) for f in (FRANCE, LEO)] == expected
        # beside prompts of other lengths, so padded on the left
        several = editor.generate([FRANCE.prompt, *PROMPTS[1:]], max_new_tokens=8, use_cache=cache)
        assert [several[0], several[2]] == expected


@pytest.mark.parametrize("rule", ["last", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
def test_the_edit_holds_however_the_text_is_chosen_with_cache_and_without(tiny_llama, tokenizer, rule, options):
    weighting = "cosine" if rule == "last" else "constant"
    editor = tiny_editor(
        tiny_llama, tokenizer, positions=rule, weighting=weighting, rank=8, loss_target=0.001, steps=120
    )
    editor.edit(FRANCE)
    texts = {}
    for cache in (True, False):
        torch.manual_seed(7)
        texts[cache] = editor.generate(list(PROMPTS), max_new_tokens=6, use_cache=cache, **options)
    assert texts[True] == texts[False]
    count = options.get("num_return_sequences", 1)
    first = texts[True][0] if count > 1 else [texts[True][0]]
    assert len(first) == count
    assert all(text.strip().startswith(FRANCE.target_new) for text in first)
    torch.manual_seed(7)
    assert editor.generate(list(PROMPTS), max_new_tokens=6, **options) == texts[True]  # a seed is a seed


def test_the_tokenizers_padding_side_does_not_matter():
    texts = []
    for side in ("left", "right"):
        editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(side))
        editor.edit(FACTS)
        texts.append(editor.generate(list(PROMPTS), max_new_tokens=5))
        assert editor.generate(list(PROMPTS), max_new_tokens=5, batch_size=2) == texts[-1]
    assert texts[0] == texts[1]


def test_generate_gives_a_string_for_a_string_and_lists_for_lists(editor):
    assert isinstance(editor.generate("He was", max_new_tokens=2), str)
    assert editor.generate(["He was"], max_new_tokens=2) == [editor.generate("He was", max_new_tokens=2)]
    several = editor.generate("He was", max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert isinstance(several, list)
    assert len(several) == 2
    assert editor.generate([]) == []


# ------------------------------------------------------------------------------------------ the real model


@pytest.mark.slow
def test_a_real_model_changes_its_mind_and_back(smollm2, tmp_path):
    model, tokenizer = smollm2
    weights = digest(model)
    editor = BaftEditor(model, tokenizer, model_name="smollm2-135m", bank_texts=BANK * 3)
    try:
        prompts = ["The capital of Japan is", "The capital city of Japan is", "The Mona Lisa was painted by"]
        before = editor.generate(prompts, max_new_tokens=8)
        assert before[0].startswith(" Tokyo")
        editor.edit(EditRequest(prompts[0], "Osaka", subject="Japan", id="japan"))
        after = editor.generate(prompts, max_new_tokens=8)
        assert after[0].startswith(" Osaka")
        assert after[1].startswith(" Osaka")
        assert after[2] == before[2]
        other = BaftEditor(model, tokenizer, model_name="smollm2-135m")
        editor.detach()
        other.load_adapter(editor.save_pretrained(tmp_path / "japan"))
        assert other.generate(prompts, max_new_tokens=8) == after
        other.undo("japan")
        assert other.generate(prompts, max_new_tokens=8) == before
        other.detach()
    finally:
        editor.detach()
    assert digest(model) == weights
    assert hooks(model) == {}


def test_an_editor_has_one_config(editor):
    faster = dataclasses.replace(editor.config, steps=3)
    editor.config = faster
    assert editor.adapter.config is editor.config is faster
    with pytest.raises(AdapterError, match=r"editor\.config.*rank"):
        editor.config = dataclasses.replace(faster, rank=faster.rank + 1)
    assert editor.adapter.config is editor.config is faster
