"""``baft inspect`` and what is behind it: the weights are those that act, and the reasons are the gate's own numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from baft_intervention.analysis.inspection import ASCII, BLOCKS, edit_network, heat_lines, inspect_prompt, read_ids
from baft_intervention.cli import main as cli
from baft_intervention.errors import ConfigError, EditError, RequestError
from baft_intervention.requests import EditRequest
from edits import FACTS, FRANCE, LEO, PROMPTS, TOWER, hooks, logits, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer

AT_POSITIONS = ("cosine", "linear", "constant")


@pytest.fixture
def edited(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(list(FACTS))
    return editor


def changed(model: Any, editor: Any, prompt: str) -> bool:
    """Whether any logit of the prompt differs from the unedited model's."""
    ids = editor.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        edited = model(**ids).logits
        with editor.enabled(False):
            return not torch.equal(edited, model(**ids).logits)


# ------------------------------------------------------------------------------------------ the default gate


def test_an_edit_is_said_to_act_where_it_changes_the_model(tiny_llama, edited):
    for prompt in (*PROMPTS, f"He was. {LEO.prompt} city. {TOWER.prompt}"):
        with unchanged(edited):
            found = inspect_prompt(edited, prompt)
        assert bool(found.acting) == changed(tiny_llama, edited, prompt)
        assert {view.id for view in found.edits if view.acts} == set(found.acting)
        assert found.positions == ()
        assert "".join(found.tokens) == prompt
        for view in found.edits:
            assert (len(view.weights), len(view.weights[0])) == (len(found.tokens), edited.config.rank)
            assert {t for t, row in enumerate(view.weights) if any(row)} == set(view.acts)
            assert len(view.stages) == len(view.acts)
            assert view.reason.startswith("acts on" if view.acts else "does not act")


def test_the_actions_and_weights_are_those_of_the_call(tiny_llama, tokenizer, edited):
    text = f"{FRANCE.prompt} Japan and {LEO.prompt} city"
    ids = tokenizer(text, return_tensors="pt")
    with edited.adapter.recording() as calls, torch.no_grad():
        tiny_llama(**ids, use_cache=False)
    [actions] = calls
    found = inspect_prompt(edited, text)
    seen = {(view.id, t, n) for view in found.edits for t, n in zip(view.acts, view.stages, strict=True)}
    assert seen == {(a.edit, a.column, a.stage) for a in actions}
    layer = edited.adapter.layers[0]
    x = read_ids(edited, ids["input_ids"][0].tolist())[layer]
    for action in actions:
        network: Any = edit_network(edited.adapter, layer, edited.edits[action.index])
        [view] = [view for view in found.edits if view.id == action.edit]
        expected = network(x[action.column], torch.tensor(action.stage))
        assert torch.allclose(torch.tensor(view.weights[action.column]), expected, atol=1e-5)


def test_an_edit_says_where_it_acts(edited):
    found = inspect_prompt(edited, FRANCE.prompt)
    view = found.edits[0]
    assert (view.id, found.acting) == ("france", ("france",))  # the one that acts comes first
    at = len(found.tokens) - 1
    assert (view.acts[-1], view.stages[-1], view.token) == (at, 0, at)
    assert [found.tokens[t] for t in range(view.subject[0], view.subject[1] + 1)] == [" Fr", "ance"]
    assert view.score > view.threshold
    assert f"' is' ({view.score:.2f}, {view.threshold:.2f} needed)" in view.reason


def test_an_edit_whose_subject_is_not_named_says_so(edited):
    for view in inspect_prompt(edited, "He was").edits:
        assert view.acts == ()
        assert (view.token, view.subject, view.score, view.asked, view.relation) == (None,) * 5
        assert view.reason in {f"does not act: the subject {fact.subject!r} is not named" for fact in FACTS}


@pytest.fixture
def decided(edited, monkeypatch):
    """Let the gate hear what a test says: ``z . key``, whether the subject is asked about, and the nearest relation."""

    def decide(score: float, asked: float, relation: str | None = "currency", begins: bool = True) -> Any:
        gate = edited.adapter.gate(torch.device("cpu"))
        is_open = score > float(gate.weighting.state["threshold"][0]) and asked > 0.3 and begins
        told = lambda reading: [dict.fromkeys(c.named, (score, asked, begins, is_open)) for c in reading.candidates]  # noqa: E731
        monkeypatch.setattr(gate, "explain", told)
        monkeypatch.setattr(gate, "decide", lambda reading: [])
        name = "baft_intervention.analysis.inspection._nearest_relations"
        monkeypatch.setattr(name, lambda gate, reading: [relation] * len(reading.candidates))
        return inspect_prompt(edited, FRANCE.prompt)

    return decide


def test_another_question_is_named(decided):
    view = decided(0.41, 0.9).edits[0]
    assert "does not act: the text asks something else (at " in view.reason
    assert f'0.41 of {view.threshold:.2f} needed, nearest known relation "currency")' in view.reason
    assert (view.relation, view.asked) == ("currency", 0.9)
    assert "nearest" not in decided(0.41, 0.9, None).edits[0].reason


def test_a_text_that_states_nothing_is_named(decided):
    view = decided(0.9999, 0.9, begins=False).edits[0]
    assert view.reason.startswith("does not act: no answer begins behind its subject (at ")


def test_another_subject_is_named(decided):
    view = decided(0.9999, 0.12).edits[0]
    assert view.reason.startswith("does not act: another subject is asked about (at ")
    assert "the probability of its own is 0.12; the relation fits, 1.00 of " in view.reason


def test_an_open_edit_right_behind_its_answer_says_so(decided):
    assert decided(0.9999, 0.9).edits[0].reason.endswith("the text stands right behind its own answer")


def test_of_edits_that_compete_the_loser_is_told_who_won(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    city = EditRequest("The capital city of France is", "London", subject="France", id="city")
    editor.edit([FRANCE, city])
    # with the prompt of the one, the other's gate is made to open too
    layer = editor.adapter.layers[0]
    keys = [edit.tensors[layer]["weighting.key"] for edit in editor.edits]
    keys[1].copy_(torch.nn.functional.normalize(keys[0] + 0.05 * keys[1], dim=0))
    editor.adapter.set_edits(editor.edits)
    france, other = inspect_prompt(editor, FRANCE.prompt).edits
    assert (france.id, other.id, other.acts) == ("france", "city", ())
    assert "does not act: edit 'france' fits better at ' is'" in other.reason


def test_an_edit_without_a_subject_is_asked_everywhere(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(EditRequest("the city is", "Rome"))
    [view] = inspect_prompt(editor, "the city is").edits
    assert view.acts
    assert (view.subject, view.asked) == (None, None)


def test_generated_tokens_are_seen_too(edited, tokenizer):
    found = inspect_prompt(edited, FRANCE.prompt, generate=3)
    given = len(tokenizer(FRANCE.prompt)["input_ids"])
    assert found.prompt_length == given
    assert len(found.tokens) == given + 3
    said = edited.generate(FRANCE.prompt, max_new_tokens=3)
    assert "".join(found.tokens[given:]) == said
    assert (
        found.edits[0].acts[: found.edits[0].acts.index(given - 1) + 1]
        == inspect_prompt(edited, FRANCE.prompt).edits[0].acts
    )
    lines = heat_lines(found, found.edits[0])
    assert lines[given + 1] == ("    generated:", False)
    assert len(lines) == given + 5


def test_several_layers_are_each_seen_as_the_edit_sees_them(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, layers=(2, 3))
    editor.edit(FRANCE)
    found = inspect_prompt(editor, FRANCE.prompt)
    assert [view.layer for view in found.edits] == [2, 3]
    assert found.edits[0].acts == found.edits[1].acts != ()
    assert found.edits[0].weights != found.edits[1].weights
    ids = tokenizer(FRANCE.prompt, return_tensors="pt")
    with torch.no_grad(), editor.enabled(False):
        plain = tiny_llama(**ids, output_hidden_states=True).hidden_states
    seen = read_ids(editor, ids["input_ids"][0].tolist())
    assert torch.allclose(seen[2], plain[3][0], atol=1e-5)  # before the edits of block 2
    assert not torch.allclose(seen[3][-1], plain[4][0, -1], atol=1e-3)


# ------------------------------------------------------------------------------------------ gates at positions


@pytest.mark.parametrize("positions", ["last", "prompt", "subject", "f1+l1"])
@pytest.mark.parametrize("weighting", AT_POSITIONS)
def test_an_edit_at_positions_is_said_to_act_where_it_changes_the_model(tiny_llama, tokenizer, weighting, positions):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, positions=positions)
    editor.edit(FRANCE)
    for prompt in PROMPTS:
        with unchanged(editor):
            found = inspect_prompt(editor, prompt)
        [view] = found.edits
        assert bool(view.acts) == changed(tiny_llama, editor, prompt)
        assert found.acting == (("france",) if view.acts else ())
        assert set(view.acts) <= set(found.positions)
        assert (len(view.weights), len(view.weights[0])) == (len(found.tokens), editor.config.rank)
        assert view.reason.startswith("acts on" if view.acts else "does not act")


@pytest.mark.parametrize("weighting", ["cosine", "linear"])
def test_the_weights_at_the_edited_token_are_those_of_the_update(tiny_llama, tokenizer, weighting):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, layers=(3,))
    editor.edit(FRANCE)
    tensors = editor.edits[0].tensors[3]
    for prompt in (FRANCE.prompt, "The capital city of France is", "He was"):
        seen = {}
        for acting in (True, False):
            taken = []
            handle = editor.adapter.blocks[3].register_forward_hook(
                lambda _m, _a, out, taken=taken: taken.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            with editor.enabled(acting):
                logits(tiny_llama, tokenizer, prompt)
            handle.remove()
            seen[acting] = taken[0]
        weights = torch.tensor(inspect_prompt(editor, prompt).edits[0].weights[-1])
        along = (tensors["source_weight"] - tensors["rotation"]) @ seen[False] + tensors["source_bias"]
        expected = seen[False] + (weights * along) @ tensors["rotation"]
        assert torch.allclose(seen[True], expected, atol=1e-3)


def test_of_edits_that_compete_at_positions_the_loser_is_told_who_won(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="cosine", weighting_options={"floor": -0.9})
    editor.edit([FRANCE, EditRequest("The capital city of France is", "London", subject="France", id="city")])
    france, city = inspect_prompt(editor, FRANCE.prompt).edits
    assert (france.id, city.id) == ("france", "city")
    assert france.acts
    if city.score > 0:
        assert city.reason.startswith("does not act: edit 'france' fits better")
    assert city.acts == ()


def test_the_prompt_ends_where_the_generated_tokens_begin(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant")
    editor.edit(FRANCE)
    found = inspect_prompt(editor, FRANCE.prompt, generate=2)
    assert found.edits[0].acts == found.positions == (found.prompt_length - 1,)
    assert len(found.tokens) == found.prompt_length + 2


# ------------------------------------------------------------------------------------------ all gates


def test_a_detached_editor_is_looked_at_and_stays_detached(edited, tiny_llama):
    edited.detach()
    before = hooks(tiny_llama)
    assert inspect_prompt(edited, LEO.prompt, generate=2).acting == ("leo",)
    assert hooks(tiny_llama) == before
    assert not edited.adapter.attached


def test_top_shows_the_best_and_counts_all(edited):
    found = inspect_prompt(edited, TOWER.prompt, top=1)
    assert [view.id for view in found.edits] == ["tower"]
    assert found.total == 3


def test_what_cannot_be_inspected_is_said(tiny_llama, tokenizer, edited):
    with pytest.raises(EditError, match="there is no edit to inspect"):
        inspect_prompt(tiny_editor(tiny_llama, tokenizer), "He was")
    with pytest.raises(RequestError, match="the prompt '  ' is empty"):
        inspect_prompt(edited, "  ")
    with pytest.raises(RequestError, match="top is 0; it must be at least 1"):
        inspect_prompt(edited, "He was", top=0)
    with pytest.raises(RequestError, match="generate is -1; it must be at least 0"):
        inspect_prompt(edited, "He was", generate=-1)
    with pytest.raises(RequestError, match="1000000 new ones, but the model reads"):
        inspect_prompt(edited, "He was", generate=1_000_000)
    with pytest.raises(RequestError, match="no chat template"):
        inspect_prompt(edited, [{"role": "user", "content": "Who?"}])


@pytest.mark.parametrize("shades", [BLOCKS, ASCII])
def test_the_heat_map_has_a_line_a_token_and_a_cell_a_basis(edited, shades):
    found = inspect_prompt(edited, FRANCE.prompt)
    lines = heat_lines(found, found.edits[0], shades=shades)
    assert len(lines) == 1 + len(found.tokens)
    last, acts = lines[-1]
    assert acts
    assert last.startswith("  *  is")
    assert not set(last[-edited.config.rank :]) <= {shades[0]}
    dark = inspect_prompt(edited, "He was")
    assert heat_lines(dark, dark.edits[0], shades=shades)[-1][0].endswith(shades[0] * edited.config.rank)
    view = dataclasses.replace(found.edits[0], acts=(1, 2), stages=(0, 1))
    assert [line[2] for line, _ in heat_lines(found, view)[1:4]] == [" ", "*", "+"]


# ------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_a_png_and_the_same_bytes_again(edited, tmp_path):
    plots = pytest.importorskip("baft_intervention.analysis.plots")
    found = inspect_prompt(edited, "The capital of\tFrance is $5_{ or $6^")  # a tab, and what would be a wrong formula
    for name in ("one.png", "two.png"):
        plots.save(plots.draw_inspection(found), tmp_path / name)
    first = (tmp_path / "one.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == (tmp_path / "two.png").read_bytes()


def test_a_place_where_no_picture_can_be_put_is_refused(tmp_path):
    plots = pytest.importorskip("baft_intervention.analysis.plots")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("why.pdf", "does not end in .png"),
        ("folder.png", "is a folder"),
        ("no/why.png", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            plots.png_path(tmp_path / name)


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter with its model beside it."""
    home = tmp_path_factory.mktemp("inspect")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    from baft_intervention.editor.editor import BaftEditor
    from edits import BANK, config

    editor = BaftEditor.from_pretrained(home / "model", config(), bank_texts=BANK)
    editor.edit(list(FACTS))
    editor.save_pretrained(home / "adapter")
    for edit in editor.edits:
        editor.undo(edit.id)
    editor.save_pretrained(home / "empty")
    return home / "adapter"


def test_the_command_shows_weights_and_reasons(adapter, capsys):
    assert cli.main(["inspect", "--adapter", str(adapter), "--prompt", FRANCE.prompt]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"edits that act on '{FRANCE.prompt}': 1 of 3\n")
    assert "france: The capital of France is -> Japan (block 3)" in out
    assert "' is' (" in out
    assert "* marks where an edit begins to act, + the tokens of its answer" in out
    assert "  *  is" in out
    assert "\x1b[" not in out  # colours are for terminals


def test_the_command_shows_generated_tokens(adapter, capsys):
    assert cli.main(["inspect", "--adapter", str(adapter), "--prompt", FRANCE.prompt, "--generate", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["tokens"]) == found["prompt_length"] + 2


def test_the_command_draws(adapter, tmp_path, capsys):
    picture = tmp_path / "why.png"
    assert (
        cli.main(["inspect", "--adapter", str(adapter), "--prompt", LEO.prompt, "--png", str(picture), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert picture.stat().st_size > 1000
    assert found["png"] == str(picture)
    assert found["acting"] == ["leo"]
    assert found["total"] == 3
    assert found["edits"][0]["id"] == "leo"
    assert len(found["edits"][0]["weights"]) == len(found["tokens"])


def test_plain_ascii_where_the_terminal_knows_no_blocks(adapter, capsys, monkeypatch):
    import io
    import sys

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["inspect", "--adapter", str(adapter), "--prompt", FRANCE.prompt]) == 0
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "weights: . 0, : to 1/4" in text
    assert "\\u" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "nowhere", "--prompt", "a"], "nowhere"),
        (["--prompt", " "], "a prompt is empty; give some text"),
        (["--prompt", "a", "--png", "why.jpg"], "why.jpg does not end in .png"),
        (["--prompt", "a", "--system", "Be brief."], "--system is a message of a conversation; give --chat with it"),
        (["--prompt", "a", "--top", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_bad_input(adapter, capsys, argv, message):
    argv = argv if "--adapter" in argv else ["--adapter", str(adapter), *argv]
    try:
        code = cli.main(["inspect", *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_adapter_without_edits_is_refused(adapter, capsys):
    assert cli.main(["inspect", "--adapter", str(adapter.parent / "empty"), "--prompt", "a"]) == 2
    assert "holds no edit; add one with: baft edit --adapter" in capsys.readouterr().err


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert "baft inspect --adapter" in out.split("example:")[1]
