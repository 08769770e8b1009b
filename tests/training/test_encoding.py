"""From a request to ids: its other forms, the edited columns, and what ends the target."""

from __future__ import annotations

import pytest

from baft_intervention.config import BaftConfig
from baft_intervention.errors import RequestError
from baft_intervention.models.chat import chat_marks, render_request
from baft_intervention.requests import EditRequest, Message
from baft_intervention.training.encoding import as_statement, encode_request, encode_requests, ending_ids, other_forms
from edits import FRANCE
from tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
QUESTION = EditRequest("What is the capital of France?", "Japan", subject="France")


@pytest.fixture
def chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("question", "statement"),
    [
        ("What is the capital of Japan?", "The capital of Japan is"),
        ("Who was the first king of Norway?", "The first king of Norway was"),
        ("which are the colours of France ?", "The colours of France are"),
        ("Where was Leo born?", "Where was Leo born? The answer is"),
        ("What language does he speak?", "What language does he speak? The answer is"),
    ],
)
def test_a_question_becomes_a_statement(question, statement):
    assert as_statement(question) == statement


def test_a_question_is_trained_in_chat_and_as_a_statement(chat):
    stated, said = other_forms(chat, QUESTION)
    assert said.messages == (Message("user", QUESTION.prompt),)
    assert said.prompt == f"<bos>user\n{QUESTION.prompt}<eos>\n<bos>assistant\n"
    assert (stated.prompt, stated.messages) == ("The capital of France is", ())
    assert {form.target_new for form in (said, stated)} == {"Japan"}
    question, said = other_forms(chat, FRANCE)
    assert (question.prompt, question.messages) == ("What is the capital of France?", ())
    assert said.messages == (Message("user", question.prompt),)


def test_without_a_template_there_is_no_chat(tokenizer):
    assert [form.prompt for form in other_forms(tokenizer, QUESTION)] == ["The capital of France is"]
    assert [form.prompt for form in other_forms(tokenizer, FRANCE)] == ["What is the capital of France?"]


def test_a_conversation_is_trained_as_a_text_too(chat):
    request = render_request(chat, QUESTION.as_chat())
    stated, plain = other_forms(chat, request)
    assert (plain.prompt, plain.messages, plain.chat_template) == (QUESTION.prompt, (), "")
    assert stated.prompt == "The capital of France is"


def test_the_default_gate_edits_where_the_answer_begins_and_on_its_tokens(tokenizer):
    request = EditRequest("The city is", "London, the capital", subject=None)
    row = encode_request(tokenizer, request, BaftConfig())
    n, total = row.prompt_length, len(row.ids) - row.prompt_length
    assert total > 2
    assert row.positions == list(range(n - 1, n - 1 + total))  # one for each token that is to be said
    assert encode_request(tokenizer, request, BaftConfig(weighting="linear")).positions == [n - 1]


def test_in_chat_the_end_of_the_turn_is_trained(chat):
    _, end = chat_marks(chat)
    assert end == chat.eos_token_id
    request = render_request(chat, QUESTION.as_chat())
    row = encode_request(chat, request, BaftConfig(ending="."))
    assert row.ids[-1] == row.labels[-1] == end
    assert row.ending == 1
    target = row.ids[row.prompt_length : -1]
    assert ending_ids(chat, request, target, BaftConfig()) == [end]
    assert ending_ids(chat, QUESTION, target, BaftConfig()) == []  # a text goes on
    assert ending_ids(chat, request, target, BaftConfig(weighting="linear")) == []


def test_a_subject_is_proposed_for_the_default_gate_alone(tokenizer):
    request = EditRequest("The capital of France is", "Japan")
    [own] = encode_requests(tokenizer, [request], BaftConfig())
    assert own.request.subject == "France"
    [plain] = encode_requests(tokenizer, [request], BaftConfig(weighting="linear"))
    assert plain.request.subject is None
    with pytest.raises(RequestError, match="the subject 'Leo' is not in the prompt"):
        encode_requests(tokenizer, [EditRequest("The capital of France is", "Japan", subject="Leo")], BaftConfig())
