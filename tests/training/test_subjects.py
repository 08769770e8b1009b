"""Subjects of requests: as the prompt writes them, or proposed from it."""

from __future__ import annotations

import dataclasses

import pytest

from baft_intervention.errors import RequestError
from baft_intervention.requests import EditRequest, Message
from baft_intervention.training.subjects import names_in, with_subject


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("What is the capital of Japan?", ["Japan"]),
        ("The capital of France is", []),  # replaced below
        ("Who wrote War and Peace?", ["War", "Peace"]),
        ("Leo Tolstoy's mother tongue is", ["Leo Tolstoy"]),
        ("the river is long", []),
        ("Apollo 11 landed in", ["Apollo 11"]),
        ("List of the kings of Norway", ["Norway"]),
    ],
)
def test_names_are_runs_of_capitalised_words(text, names):
    expected = ["France"] if "France" in text else names
    assert names_in(text) == expected


@pytest.mark.parametrize(
    ("prompt", "given", "subject"),
    [
        ("What is the capital of Japan?", "Japan", "Japan"),
        ("what is the capital of japan?", "Japan", "japan"),
        ("The height of Eiffel Tower is", "The Eiffel Tower", "Eiffel Tower"),
        ("The mass of Mercury is", "Mercury (planet)", "Mercury"),
        ("What is the capital of Japan?", None, "Japan"),
        ("Leo Tolstoy was born in Russia near", None, "Leo Tolstoy"),  # the longest name
        ("the capital is", None, None),
    ],
)
def test_the_subject_is_as_the_prompt_writes_it(prompt, given, subject):
    request = EditRequest(prompt, "Osaka", subject=given)
    assert with_subject(request).subject == subject
    assert dataclasses.replace(with_subject(request), subject=given) == request


@pytest.mark.parametrize(
    ("prompt", "subject", "hint"),
    [
        ("The capital of Japan is", "Jappan", "did you mean 'Japan'"),
        ("The capital of Japan is", "Germany", "did you mean 'Japan'"),
        ("the capital is", "Germany", "leave subject out"),
        ("Microsoft was founded by", "Micro", "did you mean 'Microsoft'"),
    ],
)
def test_a_subject_that_is_not_there_is_refused_with_a_proposal(prompt, subject, hint):
    request = EditRequest(prompt, "Osaka", subject=subject, origin="e.json:3")
    with pytest.raises(RequestError, match=f"e.json:3.*the subject '{subject}' is not in the prompt; .*{hint}"):
        with_subject(request)


def test_a_conversations_messages_are_read():
    messages = (Message("user", "What is the capital of Japan?"),)
    request = EditRequest("<|im_start|>rendered", "Osaka", messages=messages)
    assert with_subject(request).subject == "Japan"
