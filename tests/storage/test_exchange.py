"""Adapter folders: same edits same bytes, nothing half-written, and nothing altered or foreign is ever loaded."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, ConfigError
from baft_intervention.storage.exchange import read_directory
from baft_intervention.storage.working_store import write_directory
from edits import BANK, FACTS, FRANCE, LEO, PROMPTS, TOWER, adapter_bytes, config, hooks, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved adapter of two edits of the tiny Llama."""
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.edit([FRANCE, LEO])
    return editor.save_pretrained(tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of it to spoil."""
    place = tmp_path / "adapter"
    place.mkdir()
    for file in saved.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """A saved adapter of another edit."""
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.edit(TOWER)
    return editor.save_pretrained(tmp_path_factory.mktemp("tower") / "adapter")


@pytest.fixture
def other(tower):
    """An editor with an edit of its own, which a failing load must leave as it is."""
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.load_adapter(tower)
    return editor


# ------------------------------------------------------------------------------------------ there and back


def test_load_gives_the_same_tensors_and_logits(saved, tmp_path):
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.load_adapter(saved)
    again = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    again.edit([FRANCE, LEO])
    assert adapter_bytes(editor) == adapter_bytes(again)
    assert [e.requests for e in editor.edits] == [(FRANCE,), (LEO,)]
    assert editor.generate(list(PROMPTS), max_new_tokens=4) == again.generate(list(PROMPTS), max_new_tokens=4)
    assert _bytes(editor.save_pretrained(tmp_path / "again")) == _bytes(saved)


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_tensors_and_writes_the_same_text(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    editor = BaftEditor.from_pretrained(tmp_path / "base", config(), bank_texts=BANK)
    editor.edit(FACTS)
    editor.save_pretrained(tmp_path / "adapter")
    script = (
        "import json, sys; from baft_intervention import BaftEditor\n"
        "editor = BaftEditor.from_pretrained(sys.argv[1])\n"
        "state = {n: t.numpy().tobytes().hex() for n, t in editor.adapter.state().items()}\n"
        "json.dump([state, editor.generate(json.loads(sys.argv[2]), max_new_tokens=6)], sys.stdout)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "adapter"), json.dumps(PROMPTS)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    state, texts = json.loads(run.stdout)
    assert state == {n: t.numpy().tobytes().hex() for n, t in editor.adapter.state().items()}
    assert texts == editor.generate(list(PROMPTS), max_new_tokens=6)
    assert texts[0].strip().startswith(FRANCE.target_new)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(saved, tmp_path):
    for seed, equal in ((0, True), (1, False)):
        editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), seed=seed)
        torch.manual_seed(99 + seed)  # a user's own random state must not matter
        editor.edit([FRANCE, LEO])
        there = editor.save_pretrained(tmp_path / str(seed))
        same = (there / "adapter.safetensors").read_bytes() == (saved / "adapter.safetensors").read_bytes()
        assert same == equal


def test_an_adapter_without_edits_can_be_saved_and_loaded(tmp_path, other):
    empty = tiny_editor(tiny_model("llama"), tiny_tokenizer()).save_pretrained(tmp_path / "empty")
    other.load_adapter(empty)
    assert other.edits == ()
    other.edit(FRANCE)
    assert other.generate(FRANCE.prompt, max_new_tokens=1).strip() == FRANCE.target_new


def test_a_loaded_adapter_can_be_continued_as_if_it_had_never_been_saved(saved):
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.load_adapter(saved)
    editor.edit(TOWER)
    whole = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    whole.edit([FRANCE, LEO])
    whole.edit(TOWER)
    assert adapter_bytes(editor) == adapter_bytes(whole)


# ------------------------------------------------------------------------------------------ what is refused


def _bytes(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def _tensors(place: Path) -> dict[str, torch.Tensor]:
    return load((place / "adapter.safetensors").read_bytes())  # not mapped: the file is going to be replaced


def _truncate(name: str):
    def spoil(place: Path) -> None:
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])

    return spoil


def _flip(place: Path) -> None:
    data = bytearray((place / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (place / "adapter.safetensors").write_bytes(bytes(data))


def _describe(change, *, seal: bool = False):
    """Change the description; with ``seal`` as somebody would who knows the format and seals it anew."""

    def spoil(place: Path) -> None:
        description = json.loads((place / "adapter.json").read_text())
        if seal:
            state = _tensors(place)
            description = {k: v for k, v in description.items() if k not in ("seal", "tensors_sha256")}
            change(description, state)
            write_directory(place, state, description)
        else:
            change(description)
            (place / "adapter.json").write_text(json.dumps(description))

    return spoil


def _target(description: dict) -> None:
    description["edits"][0]["requests"][0]["target_new"] = "London"


def _tensor(name: str, make):
    def change(_description: dict, state: dict) -> None:
        new = make(state[name])
        if new is None:
            del state[name]
        else:
            state[name] = new

    return _describe(change, seal=True)


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


def _set(field: str, value):
    return _describe(lambda description, _state: description.__setitem__(field, value), seal=True)


def _setting(field: str, value):
    return _describe(lambda description, _state: description["config"].__setitem__(field, value), seal=True)


def _pickle(place: Path) -> None:
    torch.save(_tensors(place), place / "adapter.safetensors")


def _resealed_pickle(place: Path) -> None:
    """Not only in the place of the tensors, but with the right digest."""
    import hashlib

    from baft_intervention.storage.exchange import _seal

    _pickle(place)
    description = json.loads((place / "adapter.json").read_text())
    description["tensors_sha256"] = hashlib.sha256((place / "adapter.safetensors").read_bytes()).hexdigest()
    description["seal"] = _seal(description)
    (place / "adapter.json").write_text(json.dumps(description))


def _link(place: Path) -> None:
    outside = place.parent / "elsewhere.safetensors"
    (place / "adapter.safetensors").rename(outside)
    (place / "adapter.safetensors").symlink_to(outside)


def _remove(name: str):
    return lambda place: (place / name).unlink()


def _write(name: str, data: bytes):
    return lambda place: (place / name).write_bytes(data)


def _rename_gate(_description, state) -> None:
    """As a gate of another version: its tensors have other names."""
    for name in [name for name in state if ".edits.weighting." in name]:
        state[f"{name}_of_before"] = state.pop(name)


ROTATION = "layers.3.edits.rotation"
SPOILED = {
    "truncated tensors": (_truncate("adapter.safetensors"), "adapter.safetensors is truncated or altered"),
    "truncated description": (_truncate("adapter.json"), "adapter.json is truncated or not JSON"),
    "empty description": (_write("adapter.json", b""), "adapter.json is truncated or not JSON"),
    "description is a list": (_write("adapter.json", b"[]"), "must hold an object, not list"),
    "description is no text": (_write("adapter.json", b"\xff\xfe\x00"), "adapter.json is truncated or not JSON"),
    "description is a deep nest": (_write("adapter.json", b"[" * 100_000), "adapter.json is truncated or not JSON"),
    "one bit of a tensor": (_flip, "adapter.safetensors is truncated or altered"),
    "another target": (_describe(_target), "adapter.json was altered after it was written"),
    "newer schema": (_describe(lambda d: d.update(schema=2)), "schema 2; this version reads schema 1"),
    "no schema": (_describe(lambda d: d.pop("schema")), "schema None"),
    "schema is true": (_describe(lambda d: d.update(schema=True)), "schema True|altered"),
    "a field is missing": (_describe(lambda d: d.pop("base_model")), "field 'base_model' is None"),
    "tensors are missing": (_remove("adapter.safetensors"), "has no adapter.safetensors"),
    "description is missing": (_remove("adapter.json"), "has no adapter.json"),
    "a pickle": (_pickle, "adapter.safetensors is truncated or altered"),
    "a pickle with its digest": (_resealed_pickle, "adapter.safetensors is not a safetensors file"),
    "a link out of the folder": (_link, "is a link out of the adapter folder"),
    "not finite": (_tensor(ROTATION, _nan), f"tensor '{ROTATION}' has values that are not finite"),
    "another shape": (_tensor(ROTATION, lambda t: t[:, :2].contiguous()), r"shape \(2, 2, 32\); it must be \(2, 4, 32\)"),
    "fewer edits": (_tensor(ROTATION, lambda t: t[:1]), r"shape \(1, 4, 32\); it must be \(2, 4, 32\)"),
    "another dtype": (_tensor(ROTATION, lambda t: t.half()), "is torch.float16; it must be float32"),
    "a tensor is missing": (_tensor(ROTATION, lambda t: None), f"tensor '{ROTATION}' is missing"),
    "an unknown tensor": (
        _describe(lambda d, s: s.update({"layers.3.edits.extra": torch.zeros(2)}), seal=True),
        "unknown tensor 'layers.3.edits.extra'",
    ),
    "a layer that is not edited": (
        _describe(lambda d, s: s.update({"layers.1.edits.rotation": s[ROTATION].clone()}), seal=True),
        "unknown tensor 'layers.1.edits.rotation'",
    ),
    "a gate of another form": (
        _describe(_rename_gate, seal=True),
        "is missing; the adapter's gate 'fact' has another form.*edit again: its requests are in adapter.json",
    ),
    "another layout of the gate": (
        _set("weighting_layout", 99),
        "has layout 99 of the gate 'fact', but this version reads layout 1; load it with baft_intervention 0.1.0",
    ),
    "other layers": (_set("layers", [1]), "layers .1., but the settings say .3."),
    "an edit without requests": (_set("edits", [{}, {}]), r"edits\[0\]: "),
    "one edit for two": (
        _describe(lambda d, s: d["edits"].pop(), seal=True),
        r"shape \(2, 4(, 32)?\); it must be \(1, 4(, 32)?\)|has shape",
    ),
    "two edits of one name": (
        _describe(lambda d, s: d["edits"][1].update(id="france"), seal=True),
        "two edits are called 'france'",
    ),
    "another rank": (_setting("rank", 3), "rank = 3, but this editor has 4"),
    "another weighting": (_setting("weighting", "linear"), "weighting = 'linear', but this editor has 'fact'"),
    "an unknown setting": (_setting("code", "import os"), "unknown setting 'code'"),
    "a setting out of range": (_setting("rank", 0), "rank is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_adapter_is_refused_and_nothing_is_loaded(copy, other, tower, name):
    spoil, message = SPOILED[name]
    other.load_adapter(copy)  # whole, it loads: what is refused below is the spoiling
    other.load_adapter(tower)
    spoil(copy)
    with unchanged(other), pytest.raises((AdapterError, ConfigError), match=message) as caught:
        other.load_adapter(copy)
    assert str(copy) in str(caught.value)


def test_an_adapter_of_before_the_layout_was_written_is_read(copy, other):
    _describe(lambda d, _state: d.pop("weighting_layout"), seal=True)(copy)
    other.load_adapter(copy)
    assert len(other.edits) == 2


@pytest.mark.parametrize("how", ["weights", "sizes", "architecture"])
def test_an_adapter_of_another_model_is_refused(saved, how):
    model = {
        "weights": lambda: tiny_model("llama", seed=1),
        "sizes": lambda: tiny_model("llama", d=64),
        "architecture": lambda: tiny_model("qwen2"),
    }[how]()
    editor = tiny_editor(model, tiny_tokenizer())
    editor.edit(TOWER)
    reason = "weights differ" if how == "weights" else "architecture differs"
    with (
        unchanged(editor),
        pytest.raises(AdapterError, match=f"made for 'tiny'.*{reason} .*nothing was loaded"),
    ):
        editor.load_adapter(saved)


def test_a_refused_adapter_leaves_no_hook_on_its_model(tmp_path, monkeypatch):
    """``from_pretrained`` loads the base model itself; where the adapter is then refused, nothing stays on it."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    editor = BaftEditor.from_pretrained(tmp_path / "base", config(), bank_texts=BANK)
    editor.edit(FRANCE)
    editor.save_pretrained(tmp_path / "adapter")
    _tensor(ROTATION, _nan)(tmp_path / "adapter")
    loaded = []
    import baft_intervention.editor.persistence as module

    load_model = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    with pytest.raises(AdapterError, match="not finite"):
        BaftEditor.from_pretrained(tmp_path / "adapter")
    assert hooks(loaded[0][0]) == {}


def test_nothing_is_unpickled(copy, other, monkeypatch):
    """Not by loading an adapter, and not where somebody lays a pickle beside it."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(copy / "run"),)

    for name in ("adapter.bin", "pytorch_model.bin", "training_args.bin"):
        (copy / name).write_bytes(pickle.dumps(Evil()))

    def refuse(*_args, **_kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    other.load_adapter(copy)
    assert [edit.id for edit in other.edits] == ["france", "leo"]
    assert not (copy / "run").exists()


@pytest.mark.parametrize("what", ["nowhere", "file"])
def test_a_folder_that_is_none(tmp_path, other, what):
    place = tmp_path / "here"
    if what == "file":
        place.write_text("text")
    with unchanged(other), pytest.raises(AdapterError, match=f"there is no adapter folder {place}"):
        other.load_adapter(place)


# ------------------------------------------------------------------------------------------ writing


def test_a_folder_of_something_else_and_a_file_are_not_overwritten(tmp_path, other):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="is not empty and holds no adapter"):
        other.save_pretrained(tmp_path / "thesis")
    with pytest.raises(AdapterError, match="is a file; give the name of a folder"):
        other.save_pretrained(tmp_path / "thesis" / "chapter.tex")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_saving_again_replaces_the_adapter_whole(copy, other):
    other.save_pretrained(copy)
    assert [edit["id"] for edit in read_directory(copy)[1]["edits"]] == ["tower"]
    assert sorted(p.name for p in copy.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]  # nothing half-written beside it


@pytest.mark.parametrize(("at", "call"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_a_write_that_fails_leaves_the_old_adapter(copy, other, monkeypatch, at, call):
    before = _bytes(copy)
    real, calls = getattr(os, at), []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:  # either file, the folder; the renaming that makes it so
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(AdapterError, match="cannot be written.*No space left.*what was there is unchanged"):
        other.save_pretrained(copy)
    monkeypatch.undo()
    assert _bytes(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path, other):
    (tmp_path / "empty").mkdir()
    other.save_pretrained(tmp_path / "empty")
    other.save_pretrained(tmp_path / "a" / "b" / "c")
    assert _bytes(tmp_path / "empty") == _bytes(tmp_path / "a" / "b" / "c")


def test_the_description_says_what_made_the_edits(saved):
    description = json.loads((saved / "adapter.json").read_text())
    assert description["base_model"]["name"] == "tiny"
    assert description["config"]["rank"] == 4
    assert set(description["versions"]) >= {"baft_intervention", "torch", "transformers"}
    first = description["edits"][0]
    assert first["id"] == "france"
    assert first["requests"][0]["target_new"] == "Japan"
    assert first["reached"] is True
