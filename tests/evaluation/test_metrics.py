"""Every metric against a value worked out by hand."""

import math

import pytest
import torch

from baft_intervention.evaluation import aggregate as agg
from baft_intervention.evaluation import metrics as m


def test_mean_leaves_out_what_has_no_value():
    assert m.mean([1.0, None, 0.0]) == 0.5
    assert m.mean([None, None]) is None
    assert m.mean([]) is None


def test_mean_refuses_nan():
    with pytest.raises(ValueError, match="must be None"):
        m.mean([1.0, float("nan")])


def test_token_accuracy_counts_target_tokens():
    assert m.token_accuracy([5, 6, 7], [5, 6, 8]) == pytest.approx(2 / 3)
    assert m.token_accuracy([], []) is None
    with pytest.raises(ValueError, match="2 predicted tokens for 1 target"):
        m.token_accuracy([1, 2], [1])


def test_lone_space_token_is_a_free_point_for_easyedit_only():
    # " 2006" as Ġ 2 0 0 6; the model writes the space and one digit
    target, predicted = [9, 2, 0, 0, 6], [9, 1, 9, 0, 1]
    lead = m.lead_tokens([" ", "2", "0", "0", "6"])
    assert lead == 1
    assert m.token_accuracy_easyedit(predicted, target) == pytest.approx(2 / 5)
    assert m.token_accuracy(predicted, target, lead) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("texts", "lead"), [(["a", " "], 0), ([" ", "\n", "a"], 2), ([" "], 0), ([" ", " "], 1)])
def test_lead_tokens_never_takes_all(texts, lead):
    assert m.lead_tokens(texts) == lead


def test_all_tokens_right():
    assert m.all_tokens_right([1, 2], [1, 2]) == 1.0
    assert m.all_tokens_right([1, 3], [1, 2]) == 0.0
    assert m.all_tokens_right([0, 2], [1, 2], lead=1) == 1.0


def test_locality_is_agreement_with_the_unedited_model_not_with_the_answer():
    before, after = [3, 4, 5, 6], [3, 4, 0, 0]
    assert m.token_match(before, after) == 0.5
    assert m.token_match(before, before) == 1.0


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert m.kl_divergence(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)
    assert m.kl_divergence(p.log(), p.log()).item() == 0.0


def test_kl_with_impossible_tokens_is_finite():
    p = torch.tensor([1.0, 0.0]).log()
    assert m.kl_divergence(p, p).item() == 0.0


def test_kl_keeps_leading_dimensions():
    logits = torch.zeros(2, 3, 4).log_softmax(-1)
    assert m.kl_divergence(logits, logits).shape == (2, 3)


def test_probability_success_and_magnitude():
    assert m.probability_success(-1.0, [-2.0]) == 1.0
    assert m.probability_success(-1.0, [-2.0, -0.5]) == 0.0
    assert m.probability_success(-1.0, [-1.0]) == 0.0
    assert m.probability_success(-1.0, []) is None
    assert m.probability_magnitude(math.log(0.6), [math.log(0.1)]) == pytest.approx(0.5)


def test_exact_match_is_normalised_and_takes_any_alias():
    assert m.normalise_answer("The  Eiffel-Tower!") == "eiffeltower"
    assert m.exact_match(" the Syrian Pound.", ["SYP", "Syrian pound"]) == 1.0
    assert m.exact_match("Syrian pound and more", ["Syrian pound"]) == 0.0
    assert m.exact_match("x", []) is None


def test_begins_with_answer_is_word_by_word():
    assert m.begins_with_answer("Osaka. The city", ["Osaka"]) == 1.0
    assert m.begins_with_answer("Osakans live", ["Osaka"]) == 0.0
    assert m.begins_with_answer("in Osaka", ["Osaka"]) == 0.0
    assert m.begins_with_answer("", ["Osaka"]) == 0.0


def test_f1_by_hand():
    # two of three words wanted, two of four written: 2*2/(3+4)
    assert m.answer_f1("new york is big", ["new york city"]) == pytest.approx(4 / 7)
    assert m.answer_f1("new york is big", ["x", "new york city"]) == pytest.approx(4 / 7)
    assert m.answer_f1("", ["x"]) == 0.0
    assert m.answer_f1("a", []) is None


def test_multi_hop_needs_one_of_the_questions():
    assert m.multi_hop_accuracy([0, 1, 0]) == 1.0
    assert m.multi_hop_accuracy([0, 0]) == 0.0
    assert m.multi_hop_accuracy([None]) is None


def test_ngram_entropy_by_hand():
    # "a b a b c": bigrams ab ba ab bc -> 1/2 1/4 1/4 = 1.5 bits; trigrams aba bab abc -> log2 3
    expected = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert m.ngram_entropy("a b a b c") == pytest.approx(expected)
    assert m.ngram_entropy("no no no no") == 0.0
    assert m.ngram_entropy("two words") is None


def test_perplexity():
    assert m.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert m.perplexity([]) is None
    assert m.perplexity([-1e6]) == pytest.approx(1e30)


def test_convsent_by_hand():
    # means: desired after -1, opposite after -2, desired before -0.5
    expected = 1 / (1 + math.exp(-1.0)) * math.exp(-0.5)
    assert m.convsent_score([-0.5, -1.5], [-2.0], [-0.5]) == pytest.approx(expected)
    assert m.convsent_score([-0.5], [-2.0], [-1.0]) == pytest.approx(
        1 / (1 + math.exp(-1.5))
    )  # topic term is at most 1
    assert m.convsent_score([], [-2.0], [-1.0]) is None
    assert 0 <= m.convsent_score([-2000.0], [-1.0], [-1.0]) < 1e-6


def test_aggregate_is_the_mean_over_records():
    records = [{"locality": 0.0, "generality": None}, {"locality": 1.0, "generality": 0.25}, {"locality": 1.0}]
    table = agg.aggregate(records)
    assert table["locality"]["mean"] == pytest.approx(2 / 3)
    assert table["locality"]["n"] == 3
    assert table["generality"] == {"mean": 0.25, "n": 1, "ci_low": None, "ci_high": None}


def test_aggregate_without_any_value_says_so():
    assert agg.aggregate([{"x": None}])["x"] == {"mean": None, "n": 0, "ci_low": None, "ci_high": None}


def test_bootstrap_is_seeded_and_holds_the_mean():
    values = [0.0, 1.0] * 50
    low, high = agg.bootstrap_interval(values, seed=3)
    assert (low, high) == agg.bootstrap_interval(values, seed=3)
    assert (low, high) != agg.bootstrap_interval(values, seed=4)
    assert 0.35 < low < 0.5 < high < 0.65
    assert agg.bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_perplexity_is_averaged_as_logarithm():
    row = agg.aggregate([{"perplexity": 2.0}, {"perplexity": 8.0}])["perplexity"]
    assert row["mean"] == pytest.approx(4.0)
    assert 2.0 <= row["ci_low"] <= 4.0 <= row["ci_high"] <= 8.0
