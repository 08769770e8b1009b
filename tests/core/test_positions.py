"""Which tokens are edited: each rule, padding on both sides, caches, subjects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft_intervention.core.positions import (
    IdSequences,
    PositionRule,
    pad_locations,
    prompt_positions,
    subject_variants,
)
from baft_intervention.errors import PositionError
from baft_intervention.models.tokenization import encode_prompt, pad_rows
from tiny import tiny_tokenizer

RULES = ("last", "subject", "subject_all", "prompt", "all", "f3+l2", "f3", "l2", "f1+l1")


@pytest.mark.parametrize("text", RULES)
def test_a_rule_is_read_and_written(text: str) -> None:
    rule = PositionRule.parse(text)
    assert str(rule) == text
    assert PositionRule.parse(str(rule)) == rule
    assert rule.needs_subject == text.startswith("subject")


@pytest.mark.parametrize("text", ["", "first", "f0", "f0+l0", "f+l", "f3l2", "l2+f3", "f-1", "+l2", "Last", None, 3])
def test_what_is_no_rule_is_refused(text: Any) -> None:
    with pytest.raises(PositionError, match="positions is .*last, subject, subject_all, prompt, all, or f<n>"):
        PositionRule.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last", [4]),
        ("prompt", [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("f2+l1", [0, 1, 4]),
        ("f2", [0, 1]),
        ("l3", [2, 3, 4]),
        ("f4+l4", [0, 1, 2, 3, 4]),
        ("f9", [0, 1, 2, 3, 4]),
    ],
)
def test_positions_of_a_prompt_with_a_target(text: str, expected: list[int]) -> None:
    rule = PositionRule.parse(text)
    assert prompt_positions(rule, None, "unused", [7] * 5, target_len=2) == expected


# ---------------------------------------------------------------------------------------------- masks


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    answer=st.integers(0, 3),
    text=st.sampled_from(RULES),
    left=st.booleans(),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_a_padded_mask_is_the_mask_alone_shifted(
    lengths: list[int], answer: int, text: str, left: bool, extra: int, seed: int
) -> None:
    rule = PositionRule.parse(text)
    width = max(lengths) + answer + extra
    generator = torch.Generator().manual_seed(seed)
    subjects = torch.rand(len(lengths), max(lengths) + answer, generator=generator) < 0.4
    starts = [width - n - answer if left else 0 for n in lengths]
    placed = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        placed[i, starts[i] : starts[i] + n + answer] = subjects[i, : n + answer]
    together = rule.mask(torch.tensor(starts), torch.tensor(lengths), torch.arange(width), placed)
    for i, n in enumerate(lengths):
        total = n + answer
        alone = rule.mask(torch.tensor([0]), torch.tensor([n]), torch.arange(total), subjects[i : i + 1, :total])[0]
        assert torch.equal(together[i, starts[i] : starts[i] + total], alone)
        assert not together[i, : starts[i]].any()
        if text != "all":  # the rule "all" goes on over generated tokens; padding on the right is masked by the caller
            assert not together[i, starts[i] + n :].any()


@pytest.mark.parametrize("text", [rule for rule in RULES if not rule.startswith("subject")])
def test_a_cache_in_pieces_gives_the_mask_of_the_whole(text: str) -> None:
    rule, starts, lengths = PositionRule.parse(text), torch.tensor([0, 3]), torch.tensor([8, 5])
    whole = rule.mask(starts, lengths, torch.arange(10))
    pieces = [rule.mask(starts, lengths, torch.arange(a, b)) for a, b in ((0, 4), (4, 5), (5, 10))]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_of_each_run_of_a_subject_the_last_token_is_taken() -> None:
    subjects = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    args = (torch.tensor([0]), torch.tensor([6]), torch.arange(6))
    assert PositionRule("subject").mask(*args, subjects)[0].nonzero().flatten().tolist() == [2, 4]
    assert PositionRule("subject_all").mask(*args, subjects)[0].nonzero().flatten().tolist() == [1, 2, 4]
    assert not PositionRule("subject").mask(*args).any()


# ---------------------------------------------------------------------------------------------- subjects


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("France has the capital", "France"),
        ("Who is the mother of Danielle Darrieux", "Danielle Darrieux"),
        ("The name of Zürich’s river is", "Zürich"),
        ("Is 東京 a city? It is 1965", "東京"),
        ("(Leo) speaks", "Leo"),
    ],
)
def test_a_subject_is_found_by_its_characters(prompt: str, subject: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    ids = encode_prompt(tokenizer, prompt)
    span = prompt_positions(PositionRule("subject_all"), tokenizer, prompt, ids, subject)
    assert span == list(range(span[0], span[-1] + 1))
    covered = tokenizer.decode([ids[i] for i in span])
    assert subject in covered
    for shorter in (span[1:], span[:-1]):
        assert subject not in tokenizer.decode([ids[i] for i in shorter])
    assert prompt_positions(PositionRule("subject"), tokenizer, prompt, ids, subject) == [span[-1]]


@pytest.mark.parametrize(
    ("prompt", "subject", "match"),
    [
        ("The capital of France is", "Japan", "'Japan' does not occur in the prompt 'The capital of France is'"),
        ("Rome is Rome, is it", "Rome", "'Rome' occurs 2 times in the prompt 'Rome is Rome, is it'"),
        ("anana", "ana", "'ana' occurs 2 times in the prompt 'anana'"),
        ("The capital of France is", "france", "'france' does not occur"),
        ("The capital of France is", None, "'The capital of France is' has no subject"),
        ("The capital of France is", "", "has no subject"),
    ],
)
def test_a_subject_that_is_not_there_once_is_named_with_its_prompt(
    prompt: str, subject: str | None, match: str
) -> None:
    tokenizer = tiny_tokenizer()
    for kind in ("subject", "subject_all"):
        with pytest.raises(PositionError, match=match):
            prompt_positions(PositionRule(kind), tokenizer, prompt, encode_prompt(tokenizer, prompt), subject)


class Slow:
    """A tokenizer without offsets."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        if options.get("return_offsets_mapping"):
            raise NotImplementedError
        return {"input_ids": [3, 4]}


def test_a_tokenizer_without_offsets_or_with_other_ids_is_refused() -> None:
    with pytest.raises(PositionError, match="Slow gives no character offsets; load the fast tokenizer"):
        prompt_positions(PositionRule("subject"), Slow(), "a b", [3, 4], "b")
    tokenizer = tiny_tokenizer()
    with pytest.raises(PositionError, match="the ids given are not those of the prompt 'France is'"):
        prompt_positions(PositionRule("subject"), tokenizer, "France is", [3, 4], "France")


@pytest.mark.parametrize("side", ["right", "left"])
def test_subjects_are_found_in_padded_ids(side: str) -> None:
    tokenizer = tiny_tokenizer()
    prompts = ["The capital of France is", "France", "Rome is in Italy", "Leo and France"]
    subjects = ["France", "Leo"]
    ids, mask = pad_rows([encode_prompt(tokenizer, p) for p in prompts], tokenizer.pad_token_id, side)
    found = IdSequences(subject_variants(tokenizer, subjects)).mask(ids)
    assert not (found & (mask == 0)).any()
    for i, prompt in enumerate(prompts):
        words = tokenizer.decode(ids[i][found[i]]).split()
        assert words == [word for word in prompt.split() if word in subjects]


def test_sequences_are_found_as_a_search_for_each_of_them_finds_them() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> list[list[int]]:
        return torch.randint(4, shape, generator=generator).tolist()

    ids = torch.tensor(draw(30, 12))
    several = [sequence for n in (1, 2, 3, 5, 14) for sequence in draw(3, n)[: 1 if n == 1 else 3]]
    sequences = IdSequences([*several, several[3], [0], [1, 2]])
    for gone in ([0], [1, 2], several[3]):  # the last stays: it was there twice
        sequences.remove(gone)
    expected = torch.zeros(ids.shape, dtype=torch.bool)
    for row, marked in zip(ids.tolist(), expected, strict=True):
        for sequence in several:
            for begin in range(len(row) - len(sequence) + 1):
                if row[begin : begin + len(sequence)] == sequence:
                    marked[begin : begin + len(sequence)] = True
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(sequences.mask(ids), expected)
    assert not IdSequences().mask(ids).any()


def test_a_subject_is_known_at_the_start_and_behind_a_space() -> None:
    tokenizer = tiny_tokenizer()
    variants = subject_variants(tokenizer, ["France", "France"])
    assert len(variants) == 2
    assert {tokenizer.decode(v) for v in variants} == {"France", " France"}


def test_locations_are_filled_up_with_the_filler() -> None:
    assert pad_locations([2, 3], 4, 9) == [2, 3, 9, 9]
    assert pad_locations([2, 3], 2, 9) == [2, 3]
