"""``baft inspect`` and what is behind it: the weights are those that act, and the reasons are the network's own numbers."""

from __future__ import annotations

import json

import pytest
import torch

from baft_intervention.analysis.inspection import ASCII, BLOCKS, heat_lines, inspect_prompt, read_prompt
from baft_intervention.cli import main as cli
from baft_intervention.errors import ConfigError, EditError, RequestError
from baft_intervention.requests import EditRequest
from edits import FACTS, FRANCE, LEO, PROMPTS, TOWER, hooks, logits, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer

NETWORKS = ("subject_relation", "cosine", "linear", "constant")


@pytest.fixture
def edited(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(list(FACTS))
    return editor


# ------------------------------------------------------------------------------------------ what is seen


@pytest.mark.parametrize("positions", ["last", "prompt", "subject", "f1+l1"])
@pytest.mark.parametrize("weighting", NETWORKS)
def test_an_edit_is_said_to_act_where_it_changes_the_model(tiny_llama, tokenizer, weighting, positions):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, positions=positions)
    editor.edit(FRANCE)
    for prompt in PROMPTS:
        with unchanged(editor):
            found = inspect_prompt(editor, prompt)
        [view] = found.edits
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            edited = tiny_llama(**ids).logits
            with editor.enabled(False):
                assert bool(view.acts) == (not torch.equal(edited, tiny_llama(**ids).logits))  # at any token
        assert found.acting == (("france",) if view.acts else ())
        assert set(view.acts) <= set(found.positions)
        assert (len(view.weights), len(view.weights[0])) == (len(found.tokens), editor.config.rank)
        assert "".join(found.tokens) == prompt
        assert view.reason.startswith("acts on" if view.acts else "does not act")


@pytest.mark.parametrize("weighting", ["subject_relation", "cosine", "linear"])
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


def test_the_reasons_name_what_failed(edited):
    found = inspect_prompt(edited, FRANCE.prompt)
    assert found.acting == ("france",)
    assert found.edits[0].id == "france"  # the one that acts comes first
    assert found.edits[0].reason.startswith("acts on ' is', weight 1.00: subject found at ")
    assert found.edits[0].subject > 0
    other = inspect_prompt(edited, "He was")
    for view in other.edits:
        assert view.acts == ()
        assert "does not act: subject not found, nearest is" in view.reason
        assert view.subject < 0


def test_an_edit_without_a_subject_is_not_said_to_have_found_one(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(EditRequest("The city of London is", "Rome"))
    [view] = inspect_prompt(editor, "The city of London is").edits
    assert view.acts
    assert (view.subject, view.subject_token, view.rival) == (None, None, None)
    assert "subject" not in view.reason
    assert "no rival" in view.reason


def test_of_edits_that_compete_the_loser_is_told_who_won(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="cosine", weighting_options={"floor": -0.9})
    editor.edit([FRANCE, EditRequest("The capital city of France is", "London", subject="France", id="city")])
    france, city = inspect_prompt(editor, FRANCE.prompt).edits
    assert (france.id, city.id) == ("france", "city")
    assert france.acts
    if city.match > 0:
        assert city.reason.startswith("does not act, edit 'france' fits better")
    assert city.acts == ()


def test_several_layers_are_each_seen_as_the_edit_sees_them(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="linear", layers=(2, 3))
    editor.edit(FRANCE)
    found = inspect_prompt(editor, FRANCE.prompt)
    assert [view.layer for view in found.edits] == [2, 3]
    hidden = editor.model(
        **editor.tokenizer(FRANCE.prompt, return_tensors="pt"), output_hidden_states=True
    ).hidden_states
    # what block 3 gets is edited at block 2 already: its own output differs from the unedited model's
    with editor.enabled(False):
        plain = editor.model(
            **editor.tokenizer(FRANCE.prompt, return_tensors="pt"), output_hidden_states=True
        ).hidden_states
    assert not torch.equal(hidden[3], plain[3])
    _, seen = read_prompt(editor, FRANCE.prompt)
    assert torch.allclose(seen[2], plain[3][0], atol=1e-5)  # before the edits of block 2
    assert not torch.allclose(seen[3][-1], plain[4][0, -1], atol=1e-3)


def test_a_detached_editor_is_looked_at_and_stays_detached(edited, tiny_llama):
    edited.detach()
    before = hooks(tiny_llama)
    assert inspect_prompt(edited, LEO.prompt).acting == ("leo",)
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


@pytest.mark.parametrize("shades", [BLOCKS, ASCII])
def test_the_heat_map_has_a_line_a_token_and_a_cell_a_basis(edited, shades):
    found = inspect_prompt(edited, FRANCE.prompt)
    lines = heat_lines(found, found.edits[0], shades=shades)
    assert len(lines) == 1 + len(found.tokens)
    last, acts = lines[-1]
    assert acts
    assert last.startswith("  * ")
    assert last.endswith(shades[4] * edited.config.rank)
    assert not any(acts for _, acts in lines[:-1])
    dark = inspect_prompt(edited, "He was")
    assert heat_lines(dark, dark.edits[0], shades=shades)[-1][0].endswith(shades[0] * edited.config.rank)


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
    assert "acts on ' is', weight 1.00: subject found at" in out
    assert "  *  is" in out
    assert "\x1b[" not in out  # colours are for terminals


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
    assert "####" in text
    assert "\\u" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "nowhere", "--prompt", "a"], "nowhere"),
        (["--prompt", " "], "a prompt is empty; give some text"),
        (["--prompt", "a", "--png", "why.jpg"], "why.jpg does not end in .png"),
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
