"""Each method edits a tiny model, holds what it promises, and gives the model back byte for byte."""

from pathlib import Path

import pytest
import torch
import yaml

from baft_intervention.errors import ConfigError, EditError
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.fit import training_batches
from baft_intervention.evaluation.methods import Method, load_method, make_method, method_names, register_method
from baft_intervention.evaluation.methods import base as registry
from baft_intervention.evaluation.methods.weights import down_projection
from baft_intervention.evaluation.record_metrics import record_metrics
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.fingerprint import model_fingerprint
from baft_intervention.models.structure import find_blocks, hidden_size
from baft_intervention.requests import EditRequest
from edits import BANK
from evaluation.helpers import make_requests
from tiny import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "methods"
# settings under which a random model with d = 32 takes an edit in few steps
TRY = {
    "base": {},
    "icl": {},
    "ft-m": {"layer": 2, "learning_rate": 5e-2, "steps": 60},
    "ft-l": {"layer": 2, "learning_rate": 5e-2, "steps": 60, "norm_constraint": 0.0},
    "lora": {"first_layer": 0.5, "learning_rate": 5e-2, "steps": 60, "rank": 4},
    "adalora": {"first_layer": 0.5, "learning_rate": 5e-2, "steps": 30, "rank": 4, "initial_rank": 6},
    "loreft": {"layer": 2, "learning_rate": 5e-2, "rank": 4},
    "direft": {"layer": 2, "learning_rate": 5e-2, "rank": 4},
    "baft": {"config": {"rank": 4, "layers": [2], "learning_rate": 5e-2, "weighting": "constant"}},
    "baft-linear": {"config": {"rank": 4, "layers": [2], "learning_rate": 5e-2, "weighting": "linear"}},
}
TRAINED = [name for name in TRY if name not in ("base", "icl")]


@pytest.fixture
def method(request):
    if request.param in ("loreft", "direft"):
        pytest.importorskip("pyreft")
    if request.param in ("lora", "adalora"):
        pytest.importorskip("peft")
    return make_method(request.param, TRY[request.param])


each = pytest.mark.parametrize("method", TRY, indirect=True)
each_trained = pytest.mark.parametrize("method", TRAINED, indirect=True)
# one of the methods that share a class for the edited model; AdaLoRA has state of its own
each_kind = pytest.mark.parametrize("method", ["ft-m", "lora", "adalora", "loreft", "baft"], indirect=True)
REQUEST = EditRequest("The capital of Japan is", "city", subject="Japan")  # one token, so that one position can hold it


def state_of(model):
    """Everything that an edit could leave behind."""
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    own = sorted(set(model.__dict__) | {k for b in find_blocks(model) for k in b.__dict__})
    return model_fingerprint(model), hooks, flags, own, [type(m) for m in model.modules()]


def loss_of(edited, request):
    """Mean negative log-likelihood of the target under an edited model."""
    scorer = Scorer(edited.model, edited.tokenizer)
    [record] = [scorer.queries(request)]
    scorer.prepare([request])  # of no interest here
    [scores] = scorer.score(edited, [request])
    first = scores[record.questions[0].wanted[0]]
    return -sum(first.log_probs) / len(first.log_probs)


@each
def test_restore_gives_the_model_back_byte_for_byte(method, tiny_llama, tokenizer):
    for parameter in list(tiny_llama.parameters())[:3]:
        parameter.requires_grad_(False)
    before = state_of(tiny_llama)
    edited = method.edit(tiny_llama, tokenizer, [REQUEST])
    edited.restore()
    assert state_of(tiny_llama) == before
    edited.restore()  # harmless twice
    assert state_of(tiny_llama) == before


@each_trained
def test_an_edit_makes_its_target_likely(method, tiny_llama, tokenizer):
    unedited = loss_of(EditedModel(tiny_llama, tokenizer), REQUEST)
    edited = method.edit(tiny_llama, tokenizer, [REQUEST])
    edited_loss = loss_of(edited, REQUEST)
    cost = edited.cost
    edited.restore()
    assert edited_loss < unedited / 3
    assert cost.steps >= 1
    assert cost.final_loss is not None
    if method.name != "adalora":  # which prunes after the loss is taken
        assert cost.final_loss < 1.0  # a head with d = 32 cannot be surer
        assert cost.final_loss == pytest.approx(edited_loss, abs=0.05)
    assert cost.trained_parameters > 0
    assert cost.adapter_bytes >= 4 * cost.trained_parameters


@each
def test_same_settings_same_edit(method, tokenizer):
    answers = []
    for _ in range(2):
        model = tiny_model()
        edited = method.edit(model, tokenizer, [REQUEST])
        answers.append((edited.cost, loss_of(edited, REQUEST), edited.generate(["He works as"], 5)))
        edited.restore()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["base", "icl", "ft-m", "lora", "adalora", "loreft", "baft"], indirect=True)
def test_after_reset_an_edit_is_as_if_it_were_the_first(method, tiny_llama, tokenizer):
    edited = method.attach(tiny_llama, tokenizer)
    edited.apply([REQUEST])
    first = edited.cost, loss_of(edited, REQUEST)
    edited.reset()
    edited.apply([EditRequest("He works as", "a painter")])
    edited.reset()
    edited.apply([REQUEST])
    assert (edited.cost, loss_of(edited, REQUEST)) == first
    edited.restore()


@each_kind
def test_a_batch_and_a_sequence_of_edits(method, tiny_llama, tokenizer):
    other = EditRequest("He works as", "Leo", subject="He")
    before = model_fingerprint(tiny_llama)
    unedited = loss_of(EditedModel(tiny_llama, tokenizer), other)
    for calls in ([[REQUEST, other]], [[REQUEST], [other]]):
        edited = method.attach(tiny_llama, tokenizer)
        for call in calls:
            edited.apply(call)
        assert loss_of(edited, other) < unedited
        edited.restore()
        assert model_fingerprint(tiny_llama) == before


@each_kind
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_edit_leaves_what_was_there(method, tiny_llama, tokenizer, monkeypatch, earlier):
    before = state_of(tiny_llama)
    edited = method.attach(tiny_llama, tokenizer)
    if earlier:
        edited.apply([REQUEST])
    losses = loss_of(edited, REQUEST)
    bad = EditRequest("He works as", "a painter")

    def nan(*args, **kwargs):
        raise EditError("the loss is nan after 3 steps; lower the learning rate")

    where = "baft_intervention.editor.editor.make_jobs" if method.name.startswith("baft") else None
    monkeypatch.setattr(where or f"{type(edited).__module__}.fit", nan)
    with pytest.raises(EditError, match=r"He works as.*lower the learning rate"):
        edited.apply([bad])
    monkeypatch.undo()
    assert loss_of(edited, REQUEST) == losses
    edited.restore()
    assert state_of(tiny_llama) == before


@each_kind
def test_generation_has_the_edit_at_the_prompt(method, tiny_llama, tokenizer):
    """The first generated token is what teacher forcing says after the prompt, in a batch of unequal prompts."""
    edited = method.edit(tiny_llama, tokenizer, [REQUEST])
    prompts = [REQUEST.prompt, "He", "The name of the country of citizenship of Leo is"]
    together = edited.generate(prompts, 4)
    assert together == [edited.generate([p], 4)[0] for p in prompts]
    assert together[0].startswith(" city") or method.name == "adalora"
    edited.restore()


def test_icl_puts_facts_before_the_question(tiny_llama, tokenizer):
    edited = make_method("icl").edit(tiny_llama, tokenizer, [REQUEST])
    assert edited.rewrite("Who?") == "New Fact: The capital of Japan is city\nPrompt: Who?"
    edited.apply([EditRequest("He works as", "Leo"), EditRequest(REQUEST.prompt, "Rome")])
    assert edited.rewrite("Who?").splitlines() == [
        "New Fact: He works as Leo", "New Fact: The capital of Japan is Rome", "Prompt: Who?",
    ]  # fmt: skip
    edited.restore()
    assert edited.rewrite("Who?") == "Who?"


def test_icl_keeps_the_latest_facts_that_fit(tiny_llama, tokenizer):
    edited = make_method("icl").edit(tiny_llama, tokenizer, make_requests(40))
    assert len(tokenizer(edited.text)["input_ids"]) < 256
    assert "in 39" in edited.text
    assert edited.text.count("New Fact") < 40


def test_icl_scores_the_answer_behind_the_facts(tiny_llama, tokenizer):
    scorer = Scorer(tiny_llama, tokenizer)
    scorer.prepare([REQUEST])
    edited = make_method("icl").edit(tiny_llama, tokenizer, [REQUEST])
    [scores] = scorer.score(edited, [REQUEST])
    prompt = tokenizer(edited.rewrite(REQUEST.prompt))["input_ids"]
    target = list(scores[0].query.target_ids)
    logits = tiny_llama(input_ids=torch.tensor([prompt + target])).logits[0]
    assert list(scores[0].predicted) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_ft_m_masks_the_prompt_and_ft_l_predicts_from_its_last_token(tiny_llama, tokenizer):
    [plain] = training_batches([REQUEST], tiny_llama, tokenizer)
    prompt = len(tokenizer(REQUEST.prompt)["input_ids"])
    target = tokenizer(REQUEST.prompt + " city")["input_ids"][prompt:]
    assert plain.columns.tolist() == [prompt - 1 + j for j in range(len(target))]
    assert plain.targets.tolist() == target
    assert plain.ids.shape[1] == prompt + len(target) - 1
    request = EditRequest("He was born in", "2006")
    [last] = training_batches([request], tiny_llama, tokenizer, prompt_last=True)
    length = len(tokenizer(request.prompt)["input_ids"])
    assert last.columns.tolist() == [length - 1] * 5
    assert last.ids.shape[1] == length  # the target is not input
    assert last.weights.sum().item() == pytest.approx(1.0)


def test_training_loss_is_the_mean_over_requests_of_the_mean_over_tokens(tiny_llama, tokenizer):
    requests = [REQUEST, EditRequest("He was born in", "2006")]
    [batch] = training_batches(requests, tiny_llama, tokenizer, append_eos=True)
    sizes = [(batch.rows == r).sum().item() for r in (0, 1)]
    for r, size in enumerate(sizes):
        assert batch.weights[batch.rows == r].tolist() == pytest.approx([0.5 / size] * size)
    assert batch.targets[batch.rows == 1][-1].item() == tokenizer.eos_token_id


def test_many_requests_are_trained_in_chunks(tiny_llama, tokenizer, monkeypatch):
    requests = make_requests(6)
    whole = make_method("ft-m", TRY["ft-m"]).edit(tiny_llama, tokenizer, requests)
    loss = whole.cost.final_loss
    whole.restore()
    monkeypatch.setattr("baft_intervention.evaluation.fit._CHUNK_TOKENS", 30)
    assert len(training_batches(requests, tiny_llama, tokenizer)) > 1
    parts = make_method("ft-m", TRY["ft-m"]).edit(tiny_llama, tokenizer, requests)
    assert parts.cost.final_loss == pytest.approx(loss, rel=0.05)
    parts.restore()


def test_a_loss_that_is_not_finite_is_an_edit_error(tiny_llama, tokenizer):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.down_proj.weight.fill_(1e38)  # overflows at the first step
    before = model_fingerprint(tiny_llama)
    with pytest.raises(EditError, match="lower the learning rate"):
        make_method("ft-m", {"layer": 2}).edit(tiny_llama, tokenizer, [REQUEST])
    assert model_fingerprint(tiny_llama) == before


def test_ft_l_stays_in_its_ball(tiny_llama, tokenizer):
    weight = down_projection(find_blocks(tiny_llama)[2], 32)
    before = weight.detach().clone()
    edited = make_method("ft-l", {"layer": 2, "learning_rate": 1e-2, "norm_constraint": 3e-3}).edit(
        tiny_llama, tokenizer, [REQUEST]
    )
    moved = (weight - before).abs().max().item()
    edited.restore()
    assert 2.9e-3 < moved <= 3.001e-3


def test_down_projection_is_found_on_every_architecture(any_model):
    weight = down_projection(find_blocks(any_model)[0], hidden_size(any_model))
    assert sorted(weight.shape) in ([32, 64], [32, 128])


def test_down_projection_that_is_not_there_lists_candidates(tiny_llama):
    with pytest.raises(ConfigError, match="mlp.up_proj"):
        down_projection(find_blocks(tiny_llama)[0], 32, "mlp.nothing")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "phi3"])  # each names its projections in another way
@pytest.mark.parametrize("name", ["ft-m", "lora"])
def test_weight_methods_work_on_every_architecture(name, any_model, tokenizer):
    before = model_fingerprint(any_model)
    unedited = loss_of(EditedModel(any_model, tokenizer), REQUEST)
    edited = make_method(name, TRY[name]).edit(any_model, tokenizer, [REQUEST])
    assert edited.cost.final_loss < unedited - 2
    edited.restore()
    assert model_fingerprint(any_model) == before


@pytest.mark.reft
@pytest.mark.parametrize("name", ["LoreftIntervention", "DireftIntervention"])
def test_hook_and_module_are_pyrefts_model(name, tokenizer):
    """The same parameters in pyreft's ReftModel give the same logits, prompt by prompt (pyvene wants equal lengths)."""
    import pyreft

    model = tiny_model()
    method = make_method("loreft" if name.startswith("L") else "direft", {"layer": 2, "rank": 4, "steps": 5})
    edited = method.edit(model, tokenizer, [REQUEST])
    ids = tokenizer(REQUEST.prompt + " city", return_tensors="pt")["input_ids"]
    last = len(tokenizer(REQUEST.prompt)["input_ids"]) - 1
    with torch.no_grad(), edited.prompts([last + 1]):
        ours = model(input_ids=ids).logits
    module = edited.module
    edited.restore()
    config = pyreft.ReftConfig(
        representations={
            "layer": 2, "component": "block_output", "low_rank_dimension": 4, "intervention": module,
        }
    )  # fmt: skip
    reft = pyreft.get_reft_model(tiny_model(), config)
    with torch.no_grad():
        _, theirs = reft({"input_ids": ids}, unit_locations={"sources->base": (None, [[[last]]])}, use_cache=False)
    torch.testing.assert_close(ours, theirs.logits, rtol=1e-5, atol=1e-5)
    assert (ours - tiny_model()(input_ids=ids).logits).abs().max() > 1e-2


def test_a_bank_of_ones_own_is_the_gates_and_stands_in_the_settings(tiny_llama, tokenizer):
    method = make_method("baft", {"config": {"rank": 4, "weighting": "cosine"}, "bank": list(BANK)})
    assert method.settings()["bank"] == list(BANK)
    assert "bank" not in make_method("baft", {"config": {}}).settings()
    edited = method.attach(tiny_llama, tokenizer)
    assert edited.editor.bank_texts == BANK
    edited.restore()


def test_baft_training_sees_no_probe(tiny_llama, tokenizer, monkeypatch):
    seen = []
    edited = make_method("baft", TRY["baft"]).attach(tiny_llama, tokenizer)
    edit = edited.editor.edit
    monkeypatch.setattr(edited.editor, "edit", lambda requests: seen.extend(requests) or edit(requests))
    edited.apply(make_requests(1))
    assert seen[0].probes == ()
    edited.restore()


def test_baft_with_a_gate_that_reads_an_early_block_is_scored_right(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr("baft_intervention.evaluation.methods.baft.BaftEditor", _with_bank)
    config = {"rank": 4, "layers": [3], "learning_rate": 5e-2, "steps": 10}
    requests = make_requests(2)
    scorer = Scorer(tiny_llama, tokenizer)
    scorer.prepare(requests)
    edited = make_method("baft", {"config": config}).edit(tiny_llama, tokenizer, requests[:1])
    [fast] = scorer.score(edited, requests[:1])
    edited.first_changed_block = 0
    [full] = scorer.score(edited, requests[:1])
    assert [s.predicted for s in fast] == [s.predicted for s in full]
    edited.restore()


def _with_bank(model, tokenizer, config, bank_texts=None):
    from baft_intervention.editor.editor import BaftEditor

    return BaftEditor(model, tokenizer, config, bank_texts=bank_texts or BANK)


# --- registry and settings --------------------------------------------------------------------------------------------


def test_every_method_has_a_yaml_and_defaults_are_what_it_says():
    assert {p.stem for p in FOLDER.glob("*.yaml")} >= set(method_names())
    for name in method_names():
        label, method = load_method(name, FOLDER)
        assert (label, method.name) == (name, name)
        data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert method == make_method(name), f"{name}.yaml and the defaults in the code differ"
        assert set(data) <= {"method", "settings", "about"}
        assert method.settings()["seed"] == 0


def test_a_method_of_ones_own_is_a_class_and_a_yaml(tmp_path, tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    from dataclasses import dataclass

    @register_method("shout")
    @dataclass(frozen=True)
    class Shout(Method):
        loud: bool = False

        def attach(self, model, tokenizer):
            edited = EditedModel(model, tokenizer)
            edited.rewrite = lambda prompt: prompt.upper() if self.loud else prompt
            return edited

    path = tmp_path / "very-loud.yaml"
    path.write_text("method: shout\nsettings:\n  loud: true\n")
    label, method = load_method(str(path))
    assert label == "very-loud"
    assert method.edit(tiny_llama, tokenizer, [REQUEST]).rewrite("a") == "A"
    with pytest.raises(ConfigError, match="registered already"):
        register_method("shout")(Shout)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lorra", {}, "did you mean 'lora'"),
        ("lora", {"rang": 3}, "did you mean 'rank'"),
        ("lora", {"rank": "big"}, "must be a int, e.g. 8"),
        ("ft-m", {"steps": 2.5}, "must be a int"),
        ("baft", {"config": {"rnk": 1}}, "unknown setting 'rnk'"),
        ("baft", {"config": {"seed": 1}}, "give seed as the method's setting"),
        ("icl", {"template": "x"}, "must contain {fact}"),
        ("ft-m", {"layer": 9}, "this model has blocks 0 to 3"),
        ("loreft", {"rank": 99}, "from 1 to the hidden size 32"),
        ("lora", {"target_modules": ["nothing"]}, "set target_modules"),
    ],
)
def test_wrong_settings_are_told(name, settings, message, tiny_llama, tokenizer):
    if name == "loreft":
        pytest.importorskip("pyreft")
    with pytest.raises((ConfigError, EditError), match=message):
        make_method(name, settings).edit(tiny_llama, tokenizer, [REQUEST])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot be read"), ("settings: {}", "needs 'method: NAME'"), ("method: lora\nx: 1", "unknown field 'x'")],
)
def test_wrong_method_files_are_told(tmp_path, text, message):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_method(str(path))


def test_metrics_of_an_edit_from_end_to_end(tokenizer):
    model, requests = tiny_model(), make_requests(1)
    scorer = Scorer(model, tokenizer)
    scorer.prepare(requests)
    edited = make_method("ft-m", TRY["ft-m"]).edit(model, tokenizer, requests)
    metrics, probes = record_metrics(
        scorer.queries(requests[0]),
        scorer.score(edited, requests)[0],
        {"The capital of Japan is": " Osaka."},
        "a b c d",
    )
    assert metrics["reliability"] == 1.0
    assert metrics["efficacy"] == 1.0
    assert metrics["generation_em"] == 1.0
    assert metrics["fluency"] == pytest.approx((2 / 3 * torch.log2(torch.tensor(3.0)).item() + 4 / 3) / 2)
    assert 0 <= metrics["locality"] <= 1
    assert len(probes) == 1 + len(requests[0].probes)
    assert "portability/Reasoning" in metrics
    assert "multi_hop" not in metrics
    tokenizer_left = tiny_tokenizer("left")
    assert edited.generate(["He"], 3) == EditedModel(model, tokenizer_left).generate(["He"], 3)
    edited.restore()
