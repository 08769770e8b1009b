"""Adapters on a hub: one of this process, on the loopback address; no test asks the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import baft_intervention.storage.hub as hub_module
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, ConfigError, ModelError
from baft_intervention.requests import EditRequest
from baft_intervention.storage.hub import fetched_adapter, is_repo_id, model_card
from edits import FRANCE, LEO, PROMPTS, adapter_bytes, config, hooks, tiny_editor, unchanged
from hub_server import Hub, local_hub
from tiny import tiny_model, tiny_tokenizer


def set_offline(monkeypatch, value: bool) -> None:
    """What ``HF_HUB_OFFLINE`` sets; older versions of the hub's library ask once a session."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    (_http.close_session if hasattr(_http, "close_session") else _http.reset_sessions)()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    set_offline(monkeypatch, False)
    with local_hub() as running:
        # what HF_ENDPOINT sets, everywhere: nothing may go to the real hub
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        api = huggingface_hub.HfApi(endpoint=running.url, token="hf_test")
        monkeypatch.setattr(hub_module, "_api", lambda: api)
        yield running
        set_offline(monkeypatch, True)


@pytest.fixture
def base(tmp_path) -> Path:
    """A base model in a folder, as ``from_pretrained`` will look for it."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def editor(base) -> BaftEditor:
    editor = BaftEditor.from_pretrained(base, config(weighting="constant"))
    editor.edit([FRANCE, LEO])
    return editor


def test_push_and_from_pretrained(hub: Hub, editor, monkeypatch):
    url = editor.push_to_hub(
        "me/japan", private=True, license="mit", metrics={"reliability": 99.5}, message="Two facts"
    )
    assert url == f"{hub.url}/me/japan/commit/{'c' * 40}"
    assert sorted(hub.repos["me/japan"]) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert (hub.private["me/japan"], hub.messages, hub.tokens) == (True, ["Two facts"], {"Bearer hf_test"})
    loaded = BaftEditor.from_pretrained("me/japan")
    assert adapter_bytes(loaded) == adapter_bytes(editor)
    assert loaded.generate(list(PROMPTS), max_new_tokens=3) == editor.generate(list(PROMPTS), max_new_tokens=3)
    # offline, what was fetched is in the hub's own cache
    set_offline(monkeypatch, True)
    assert adapter_bytes(BaftEditor.from_pretrained("me/japan")) == adapter_bytes(editor)


def test_pushing_again_replaces_the_files(hub: Hub, editor):
    editor.push_to_hub("me/japan")
    first = dict(hub.repos["me/japan"])
    editor.undo(LEO.id)
    editor.push_to_hub("me/japan")
    assert hub.repos["me/japan"]["adapter.json"] != first["adapter.json"]
    assert b"1 edited fact of" in hub.repos["me/japan"]["README.md"]


def test_a_damaged_adapter_on_the_hub_is_refused_by_its_own_name(hub: Hub, editor):
    editor.push_to_hub("me/japan")
    files = hub.repos["me/japan"]
    tensors = files["adapter.safetensors"]
    files["adapter.safetensors"] = tensors[: len(tensors) // 2]
    with pytest.raises(AdapterError, match="^me/japan/adapter.safetensors is truncated or altered"):
        BaftEditor.from_pretrained("me/japan")
    del files["adapter.safetensors"]
    with pytest.raises(AdapterError, match="^me/japan: adapter.safetensors cannot be fetched"):
        BaftEditor.from_pretrained("me/japan")
    files["adapter.safetensors"] = tensors
    with pytest.raises(ConfigError, match="'me/japan' is an adapter and has its own settings"):
        BaftEditor.from_pretrained("me/japan", config())


def test_a_repository_without_an_adapter_is_taken_for_a_model(hub: Hub, monkeypatch):
    hub.repos["me/model"] = {"config.json": b"{}"}
    asked = []
    monkeypatch.setattr(
        "baft_intervention.editor.persistence.load_model",
        lambda name, **k: asked.append((name, k["revision"])) or 1 / 0,
    )
    for name in ("me/model", "me/nothing"):
        with pytest.raises(ZeroDivisionError):
            BaftEditor.from_pretrained(name, revision="v2")
    assert asked == [("me/model", "v2"), ("me/nothing", "v2")]
    assert "HEAD me/model/resolve/v2/adapter.json" in hub.asked


def test_a_hub_that_refuses_or_is_not_there(hub: Hub, editor, monkeypatch):
    hub.refuse = 403
    with unchanged(editor), pytest.raises(AdapterError, match="me/japan: the adapter cannot be pushed:.*403"):
        editor.push_to_hub("me/japan")
    with pytest.raises(AdapterError, match="a b: the adapter cannot be pushed"):
        editor.push_to_hub("a b")
    set_offline(monkeypatch, True)
    with pytest.raises(AdapterError, match="cannot be pushed.*offline mode is enabled"):
        editor.push_to_hub("me/japan")
    with fetched_adapter("me/unknown") as folder:
        assert folder is None
    with pytest.raises(ModelError, match="'me/unknown' is not a built-in.*not a local folder"):
        BaftEditor.from_pretrained("me/unknown")
    assert hooks(editor.model)  # untouched by all this


def test_which_names_may_be_repositories(tmp_path, monkeypatch):
    assert all(is_repo_id(name) for name in ("me/japan", "a-b/c.d_e"))
    assert not any(
        is_repo_id(n) for n in ("japan", "../japan", "me/../x", "/etc/x", "me/a/b", "me/", "", "./me", "me/.x")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "japan").mkdir(parents=True)
    assert not is_repo_id("me/japan")  # a folder that is here comes first


def _card(requests: list[EditRequest], base_name: str = "smollm2-135m", **kwargs) -> tuple[dict, str]:
    description = {
        "base_model": {"name": base_name, "dtype": "float32"}, "layers": [27],
        "config": {"weighting": "fact", "rank": 12, "positions": "last", "seed": 0},
        "edits": [{"reached": i != 1} for i, _ in enumerate(requests)],
    }  # fmt: skip
    text = model_card(description, requests, "me/japan", **kwargs)
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_edited_of_which_model_and_how_to_load_it():
    head, body = _card([FRANCE, LEO], license="mit", metrics={"locality": 98.25, "reliability": 100})
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (head["license"], head["library_name"]) == ("mit", "baft_intervention")
    assert head["metrics"] == ["locality", "reliability"]
    assert "knowledge-editing" in head["tags"]
    assert "2 edited facts of `HuggingFaceTB/SmolLM2-135M-Instruct`" in body
    assert 'BaftEditor.from_pretrained("me/japan")' in body
    assert "| The capital of France is | Japan | France |" in body
    assert "| edits whose target is reached | 1 of 2 |" in body
    assert "| locality | 98.25 |" in body
    assert "## Licence\n\nmit." in body
    head, body = _card([FRANCE])
    assert "license" not in head
    assert "Not stated." in body
    assert "No other metric was given" in body


def test_the_card_does_not_say_where_a_folder_lay_and_lists_no_thousand_edits():
    many = [EditRequest(f"Fact {i} is", "x") for i in range(1000)]
    head, body = _card(many, "/somewhere/private/my-model")
    assert "base_model" not in head
    assert "1000 edited facts of `my-model`" in body
    assert "private" not in body
    assert body.count("| Fact") == 20
    assert "and 980 more" in body


def test_a_request_cannot_break_out_of_the_cards_table():
    evil = EditRequest("a | b\n\n# Big\n<script>x</script> [click](http://x)", "`c` | d")
    _, body = _card([evil])
    assert "| a \\| b # Big &lt;script>x&lt;/script> \\[click](http://x) | `c` \\| d |  |" in body
    assert "\n# Big" not in body
    assert "<script>" not in body


def test_a_pushed_adapter_is_the_saved_one(hub: Hub, editor, tmp_path):
    editor.push_to_hub("me/japan")
    saved = editor.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in saved.iterdir()}.items() <= hub.repos["me/japan"].items()
    assert json.loads(hub.repos["me/japan"]["adapter.json"])["edits"][0]["id"] == "france"
    assert tiny_editor(tiny_model("llama"), tiny_tokenizer()).edits == ()
