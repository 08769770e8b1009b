"""The EasyEdit door, by the shapes in which EasyEdit calls a method, and by EasyEdit itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from baft_intervention.config import BaftConfig
from baft_intervention.errors import BaftError, ConfigError, EditError, RequestError
from baft_intervention.integrations import easyedit
from baft_intervention.integrations.easyedit import BaFTHyperParams, EditedModel, apply_baft_to_model
from edits import PROMPTS, config, digest, hooks, logits
from tiny import tiny_model, tiny_tokenizer

HPARAMS = BaFTHyperParams("tiny", config(weighting="constant", layers=(1,)))


def request(prompt: str, target: str, subject: str, **more: Any) -> dict[str, Any]:
    """A request with every field that EasyEdit's own preparation puts into it."""
    return {
        "prompt": prompt, "target_new": target, "ground_truth": "<|endoftext|>", "subject": subject,
        "portability": {"one_hop": {"prompt": ["The name of the capital is", "He was"], "ground_truth": ["x", "y"]}},
        "locality": {"neighborhood": {"prompt": "The president of France is", "ground_truth": "z"}},
        "rephrase_prompt": f"Well, {prompt[0].lower()}{prompt[1:]}", "loc_prompt": "Who is she? Leo", **more,
    }  # fmt: skip


FRANCE = request("The capital of France is", "Japan", "France")
LEO = request("The mother tongue of Leo is", "city", "Leo")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path_factory.getbasetemp() / "easyedit-cache"))


@pytest.fixture(params=["left", "right"])
def tok(request) -> Any:
    return tiny_tokenizer(request.param)


def answers(model: Any, tok: Any, prompts: list[str], targets: list[str]) -> list[list[int]]:
    """Argmax ids along the target, as an evaluation finds them that feeds prompt and answer at once, padded on the left."""
    side, tok.padding_side = tok.padding_side, "left"
    both = tok([f"{p} {t}" for p, t in zip(prompts, targets, strict=True)], padding=True, return_tensors="pt")
    alone = [len(tok(p)["input_ids"]) for p in prompts]
    tok.padding_side = side
    with torch.no_grad():
        found = model(**both.to(model.device))
    found = (found if isinstance(found, torch.Tensor) else found.logits).argmax(-1)
    starts = (both["attention_mask"] == 0).sum(1).tolist()
    return [row[s + n - 1 : -1].tolist() for row, s, n in zip(found, starts, alone, strict=True)]


def reached(model: Any, tok: Any, *asked: dict[str, Any]) -> list[bool]:
    found = answers(model, tok, [r["prompt"] for r in asked], [r["target_new"] for r in asked])
    return [tok.decode(ids[: len(tok(" " + r["target_new"])["input_ids"])]).strip() == r["target_new"]
            for ids, r in zip(found, asked, strict=True)]  # fmt: skip


def state_of(model: nn.Module, tok: Any) -> Any:
    return digest(model), hooks(model), [logits(model, tok, prompt).tolist() for prompt in PROMPTS]


def test_single_edit_and_restore(tok):
    model = tiny_model("llama")
    before = state_of(model, tok)
    edited, restore = apply_baft_to_model(
        model, tok, [FRANCE], HPARAMS, copy=False, return_orig_weights=True, keep_original_weight=False, train_ds=None
    )
    assert reached(edited, tok, FRANCE) == [True]
    assert digest(model) == before[0]  # no weight is written
    restore()
    assert state_of(model, tok) == before
    restore()  # harmless
    assert state_of(model, tok) == before


def test_the_next_single_edit_after_a_restore(tok):
    model = tiny_model("llama")
    _, restore = apply_baft_to_model(model, tok, [FRANCE], HPARAMS)
    restore()
    edited, restore = apply_baft_to_model(model, tok, [LEO], HPARAMS)
    assert reached(edited, tok, FRANCE, LEO) == [False, True]
    assert len(edited.editor.edits) == 1
    assert list(restore.items()) == []  # of a method that it does not know EasyEdit writes the items back as weights
    assert hooks(model) == {}


def test_sequential_edits_add_up_and_the_last_object_answers_for_all(tok):
    model = tiny_model("llama")
    before = state_of(model, tok)
    _, first = apply_baft_to_model(model, tok, [FRANCE], HPARAMS)
    after_one = state_of(model, tok)[2]
    edited, second = apply_baft_to_model(model, tok, [LEO], HPARAMS)
    assert reached(edited, tok, FRANCE, LEO) == [True, True]
    again, _ = apply_baft_to_model(edited, tok, [LEO | {"target_new": "capital"}], HPARAMS)  # the edited object will do
    assert reached(again, tok, FRANCE, LEO | {"target_new": "capital"}) == [True, True]
    second()
    assert state_of(model, tok)[2] == after_one
    first()
    assert state_of(model, tok) == before


def test_a_batch(tok):
    edited, _ = apply_baft_to_model(tiny_model("llama"), tok, [FRANCE, LEO], HPARAMS, keep_original_weight=True)
    assert reached(edited, tok, FRANCE, LEO) == [True, True]
    assert len(edited.editor.edits) == 2


def test_the_default_gate_too(tok):
    hparams = BaFTHyperParams("tiny", config())
    edited, restore = apply_baft_to_model(tiny_model("llama"), tok, [FRANCE, LEO], hparams)
    assert reached(edited, tok, FRANCE, LEO) == [True, True]
    restore()
    assert reached(edited, tok, FRANCE, LEO) == [False, False]


def test_copy_leaves_the_model_alone_and_takes_its_edits_along(tok):
    model = tiny_model("llama")
    before = state_of(model, tok)
    edited, _ = apply_baft_to_model(model, tok, [FRANCE], HPARAMS, copy=True)
    assert edited.model is not model
    assert state_of(model, tok) == before
    twin, restore = apply_baft_to_model(edited, tok, [LEO], HPARAMS, copy=True)
    assert reached(twin, tok, FRANCE, LEO) == [True, True]
    assert reached(edited, tok, FRANCE, LEO) == [True, False]
    restore()
    assert reached(twin, tok, FRANCE, LEO) == [True, False]


def test_what_an_edited_model_answers(tok):
    model = tiny_model("llama")
    edited, _ = apply_baft_to_model(model, tok, [FRANCE], HPARAMS)
    assert edited.config is model.config
    assert edited.device == torch.device("cpu")
    assert {p.data_ptr() for p in edited.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert edited.train() is edited
    assert model.training
    assert edited.eval() is edited
    assert not model.training
    assert edited.generation_config is model.generation_config  # anything else is the base model's
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = edited.no_such_thing
    prompt = tok(FRANCE["prompt"], return_tensors="pt")
    out = edited.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tok.decode(out[0, prompt["input_ids"].shape[1] :]).strip() == "Japan"
    assert tok.decode(edited(prompt["input_ids"]).logits[0, -1].argmax()).strip() == "Japan"  # by position, no mask


def test_a_row_is_cut_at_the_longest_prompt_that_is_known(tok):
    edited, _ = apply_baft_to_model(tiny_model("llama"), tok, [FRANCE], HPARAMS)
    asked = [FRANCE["prompt"], FRANCE["rephrase_prompt"], FRANCE["loc_prompt"], "The president of France is", "He was"]
    for prompt in asked:  # the same answers as with the end of the prompt told
        ids = tok(f"{prompt} Paris and", return_tensors="pt")
        length = len(tok(prompt)["input_ids"])
        with torch.no_grad(), edited.editor.adapter.prompts([length]):
            told = edited.model(**ids).logits
        torch.testing.assert_close(edited(**ids).logits, told)
    unknown = tok("Paris is not in Japan", return_tensors="pt")
    torch.testing.assert_close(edited(**unknown).logits, edited.model(**unknown).logits)


def test_the_default_gate_needs_no_prompt(tok):
    edited, _ = apply_baft_to_model(tiny_model("llama"), tok, [FRANCE], BaFTHyperParams("tiny", config()))
    assert edited.state.prompts == set()
    assert reached(edited, tok, FRANCE) == [True]
    ids = tok(f"{FRANCE['prompt']} Paris and", return_tensors="pt")
    with torch.no_grad(), edited.editor.adapter.prompts([2]):  # whatever is told
        told = edited(**ids).logits
    assert torch.equal(edited(**ids).logits, told)


def test_prompts_and_requests_are_read_from_easyedits_fields():
    assert easyedit.prompts_of(FRANCE) == [
        FRANCE["prompt"], FRANCE["rephrase_prompt"], "Who is she? Leo", "The president of France is",
        "The name of the capital is", "He was",
    ]  # fmt: skip
    assert easyedit.prompts_of({"prompt": "a", "target_new": "b", "rephrase_prompt": ["c", "a"], "locality": None}) == [
        "a",
        "c",
    ]
    plain = easyedit.to_edit_request(FRANCE)
    assert (plain.prompt, plain.target_new, plain.subject, plain.target_true, plain.probes) == (
        FRANCE["prompt"], "Japan", "France", (), (),
    )  # fmt: skip
    assert easyedit.to_edit_request({"prompt": "a", "target_new": "b", "ground_truth": "c"}).target_true == ("c",)


@pytest.mark.parametrize(
    ("requests", "error", "match"),
    [
        ([], RequestError, "there is no request to edit"),
        ([{"prompt": "a"}], RequestError, "field 'target_new' is missing; the request has 'prompt'"),
        ([3], RequestError, "a request must be an object"),
        ([{"prompt": "a", "target_new": ""}], RequestError, "target_new is empty"),
        ([FRANCE, FRANCE], RequestError, "the same prompt is edited twice"),
    ],
)
def test_a_bad_request_leaves_the_model_as_it_was(tok, requests, error, match):
    model = tiny_model("llama")
    before = state_of(model, tok)
    with pytest.raises(error, match=match):
        apply_baft_to_model(model, tok, requests, HPARAMS)
    assert state_of(model, tok) == before
    _, restore = apply_baft_to_model(model, tok, [LEO], HPARAMS)
    after = state_of(model, tok)
    with pytest.raises(error, match=match):
        apply_baft_to_model(model, tok, requests, HPARAMS)
    assert state_of(model, tok) == after
    restore()
    assert state_of(model, tok) == before


def test_a_failing_edit_and_other_settings(tok):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[7, 3] = float("nan")
    before = digest(broken), hooks(broken)
    with pytest.raises(EditError, match="the loss is nan"):
        apply_baft_to_model(broken, tok, [FRANCE], HPARAMS)
    assert (digest(broken), hooks(broken)) == before
    model = tiny_model("llama")
    apply_baft_to_model(model, tok, [FRANCE], HPARAMS)
    with pytest.raises(ConfigError, match="made with other settings"):
        apply_baft_to_model(model, tok, [LEO], BaFTHyperParams("tiny", BaftConfig(weighting="constant")))


# ------------------------------------------------------------------------------------------ settings


def test_the_shipped_settings_are_those_of_the_issue():
    named = {"llama-2-7b", "llama-3-8b", "gemma-2-9b", "qwen2.5-7b", "smollm2-135m"}
    assert set(easyedit.shipped_hparams()) == named


@pytest.mark.parametrize("name", easyedit.shipped_hparams())
def test_every_shipped_file_is_read_and_has_what_easyedit_asks_for(name):
    hparams = BaFTHyperParams.from_hparams(name)
    assert hparams == BaFTHyperParams.from_hparams(easyedit.HPARAMS / f"{name}.yaml")
    assert hparams == BaFTHyperParams.from_hparams(str(easyedit.HPARAMS / name))
    assert (hparams.alg_name, hparams.batch_size, hparams.model_parallel, hparams.fp16) == ("BaFT", 1, False, False)
    assert isinstance(hparams.device, int)
    assert isinstance(hparams.max_length, int)
    assert name.split("-")[0][:5] in hparams.model_name.lower()
    assert hparams.config == BaftConfig()  # the defaults, written out
    assert BaFTHyperParams.from_dict(hparams.to_dict()) == hparams


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("alg_name: ROME\nmodel_name: x", "alg_name is 'ROME'; it must be 'BaFT'"),
        ("alg_name: BaFT", "model_name is missing"),
        ("alg_name: BaFT\nmodel_name: 3", "model_name is 3; it must be of type str"),
        ("alg_name: BaFT\nmodel_name: x\nbatch_size: true", "batch_size is True; it must be of type int"),
        ("alg_name: BaFT\nmodel_name: x\nranks: 3", "unknown setting 'ranks'"),
        ("alg_name: BaFT\nmodel_name: x\nlearning_rate: fast", "learning_rate is 'fast'"),
        ("- a", "settings must be a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("", "settings must be a mapping"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, match):
    (tmp_path / "h.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'h.yaml'}: {match}"):
        BaFTHyperParams.from_hparams(tmp_path / "h.yaml")
    with pytest.raises(BaftError, match="there is no settings file 'nowhere'.*smollm2-135m"):
        BaFTHyperParams.from_hparams("nowhere")


def test_a_number_that_yaml_takes_for_a_text(tmp_path):
    (tmp_path / "h.yaml").write_text("alg_name: BaFT\nmodel_name: x\nlearning_rate: 5e-3\nlayers: [3]\n")
    assert BaFTHyperParams.from_hparams(tmp_path / "h").config == BaftConfig(learning_rate=5e-3, layers=(3,))


@pytest.mark.slow
def test_with_easyedit_itself(tmp_path):
    """Its own BaseEditor edits, evaluates and takes back, one by one and as a batch; in a process of its own."""
    if importlib.util.find_spec("easyeditor") is None:
        pytest.skip("EasyEdit is not installed; pip install --no-deps easyeditor==0.0.1.dev0")
    script = Path(__file__).resolve().parents[1] / "easyedit_run.py"
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    for metrics in (told["single"], told["batch"]):
        assert [m["pre"]["rewrite_acc"] for m in metrics] == [[0.0], [0.0]]
        assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0], [1.0]]
    assert all("near_acc" in m["post"]["locality"] and "hop_acc" in m["post"]["portability"] for m in told["single"])
    assert (told["hooks_after_single"], told["edits_after_batch"], told["weights_unchanged"]) == (0, 0, True)


def test_without_easyedit_registering_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(ImportError, match="easyeditor"):
        easyedit.register()
    assert issubclass(EditedModel, nn.Module)
