"""The scorer against one plain forward pass a query, and against EasyEdit's definitions."""

import numpy as np
import pytest
import torch

from baft_intervention.errors import EditError
from baft_intervention.evaluation.baseline_outputs import BaselineCache
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.methods import make_method
from baft_intervention.evaluation.record_metrics import record_metrics
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.requests import EditRequest, Probe
from evaluation.helpers import log_probs_of, make_requests, nudge, slow_query
from tiny import tiny_model, tiny_tokenizer


def assert_scores_are_slow_ones(scorer, edited, requests, before, after):
    """``before`` and ``after``: functions of a query giving its log-probabilities."""
    for request, scores in zip(requests, scorer.score(edited, requests), strict=True):
        queries = scorer.queries(request).queries
        assert len(scores) == len(queries)
        for query, score in zip(queries, scores, strict=True):
            slow = slow_query(before(query), after(query), query)
            assert score.predicted == slow["predicted"]
            assert score.before == slow["before"]
            assert score.log_probs == pytest.approx(slow["log_probs"], abs=2e-4)
            assert score.divergence == pytest.approx(slow["divergence"], abs=2e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_scores_are_those_of_one_pass_a_query(arch, side, add_bos):
    tokenizer, requests = tiny_tokenizer(side, add_bos=add_bos), make_requests(4)
    plain, model = tiny_model(arch), tiny_model(arch)
    scorer = Scorer(model, tokenizer)
    scorer.prepare(requests)
    edited = EditedModel(nudge(model), tokenizer)
    edited.first_changed_block = 2

    def before(query):
        return log_probs_of(plain, [*query.prompt_ids, *query.target_ids])

    def after(query):
        return log_probs_of(model, [*query.prompt_ids, *query.target_ids])

    assert_scores_are_slow_ones(scorer, edited, requests, before, after)


def test_an_edit_at_the_last_prompt_token_is_found_in_every_row():
    pytest.importorskip("pyreft")
    tokenizer, requests = tiny_tokenizer(), make_requests(3)
    model, plain = tiny_model(), tiny_model()
    scorer = Scorer(model, tokenizer)
    scorer.prepare(requests)
    edited = make_method("loreft", {"rank": 2, "layer": 1, "steps": 3}).edit(model, tokenizer, requests[:1])

    def after(query):
        with edited.prompts([len(query.prompt_ids)]):
            return log_probs_of(model, [*query.prompt_ids, *query.target_ids])

    def before(query):
        return log_probs_of(plain, [*query.prompt_ids, *query.target_ids])

    assert_scores_are_slow_ones(scorer, edited, requests, before, after)


def test_scoring_together_is_scoring_alone(tiny_llama, tokenizer):
    requests = make_requests(6)
    scorer = Scorer(tiny_llama, tokenizer)
    scorer.prepare(requests)
    edited = EditedModel(nudge(tiny_llama), tokenizer)
    for together, request in zip(scorer.score(edited, requests), requests, strict=True):
        [alone] = scorer.score(edited, [request])
        assert [s.predicted for s in together] == [s.predicted for s in alone]


def test_the_unedited_model_has_not_moved(any_model, tokenizer):
    requests = make_requests(2)
    scorer = Scorer(any_model, tokenizer)
    scorer.prepare(requests)
    for scores in scorer.score(EditedModel(any_model, tokenizer), requests):
        assert all(s.predicted == s.before for s in scores)
        assert max(x for s in scores for x in s.divergence) < 1e-6


@pytest.mark.parametrize("keep_log_probs", [False, True])
def test_what_is_kept_of_the_unedited_model_does_not_change_scores(tokenizer, keep_log_probs):
    requests, model = make_requests(2), tiny_model("gemma2")
    scorer = Scorer(model, tokenizer, keep_log_probs=keep_log_probs, resume_depths=() if keep_log_probs else (0.5,))
    scorer.prepare(requests)
    edited = EditedModel(nudge(model, 3), tokenizer)
    edited.first_changed_block = 3
    found = [x for scores in scorer.score(edited, requests) for s in scores for x in s.divergence]
    other = Scorer(tiny_model("gemma2"), tokenizer)
    other.prepare(requests)
    model2 = EditedModel(nudge(other.model, 3), tokenizer)
    wanted = [x for scores in other.score(model2, requests) for s in scores for x in s.divergence]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_an_edit_of_the_head_needs_log_probs(tiny_llama, tokenizer):
    requests = make_requests(1)
    scorer = Scorer(tiny_llama, tokenizer)
    scorer.prepare(requests)
    edited = EditedModel(tiny_llama, tokenizer)
    edited.head_intact = False
    with pytest.raises(RuntimeError, match="keep_log_probs=True"):
        scorer.score(edited, requests)


def test_a_wrong_claim_about_unchanged_blocks_is_found_out(tiny_llama, tokenizer, caplog):
    requests = make_requests(2)
    scorer = Scorer(tiny_llama, tokenizer, resume_depths=(0.75,))
    scorer.prepare(requests)
    edited = EditedModel(nudge(tiny_llama, 0), tokenizer)
    edited.first_changed_block = 3  # not so: block 0 was changed
    found = [*scorer.score(edited, requests[:1]), *scorer.score(edited, requests[1:])]
    assert "all blocks are computed" in caplog.text
    for score in [s for scores in found for s in scores]:
        after = log_probs_of(tiny_llama, [*score.query.prompt_ids, *score.query.target_ids])
        assert score.predicted == slow_query(after, after, score.query)["predicted"]


def test_score_never_asks_the_edited_model_for_the_unedited_ones_answers(tiny_llama, tokenizer):
    scorer = Scorer(tiny_llama, tokenizer)
    with pytest.raises(RuntimeError, match="call prepare"):
        scorer.score(EditedModel(tiny_llama, tokenizer), make_requests(1))


def test_logits_that_are_not_finite_are_an_edit_error(tiny_llama, tokenizer):
    requests = make_requests(1)
    scorer = Scorer(tiny_llama, tokenizer)
    scorer.prepare(requests)
    with torch.no_grad():
        tiny_llama.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(EditError, match="not finite"):
        scorer.score(EditedModel(tiny_llama, tokenizer), requests)


# --- the unedited model's answers --------------------------------------------------------------------------------------


def test_answers_are_computed_once_and_found_again(tiny_llama, tokenizer, tmp_path):
    requests = make_requests(3)
    assert Scorer(tiny_llama, tokenizer, cache=BaselineCache(tmp_path)).prepare(requests) == 3
    scorer = Scorer(tiny_llama, tokenizer, cache=BaselineCache(tmp_path))
    assert scorer.prepare(requests) == 0
    fresh = Scorer(tiny_llama, tokenizer)
    fresh.prepare(requests)
    for request in requests:
        kept, made = (
            scorer.baseline(request, blocks=scorer.resume_blocks),
            fresh.baseline(request, blocks=fresh.resume_blocks),
        )
        assert kept.predicted == made.predicted
        assert [pytest.approx(row) for row in made.log_probs] == kept.log_probs
        assert torch.equal(kept.states, made.states)
        assert all(torch.equal(kept.block_inputs[b], made.block_inputs[b]) for b in scorer.resume_blocks)


@pytest.mark.parametrize("change", ["weights", "probe", "settings", "code"])
def test_a_stale_answer_is_not_found(tiny_llama, tokenizer, tmp_path, monkeypatch, change):
    requests = make_requests(1)
    store = BaselineCache(tmp_path)
    Scorer(tiny_llama, tokenizer, cache=store).prepare(requests)
    more = {}
    if change == "weights":
        nudge(tiny_llama, 3, size=1e-3)
    elif change == "probe":
        probe = Probe("The capital of France is", "locality", ("London",))
        requests = [EditRequest(requests[0].prompt, requests[0].target_new, probes=(probe,))]
    elif change == "settings":
        more = {"token_budget": 64}
    else:
        monkeypatch.setattr("baft_intervention.evaluation.scoring.code_version", lambda: "another")
    assert Scorer(tiny_llama, tokenizer, cache=store, **more).prepare(requests) == 1


@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_a_damaged_answer_is_not_used(tiny_llama, tokenizer, tmp_path, caplog, damage):
    requests = make_requests(1)
    Scorer(tiny_llama, tokenizer, cache=BaselineCache(tmp_path)).prepare(requests)
    [path] = tmp_path.rglob("*.safetensors")
    if damage is None:  # another record's file under this name
        data = path.read_bytes().replace(path.stem.encode(), b"0" * 64)
        path.write_bytes(data)
    else:
        path.write_bytes(damage)
    scorer = Scorer(tiny_llama, tokenizer, cache=BaselineCache(tmp_path))
    scorer.prepare(requests)
    [scores] = scorer.score(EditedModel(tiny_llama, tokenizer), requests)
    assert all(s.predicted == s.before for s in scores)
    assert "computed again" in caplog.text


def test_memory_keeps_few_block_inputs(tiny_llama, tokenizer):
    requests = make_requests(4)
    scorer = Scorer(tiny_llama, tokenizer, cache=BaselineCache(None, blocks_in_memory=2))
    scorer.prepare(requests)
    kept = [bool(scorer.baseline(r).block_inputs) for r in requests]
    assert kept == [False, False, True, True]
    edited = EditedModel(nudge(tiny_llama, 3), tokenizer)
    edited.first_changed_block = 3
    scorer.score(edited, requests)  # without them all blocks are computed


# --- EasyEdit's definitions ------------------------------------------------------------------------------------------------


def easyedit_predictions(model, tokenizer, prompt, target):
    """EasyEdit's ``test_prediction_acc``, in its own steps: the boundary by *counting* the prompt's tokens."""
    joint = tokenizer(prompt + " " + target)["input_ids"]
    length = len(tokenizer(prompt)["input_ids"])
    answers = model(input_ids=torch.tensor([joint])).logits[0].argmax(-1).tolist()
    return answers[length - 1 : -1], joint[length:]


def easyedit_accuracy(model, tokenizer, prompt, target):
    answers, labels = easyedit_predictions(model, tokenizer, prompt, target)
    return np.mean(np.equal(answers, labels))


def test_token_accuracy_locality_and_portability_are_easyedits(tokenizer):
    model, plain = tiny_model(), tiny_model()
    request = EditRequest(
        "The capital of Japan is",
        "Osaka",
        probes=(
            Probe("Japan: the capital is", "rephrase", ("Osaka",)),
            Probe("The mother tongue of Leo is", "portability", ("French", "the French"), group="Reasoning"),
            Probe("He works as", "portability", ("a painter in Rome",), group="Reasoning"),
            Probe("The capital of France is", "locality", ("Paris is a city",), group="Relation_Specificity"),
            Probe("The Eiffel Tower is located in", "locality", ("the city of London",), group="Relation_Specificity"),
        ),
    )
    scorer = Scorer(model, tokenizer)
    scorer.prepare([request])
    edited = make_method("ft-m", {"layer": 2, "learning_rate": 2e-2, "steps": 4}).edit(model, tokenizer, [request])
    metrics, _ = record_metrics(scorer.queries(request), scorer.score(edited, [request])[0])

    accuracy = {p.prompt: easyedit_accuracy(model, tokenizer, p.prompt, p.answers[0]) for p in request.probes}
    assert metrics["reliability_easyedit"] == pytest.approx(
        easyedit_accuracy(model, tokenizer, request.prompt, "Osaka")
    )
    assert metrics["generality_easyedit"] == pytest.approx(accuracy["Japan: the capital is"])
    # portability: the mean over the group's questions, the first alias of each
    assert metrics["portability_easyedit"] == pytest.approx(
        np.mean([accuracy["The mother tongue of Leo is"], accuracy["He works as"]])
    )
    still = [
        np.mean(
            np.equal(easyedit_predictions(plain, tokenizer, p, a)[0], easyedit_predictions(model, tokenizer, p, a)[0])
        )
        for p, a in (
            ("The capital of France is", "Paris is a city"),
            ("The Eiffel Tower is located in", "the city of London"),
        )
    ]
    assert metrics["locality_easyedit"] == pytest.approx(np.mean(still))
    assert 0 < metrics["locality_easyedit"] < 1 or 0 < metrics["reliability_easyedit"] < 1  # the case shows something
    # no lone space here, so the library's own counting agrees
    assert metrics["locality"] == metrics["locality_easyedit"]
    assert metrics["reliability"] == metrics["reliability_easyedit"]


def test_a_lone_space_token_is_a_point_for_easyedit_and_none_here(tokenizer):
    """ " 2006" is Ġ 2 0 0 6: EasyEdit counts five tokens, of which the first asks for nothing."""
    model = tiny_model()
    request = EditRequest("He was born in", "2006")
    answers, labels = easyedit_predictions(model, tokenizer, request.prompt, "2006")
    assert tokenizer.decode([labels[0]]) == " "
    scorer = Scorer(model, tokenizer)
    scorer.prepare([request])
    metrics, _ = record_metrics(scorer.queries(request), scorer.score(EditedModel(model, tokenizer), [request])[0])
    assert metrics["reliability_easyedit"] == pytest.approx(np.mean(np.equal(answers, labels)))
    assert metrics["reliability"] == pytest.approx(np.mean(np.equal(answers[1:], labels[1:])))
    assert len(labels) == 5
