"""Questions, queries, rows and batches."""

import itertools

import pytest

from baft_intervention.errors import RequestError
from baft_intervention.evaluation.queries import (
    Query,
    TokenRow,
    make_query,
    make_record_queries,
    make_rows,
    pack,
    spaced,
)
from baft_intervention.requests import EditRequest, Probe
from evaluation.helpers import make_requests
from tiny import tiny_tokenizer


def query(prompt, target, divergence=False):
    return Query("", tuple(prompt), tuple(target), 0, divergence)


def test_one_token_answers_of_a_prompt_share_a_row():
    rows, place = make_rows([query([1, 2], [5]), query([1, 2], [6]), query([1, 2], [])])
    assert rows == [TokenRow(2, (1, 2), 1)]
    assert place == [0, 0, 0]


def test_a_longer_answer_serves_a_shorter_one_of_the_same_prompt():
    rows, place = make_rows(
        [query([1, 2], [5]), query([1, 2], [7, 8, 9]), query([1, 2], [7, 3]), query([1, 2], [4, 4])]
    )
    assert [r.ids for r in rows] == [(1, 2, 7, 8), (1, 2, 4)]
    assert place == [0, 0, 0, 1]
    assert rows[0].width == 3


def test_the_last_answer_token_is_never_an_input():
    rows, _ = make_rows([query([1], [2, 3])])
    assert rows[0].ids == (1, 2)


def test_same_ids_with_another_boundary_are_another_row():
    """An edit sits at the last prompt token, so [1 2 | 3] is not [1 | 2 3]."""
    rows, _ = make_rows([query([1, 2], [3, 9]), query([1], [2, 3, 9])])
    assert sorted(r.prompt_length for r in rows) == [1, 2]


@pytest.mark.parametrize("budget", [20, 64, 4096])
def test_pack_holds_every_row_once_and_keeps_its_budget(budget):
    rows = [TokenRow(1, tuple(range(n)), 1) for n in (3, 30, 4, 4, 5, 17, 3, 9)]
    batches = pack(rows, token_budget=budget, read_budget=5)
    assert sorted(itertools.chain(*batches)) == list(range(len(rows)))
    for batch in batches:
        tokens = max(len(rows[r].ids) for r in batch) * len(batch)
        assert len(batch) == 1 or (tokens <= budget and len(batch) <= 5)


def test_pack_does_not_pad_short_rows_to_a_long_one():
    rows = [TokenRow(1, tuple(range(n)), 1) for n in (140, 12, 12)]
    assert pack(rows) == [[0], [1, 2]]


def test_pack_of_nothing():
    assert pack([]) == []


def test_spaced_takes_the_first_and_spreads():
    assert spaced(tuple("abcdefgh"), 4) == tuple("aceg")
    assert spaced(tuple("ab"), 4) == tuple("ab")
    assert spaced(tuple("ab"), 0) == tuple("ab")


def test_plan_asks_the_edit_first_and_each_probe():
    [request] = make_requests(1)
    record = make_record_queries(request, tiny_tokenizer())
    assert [q.kind for q in record.questions] == ["edit", *(p.kind for p in request.probes)]
    assert record.questions[0].answers == ("Osaka",)
    assert len(record.questions[0].against) == 1
    still = [q for q in record.questions if q.kind in ("locality", "unrelated")]
    assert all(record.queries[i].divergence for q in still for i in q.wanted)
    assert record.queries[record.questions[-1].wanted[0]].target_ids == ()  # no answer: the next token is compared


def test_plan_counts_lone_space_tokens():
    q = make_query(tiny_tokenizer(), "He was born in", "2006", False)
    assert tiny_tokenizer().decode([q.target_ids[0]]) == " "
    assert q.lead == 1


def test_reply_groups_score_several_answers():
    replies = tuple(f"reply {i}" for i in range(10))
    probe = Probe("What?", "rephrase", replies, replies[:6], "sentiment")
    record = make_record_queries(
        EditRequest("Who?", "reply 0", probes=(probe,), target_true=("x",)), tiny_tokenizer(), replies=4
    )
    assert len(record.questions[1].wanted) == 4
    assert len(record.questions[1].against) == 4
    assert record.questions[0].against == ()  # ConvSent's old answers are replies, not a fact's other value
    assert len(make_record_queries(record.request, tiny_tokenizer(), replies=0).questions[1].wanted) == 10


def test_too_long_for_the_model_is_an_error_that_says_so():
    with pytest.raises(RequestError, match="the model reads at most 5"):
        make_record_queries(EditRequest("The capital of Japan is", "Osaka"), tiny_tokenizer(), context=5)
