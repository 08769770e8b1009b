"""Subjects in token ids: forms of a name, word boundaries, and undoing."""

from __future__ import annotations

import pytest

from baft_intervention.runtime.subject_index import SubjectIndex, surface_forms


@pytest.fixture
def index(tokenizer):
    return SubjectIndex(tokenizer)


def found(index: SubjectIndex, tokenizer, text: str, begin: int = 0) -> list[tuple[str, str]]:
    """``(edit, the text of the mention)``; a name with and without the space before it is one mention."""
    ids = tokenizer(text)["input_ids"]
    mentions = {(b, edit): a for a, b, edit in index.mentions(ids, begin)}
    return [(edit, tokenizer.decode(ids[a : b + 1]).strip()) for (b, edit), a in mentions.items()]


@pytest.mark.parametrize(
    ("subject", "forms"),
    [
        ("The Eiffel Tower", {"The Eiffel Tower", "Eiffel Tower", "eiffel tower", "EIFFEL TOWER"}),
        ("Mercury (planet)", {"Mercury (planet)", "Mercury", "mercury"}),
        ("São Paulo", {"São Paulo", "Sao Paulo", "são paulo", "sao paulo"}),
        ("iPhone", {"iPhone", "IPhone", "iphone"}),
        ("leo tolstoy", {"leo tolstoy", "Leo Tolstoy", "LEO TOLSTOY"}),
    ],
)
def test_a_name_has_several_forms(subject, forms):
    assert forms <= set(surface_forms(subject))
    assert surface_forms(subject)[0] == subject
    assert len(surface_forms(subject)) == len(set(surface_forms(subject)))


def test_a_short_name_keeps_its_case():
    assert surface_forms("US") == ["US"]  # "us" is another word
    assert surface_forms("May") == ["May"]


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("The capital of France is", "France"),
        ("France is large", "France"),
        ("I like france.", "france"),
        ("FRANCE!", "FRANCE"),
        ("France's capital", "France"),
        ("(France)", "France"),
        ("the-France-question", "France"),
        ("France", "France"),
    ],
)
def test_a_name_is_found_in_another_case_and_beside_punctuation(index, tokenizer, text, mention):
    index.add("f", ["France"])
    assert found(index, tokenizer, text) == [("f", mention)]


@pytest.mark.parametrize("text", ["Nanomicro is", "the Mic"])
def test_the_end_of_a_word_is_no_mention(index, tokenizer, text):
    index.add("m", ["Micro"])
    assert found(index, tokenizer, text) == []
    assert found(index, tokenizer, f"{text} and Micro is") == [("m", "Micro")]


@pytest.mark.parametrize("text", ["Microsoft is large", "the Microsofts", "Micro2"])
def test_a_token_goes_on_with_the_word_before_it(index, tokenizer, text):
    index.add("m", ["Micro"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = index.mentions(ids)[0][1]
    assert index.continues(ids[last + 1])
    assert not index.continues(tokenizer(" is", add_special_tokens=False)["input_ids"][0])


def test_a_name_may_come_with_or_without_its_article(index, tokenizer):
    index.add("t", ["The Eiffel Tower"])
    assert found(index, tokenizer, "The Eiffel Tower is")[-1][0] == "t"
    assert found(index, tokenizer, "height of Eiffel Tower") == [("t", "Eiffel Tower")]


def test_names_are_told_in_the_order_in_which_they_end_from_a_given_place_on(index, tokenizer):
    index.add("f", ["France"])
    index.add("u", ["United States"])
    index.add("s", ["States"])
    text = "France and the United States and France"
    assert [edit for edit, _ in found(index, tokenizer, text)][0::3] == ["f", "f"]
    assert {edit for edit, _ in found(index, tokenizer, text)[1:3]} == {"u", "s"}
    half = len(tokenizer("France and the United")["input_ids"])
    assert {edit for edit, _ in found(index, tokenizer, text, half)} == {"u", "s", "f"}
    assert len(found(index, tokenizer, text, half)) == 3


def test_removing_undoes_adding(index, tokenizer):
    assert not index
    index.add("one", ["France"])
    index.add("two", ["France", "Leo"])
    index.add("two", ["France"])  # another request of the same edit
    index.remove("two", ["France"])
    assert sorted(edit for edit, _ in found(index, tokenizer, "France and Leo")) == ["one", "two", "two"]
    index.remove("two", ["France", "Leo"])
    assert found(index, tokenizer, "France and Leo") == [("one", "France")]
    index.remove("one", ["France"])
    assert not index
    assert index._names == {}


def test_a_tokenizer_with_a_first_token_of_its_own_finds_the_same():
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(add_bos=True)
    index = SubjectIndex(tokenizer)
    index.add("f", ["France"])
    assert found(index, tokenizer, "France is") == [("f", "France")]
