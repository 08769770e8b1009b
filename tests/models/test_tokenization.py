"""Prompt and answer as ids: the boundary does not move, whatever the byte-pair encoder joins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft_intervention.errors import RequestError
from baft_intervention.models.tokenization import (
    encode_pair,
    encode_prompt,
    joint_text,
    pad_rows,
    pad_token_id,
)
from tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("The capital is", "Rome", "The capital is Rome"),
        ("The capital is ", "Rome", "The capital is Rome"),
        ("The capital is", " Rome", "The capital is Rome"),
        ("Q: where?\n", "Rome", "Q: where?\nRome"),
        ("", "Rome", "Rome"),
    ],
)
def test_one_space_stands_between_prompt_and_answer(prompt: str, target: str, text: str) -> None:
    assert joint_text(prompt, target) == text


words = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(deadline=None)
@given(prompt=words, target=words, add_bos=st.booleans())
def test_the_prompt_keeps_the_ids_that_the_model_sees(prompt: str, target: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    prompt_ids = encode_prompt(tokenizer, prompt)
    try:
        found, target_ids = encode_pair(tokenizer, prompt, target)
    except RequestError:
        assert not target.strip() or not tokenizer.decode(tokenizer(target)["input_ids"]).strip()
        return
    assert found == prompt_ids == tokenizer(prompt)["input_ids"]
    assert target_ids
    assert tokenizer.bos_token_id not in target_ids
    skip = 1 if add_bos else 0
    assert tokenizer.decode(prompt_ids[skip:] + target_ids) == joint_text(prompt, target)


def test_a_join_across_the_boundary_does_not_move_it() -> None:
    tokenizer = tiny_tokenizer()
    prompt, target = "The capital of France is ", "Paris"  # the space at its end would be joined with the answer
    prompt_ids = tokenizer(prompt)["input_ids"]
    joint = tokenizer(prompt + target)["input_ids"]
    assert joint[: len(prompt_ids)] != prompt_ids, "the tokenizer joins nothing here: another example is needed"
    found, target_ids = encode_pair(tokenizer, prompt, target)
    assert found == prompt_ids
    assert tokenizer.decode(found + target_ids) == prompt + target


def test_where_nothing_is_joined_the_natural_tokens_are_taken() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    prompt_ids, target_ids = encode_pair(tokenizer, "The capital of France is", "Paris")
    assert prompt_ids + target_ids == tokenizer("The capital of France is Paris")["input_ids"]


@pytest.mark.slow
def test_a_join_in_a_real_tokenizer(smollm2: tuple) -> None:
    _, tokenizer = smollm2
    joined = 0
    for prompt, target in (("He said: ", "Paris is"), ("The name is O", "'Brien"), ("(", "(a)"), ("Rome is", "Italy")):
        prompt_ids = tokenizer(prompt)["input_ids"]
        joined += tokenizer(joint_text(prompt, target))["input_ids"][: len(prompt_ids)] != prompt_ids
        found, target_ids = encode_pair(tokenizer, prompt, target)
        assert found == prompt_ids
        assert tokenizer.decode(found + target_ids) == joint_text(prompt, target)
    assert joined, "the tokenizer joins none of the examples: another is needed"


@pytest.mark.parametrize("target", ["", " ", "\n"])
def test_an_empty_target_is_named(target: str) -> None:
    with pytest.raises(RequestError, match="no tokens for the target .* after 'Rome is'; give a non-empty target"):
        encode_pair(tiny_tokenizer(), "Rome is", target)


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(RequestError, match="gives no tokens for the prompt ''"):
        encode_prompt(tiny_tokenizer(), "")
    assert encode_prompt(tiny_tokenizer(add_bos=True), "") == [2]


def test_rows_are_padded_on_either_side() -> None:
    ids, mask = pad_rows([[5, 6, 7], [8]], 0, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad_rows([[5, 6, 7], [8]], 8, "left", width=4)
    assert ids.tolist() == [[8, 5, 6, 7], [8, 8, 8, 8]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.long
    assert pad_rows([], 0)[0].shape == (0, 0)
    assert pad_rows([], 0, width=3)[1].shape == (0, 3)


class Bare:
    pad_token_id = None
    eos_token_id = None


def test_some_padding_id_is_always_found() -> None:
    bare = Bare()
    assert pad_token_id(bare) == 0
    bare.eos_token_id = 5
    assert pad_token_id(bare) == 5
    bare.pad_token_id = 7
    assert pad_token_id(bare) == 7
