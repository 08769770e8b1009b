"""Hostile input: whatever comes in, there is a result or one of the library's own errors, and nothing is half done.

Requests, settings, adapter folders and command lines are drawn by hypothesis, the same ones in every run. An error from
anywhere else (torch, tokenizers, json, …) fails a test by itself.
"""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from baft_intervention.cli import main as cli
from baft_intervention.config import BaftConfig
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, BaftError, RequestError
from baft_intervention.gates import weighting_names
from baft_intervention.integrations.easyedit import BaFTHyperParams, to_edit_request
from baft_intervention.models.chat import render_chat
from baft_intervention.requests import EditRequest
from baft_intervention.storage.exchange import DESCRIPTION, TENSORS, read_directory, serialised
from edits import BANK, FRANCE, LEO, PROMPTS, TOWER, adapter_bytes, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer


def few(count: int) -> Any:
    """So many examples, the same in every run."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates, control characters and all
numbers = st.integers(-(10**30), 10**30) | st.floats() | st.integers(-3, 3)
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def some_of(*names: str, also: Any = texts) -> Any:
    """Objects with these fields, and at times one that nobody knows."""
    return st.dictionaries(st.sampled_from(names) | also, anything, max_size=4)


# ------------------------------------------------------------------------------------------ requests and settings


@few(200)
@given(some_of("prompt", "target_new", "subject", "target_true", "probes", "id", "messages", "chat_template"), anything)
def test_any_object_as_a_request(fields, prompt):
    for data in (fields, {"prompt": "a", "target_new": "b", **fields}, {"prompt": prompt, "target_new": "b"}, prompt):
        try:
            request = EditRequest.from_dict(data)
        except RequestError:
            continue
        assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    for data in (fields, {"prompt": "a", "target_new": "b", **fields}, prompt):
        with contextlib.suppress(RequestError):
            assert to_edit_request(data).prompt


OPTIONS = (
    "value", "initial_weight", "std", "hidden", "sharpness", "margin", "false_positive_rate", "subject_threshold",
    "read_depth", "same_relation", "same_sentence", "relation_threshold", "threshold",
)  # fmt: skip
FIELDS = tuple(BaftConfig().to_dict())
config_fields = some_of(*FIELDS, also=st.just("unknown"))


@few(300)
@given(config_fields, st.sampled_from(weighting_names()) | anything, some_of(*OPTIONS, also=st.just("unknown")))
@example({}, [], {})
@example({"positions": "first"}, "linear", {})
@example({"positions": "f99999999999999999999+l1"}, "linear", {})
@example({"seed": 10**400}, "linear", {})
@example({"learning_rate": 10**400}, "linear", {})
@example({}, "mlp", {"hidden": 10**12})
def test_any_object_as_settings(fields, weighting, options):
    for data in (fields, {**fields, "weighting": weighting, "weighting_options": options}):
        try:
            made = BaftConfig.from_dict(data)
        except BaftError:
            continue
        assert BaftConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
        assert made.rule is not None
        torch.manual_seed(made.seed)
    with pytest.raises(BaftError):
        BaFTHyperParams.from_dict({**fields, "alg_name": weighting})


# ------------------------------------------------------------------------------------------ editing


@pytest.fixture(scope="module")
def editor():
    """An editor with one edit, whose state no failing call may change."""
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), weighting="constant", steps=1, rank=2)
    editor.edit(TOWER)
    return editor


long_texts = texts | st.sampled_from(
    ["\ud800", "\x00", "<bos>", "<eos>", "<pad>", " ", "\u2028", "a" * 300, "is " * 200]
)


@few(40)
@given(
    long_texts,
    long_texts,
    st.none() | long_texts,
    st.sampled_from(["last", "subject", "subject_all", "prompt", "f3+l2"]),
)
@example("a" * 400, "b", None, "last")
@example("The capital", "b" * 400, None, "last")
@example("a \ud800", "b", None, "last")
@example("a", "b \udfff", None, "last")
@example("a b", "c", "\ud800", "subject")
@example("<eos>", "<eos>", None, "prompt")
def test_any_text_as_an_edit(editor, prompt, target, subject, positions):
    before = adapter_bytes(editor)
    editor.adapter.config = editor.config = BaftConfig(**{**editor.config.to_dict(), "positions": positions})
    try:
        request = EditRequest(prompt, target, subject=subject, id="drawn")
        report = editor.edit([LEO, request])
        assert len(report.edits) == 2
        editor.generate(prompt, max_new_tokens=1)
        editor.adapter.set_edits([e for e in editor.edits if e.id == "tower"])
    except BaftError:
        pass
    assert adapter_bytes(editor) == before


@few(40)
@given(st.lists(long_texts, max_size=3), st.integers(1, 300))
def test_any_text_as_a_prompt(editor, prompts, length):
    with contextlib.suppress(BaftError):
        assert len(editor.generate(prompts, max_new_tokens=min(length, 2))) == len(prompts)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_text_that_is_longer_than_the_model_reads(arch):
    editor = tiny_editor(tiny_model(arch), tiny_tokenizer(), weighting="constant")
    with unchanged(editor):
        with pytest.raises(
            RequestError, match="edit 'long'.*[0-9]+ tokens of prompt and target, but the model reads 256"
        ):
            editor.edit([FRANCE, EditRequest("is " * 300, "Japan", id="long")])
        with pytest.raises(RequestError, match="the model reads 256"):
            editor.generate("is " * 300)
        with pytest.raises(RequestError, match="the model reads 256"):
            editor.generate("The capital of France is", max_new_tokens=300)


@few(30)
@given(config_fields)
def test_any_settings_with_a_model(fields):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    try:
        made = BaftConfig.from_dict({"weighting": "linear", **fields, "steps": 2})
        editor = BaftEditor(model, tokenizer, made, bank_texts=BANK)
    except BaftError:
        return
    editor.detach()
    assert not editor.edits


@few(40)
@given(anything | st.lists(some_of("role", "content"), max_size=2), texts)
def test_any_object_as_a_conversation_and_any_text_as_a_template(messages, template):
    tokenizer = tiny_tokenizer()
    for source in (
        template,
        "{{ messages[0].content }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
    ):
        with contextlib.suppress(RequestError):
            assert render_chat(tokenizer, messages, source)


# ------------------------------------------------------------------------------------------ adapter folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.edit([FRANCE, LEO])
    return editor.save_pretrained(tmp_path_factory.mktemp("hostile") / "adapter")


@pytest.fixture(scope="module")
def other():
    """An editor that the folder fits, with an edit of its own."""
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.edit(TOWER)
    return editor


def _write(place: Path, state: dict[str, torch.Tensor], description: dict[str, Any]) -> Path:
    """A folder as somebody writes it who knows the format, digests and seal included."""
    blob, sealed = serialised(state, {k: v for k, v in description.items() if k not in ("seal", "tensors_sha256")})
    place.mkdir(exist_ok=True)
    (place / TENSORS).write_bytes(blob)
    (place / DESCRIPTION).write_bytes(json.dumps(sealed).encode("utf-8", "surrogatepass"))
    return place


def _offer(editor: BaftEditor, place: Path, capsys) -> None:
    """The folder is loaded, and then works, or refused, and then nothing has changed; `baft list` shows it or refuses it."""
    mine = editor.edits
    try:
        before = adapter_bytes(editor)
        editor.load_adapter(place)
    except BaftError:
        assert adapter_bytes(editor) == before
    else:
        editor.generate(list(PROMPTS), max_new_tokens=1)
        editor.save_pretrained(place.parent / "again")
        editor.adapter.shared = {layer: dict(t) for layer, t in editor.adapter.shared.items()}
        editor.adapter.set_edits(mine)
    code = cli.main(["list", "--adapter", str(place)])
    err = capsys.readouterr().err
    assert code in (0, 2), err
    assert "baft: error: unexpected" not in err, err


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*at, key))
    return found


@few(120)
@given(st.data())
def test_any_description_with_a_right_seal(saved, other, tmp_path, capsys, data):
    state, description = read_directory(saved)
    description = copy.deepcopy(description)
    for path in data.draw(st.lists(st.sampled_from(_paths(description)), min_size=1, max_size=2)):
        place = description
        try:
            for key in path[:-1]:
                place = place[key]
            if data.draw(st.booleans()):
                place[path[-1]] = data.draw(anything)
            else:
                del place[path[-1]]
        except (KeyError, TypeError, IndexError):  # the first change took the second's place away
            continue
    _offer(other, _write(tmp_path / "adapter", state, description), capsys)


shapes = st.lists(st.integers(0, 5), max_size=4)
values = st.sampled_from([0.0, 1.0, -1e30, 1e38, float("nan"), float("inf")])


@few(120)
@given(st.data())
def test_any_tensor_with_a_right_seal(saved, other, tmp_path, capsys, data):
    state, description = read_directory(saved)
    name = data.draw(st.sampled_from(sorted(state)))
    how = data.draw(st.sampled_from(["shape", "dims", "value", "dtype", "name", "drop", "empty"]))
    tensor = state.pop(name)
    if how == "shape":
        tensor = torch.full(data.draw(shapes), data.draw(values))
    elif how == "dims":
        tensor = tensor[..., : data.draw(st.integers(0, 40))] if tensor.ndim else tensor.expand(2)
    elif how == "value":
        tensor = torch.full_like(tensor, data.draw(values))
    elif how == "dtype":
        tensor = tensor.to(data.draw(st.sampled_from([torch.float16, torch.float64, torch.int32, torch.bool])))
    elif how == "empty":
        tensor = tensor[:0] if tensor.ndim else torch.zeros(0)
    if how != "drop":
        state[data.draw(texts) if how == "name" else name] = tensor.clone().contiguous()
    _offer(other, _write(tmp_path / "adapter", state, description), capsys)


@few(60)
@given(st.sampled_from([TENSORS, DESCRIPTION]), st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=40))
def test_any_bytes_in_a_file(saved, other, tmp_path, capsys, name, begin, length, new):
    place = tmp_path / "adapter"
    place.mkdir(exist_ok=True)
    for file in saved.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    whole = (place / name).read_bytes()
    begin %= len(whole) + 1
    (place / name).write_bytes(whole[:begin] + new + whole[begin + length :])
    _offer(other, place, capsys)


HEADERS = {
    "a header of 2^60 bytes": struct.pack("<Q", 2**60),
    "a header of 90 MB that is not there": struct.pack("<Q", 90_000_000) + b"{",
    "a header that is no JSON": struct.pack("<Q", 8) + b"\xff" * 8,
    "a tensor behind the end": None,
    "tensors that overlap": None,
    "a negative shape": None,
    "a deep nest": None,
    "a path for a name": None,
    "nothing": b"",
}


def _header(name: str) -> bytes:
    if HEADERS[name] is not None:
        return HEADERS[name]
    one: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entries = {
        "a tensor behind the end": {"x": {**one, "shape": [2**40], "data_offsets": [0, 2**42]}},
        "tensors that overlap": {"x": one, "y": one},
        "a negative shape": {"x": {**one, "shape": [-2]}},
        "a path for a name": {"../../../../../../etc/evil": one},
    }
    text = b'{"x":' * 5000 if name == "a deep nest" else json.dumps(entries[name]).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize("name", HEADERS)
def test_malicious_tensor_files_with_a_right_digest(saved, other, tmp_path, capsys, name):
    import hashlib

    from baft_intervention.storage.exchange import _seal

    _, description = read_directory(saved)
    blob = _header(name)
    sealed = {**description, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    sealed["seal"] = _seal(sealed)
    place = tmp_path / "adapter"
    place.mkdir()
    (place / TENSORS).write_bytes(blob)
    (place / DESCRIPTION).write_text(json.dumps(sealed))
    with unchanged(other), pytest.raises(AdapterError, match="is not a safetensors file|unknown tensor|is missing"):
        other.load_adapter(place)
    _offer(other, place, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]  # nothing was written by a name


@pytest.mark.parametrize(
    "text", ['{"schema": 1, "steps": ' + "9" * 5000 + "}", '{"schema": 1e999}', "[" * 100_000, '{"a": NaN}']
)
def test_malicious_descriptions(saved, other, tmp_path, capsys, text):
    place = tmp_path / "adapter"
    place.mkdir()
    (place / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    (place / DESCRIPTION).write_text(text)
    with unchanged(other), pytest.raises(AdapterError):
        other.load_adapter(place)
    _offer(other, place, capsys)


@few(25)
@given(
    st.dictionaries(st.sampled_from(["name", "revision", "dtype", "fingerprint", "config_hash"]), anything, max_size=3)
)
@example({"name": "../../etc"})
@example({"name": "/etc/passwd"})
def test_any_base_model_in_a_description(saved, tmp_path, fields):
    state, description = read_directory(saved)
    base = {k: v for k, v in {**description["base_model"], **fields}.items() if v is not None}
    place = _write(tmp_path / "adapter", state, {**description, "base_model": base})
    with pytest.raises(BaftError):  # there is no model of the name 'tiny' either
        BaftEditor.from_pretrained(place)


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory, saved) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "edits.json").write_text(json.dumps([FRANCE.to_dict()]))
    (home / "bad.json").write_text('[{"prompt": "a"}]')
    (home / "config.yaml").write_text("steps: 1\nrank: 2\nweighting: constant\n")
    return home


WORDS = (
    *(
        "--model",
        "--adapter",
        "--edits",
        "--out",
        "--config",
        "--prompt",
        "--prompts",
        "--limit",
        "--show",
        "--rank",
        "--layers",
    ),
    *(
        "--positions",
        "--weighting",
        "--steps",
        "--learning-rate",
        "--seed",
        "--device",
        "--dtype",
        "--json",
        "--quiet",
        "--task",
    ),
    *(
        "--max-new-tokens",
        "--batch-size",
        "--sample",
        "--temperature",
        "--top-p",
        "--beams",
        "--count",
        "--compare",
        "--chat",
    ),
    *(
        "--system",
        "--all",
        "--skip-bad",
        "--overwrite",
        "--data",
        "--method",
        "--protocol",
        "--set",
        "--option",
        "--help",
    ),
    *(
        "model",
        "edits.json",
        "bad.json",
        "config.yaml",
        "nowhere",
        "out",
        "../out",
        "/dev/null",
        "-",
        "0",
        "1",
        "-1",
        "9" * 30,
    ),
    *(
        "1e400",
        "nan",
        "linear",
        "first",
        "f3+l2",
        "last",
        "float16",
        "cuda:7",
        "rank=2",
        "rank",
        "=",
        "",
        "\x00",
        "\udc80",
        "é",
    ),
)


@few(80)
@given(
    st.sampled_from(["edit", "generate", "list", "undo", "validate", "evaluate", "nothing"]),
    st.lists(st.sampled_from(WORDS) | texts, max_size=7),
)
@example("generate", ["--model", "model", "--prompt", "x", "--max-new-tokens", "9" * 30])
@example("generate", ["--model", "model", "--prompt", "x", "--sample", "--seed", "9" * 30])
@example("generate", ["--model", "model", "--prompt", "x", "--chat"])
@example(
    "edit", ["--model", "model", "--edits", "edits.json", "--out", "a", "--config", "config.yaml", "--seed", "9" * 30]
)
@example("edit", ["--model", "model", "--edits", "edits.json", "--out", "\x00"])
@example("edit", ["--model", "\x00", "--edits", "edits.json", "--out", "a"])
@example("list", ["--adapter", "\x00"])
@example("validate", ["\x00", "bad.json", "/dev/null"])
def test_any_command_line(home, tmp_path, monkeypatch, capsys, command, words):
    import io
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAFT_CACHE", str(home / "cache"))
    for name in ("edits.json", "bad.json", "config.yaml"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    if not (tmp_path / "model").exists():
        (tmp_path / "model").symlink_to(home / "model")
    if command in ("edit", "generate") and "--model" not in words and "--adapter" not in words:
        words = ["--model", "nowhere", *words]  # not the real one
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    try:
        code = cli.main([command, *words])
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code in (0, 1, 2), err
    assert "baft: error: unexpected" not in err, err
    assert "Traceback" not in err


def test_a_saved_tensor_file_is_what_the_library_reads(saved):
    """The helpers above do what the library does."""
    state, description = read_directory(saved)
    assert (
        serialised(state, {k: v for k, v in description.items() if k not in ("seal", "tensors_sha256", "schema")})[0]
        == (saved / TENSORS).read_bytes()
    )
    assert set(load(save(state))) == set(state)
