"""An edited model is a causal function of its tokens: every way of feeding the same tokens gives the same logits."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from baft_intervention.errors import PositionError
from baft_intervention.models.tokenization import encode_prompt, pad_rows
from edits import FACTS, FRANCE, LEO, tiny_editor
from tiny import ARCHS, tiny_model

PIN = "4.45.1"
TEXTS = (
    "The capital of France is Japan and the mother tongue of Leo is city",
    "He was born. The mother tongue of Leo is city",
    "The Eiffel Tower is located in capital",
    "Who is the president of the United States?",
)


@pytest.fixture(params=ARCHS)
def edited(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    editor = tiny_editor(tiny_model(request.param), tokenizer)
    editor.edit(FACTS)
    return editor


def whole(editor: Any, ids: list[int]) -> torch.Tensor:
    """Logits ``(T, V)`` of one forward of the whole text."""
    with torch.no_grad():
        return editor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def in_pieces(editor: Any, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """The same through a KV cache, in pieces that end at ``cuts``."""
    cache, found = None, []
    with torch.no_grad():
        for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            if begin < end:
                out = editor.model(input_ids=torch.tensor([ids[begin:end]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits[0])
    return torch.cat(found)


def padded(editor: Any, rows: list[list[int]], side: str) -> list[torch.Tensor]:
    ids, mask = pad_rows(rows, editor.tokenizer.pad_token_id, side)
    with torch.no_grad():
        logits = editor.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
    return [logits[i][mask[i] == 1] for i in range(len(rows))]


def test_every_way_in_gives_the_same_logits_at_every_position(edited):
    if transformers.__version__ == PIN and edited.model.config.model_type == "gemma2":
        pytest.skip(f"transformers {PIN} gives Gemma 2 a cache of the prompt's own length, which cannot be continued")
    rows = [encode_prompt(edited.tokenizer, text) for text in TEXTS]
    expected = [whole(edited, row) for row in rows]
    with edited.enabled(False):
        assert not torch.allclose(whole(edited, rows[0]), expected[0], atol=1e-3)
    draw = random.Random(0)
    for row, wanted in zip(rows, expected, strict=True):
        ways = [list(range(1, len(row))), [], *(sorted(draw.sample(range(1, len(row)), 2)) for _ in range(3))]
        for cuts in ways:
            torch.testing.assert_close(in_pieces(edited, row, cuts), wanted, atol=1e-4, rtol=1e-4)
    for side in ("left", "right"):
        for found, wanted in zip(padded(edited, rows, side), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_state_follows_the_cache(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    rows = [encode_prompt(tokenizer, text) for text in TEXTS[:2]]
    width = min(map(len, rows)) - 3
    heads, tails = [row[:width] for row in rows], [row[width : width + 3] for row in rows]
    expected = [whole(editor, h + t)[width:] for h, t in zip(heads, tails, strict=True)]

    def go_on(cache: Any, tails: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            return tiny_llama(input_ids=torch.tensor(tails), past_key_values=cache, use_cache=True).logits

    def prefix() -> Any:
        with torch.no_grad():
            cache = DynamicCache()
            tiny_llama(input_ids=torch.tensor(heads), past_key_values=cache, use_cache=True)
            return cache

    cache = prefix()
    cache.reorder_cache(torch.tensor([1, 0]))
    found = go_on(cache, tails[::-1])
    torch.testing.assert_close(found, torch.stack(expected[::-1]), atol=1e-4, rtol=1e-4)
    cache = prefix()
    cache.batch_repeat_interleave(2)
    found = go_on(cache, [tails[0], tails[0], tails[1], tails[1]])
    torch.testing.assert_close(found[1], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], expected[1], atol=1e-4, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([3]))
    cache.crop(width - cache.get_seq_length())
    torch.testing.assert_close(go_on(cache, tails[1:])[0], expected[1], atol=1e-4, rtol=1e-4)
    twin = copy.deepcopy(prefix())
    twin.reorder_cache(torch.tensor([1, 1]))
    torch.testing.assert_close(go_on(twin, [tails[1]] * 2)[0], expected[1], atol=1e-4, rtol=1e-4)


def test_generation_is_the_same_however_it_is_run(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FACTS)
    prompts = [FRANCE.prompt, LEO.prompt, "He was"]
    plain = [editor.generate(p, max_new_tokens=6) for p in prompts]
    assert editor.generate(prompts, max_new_tokens=6) == plain
    assert editor.generate(prompts, max_new_tokens=6, use_cache=False) == plain
    assert editor.generate(prompts, max_new_tokens=6, cache_implementation="static") == plain
    beams = [editor.generate(p, max_new_tokens=6, num_beams=3) for p in prompts]
    assert editor.generate(prompts, max_new_tokens=6, num_beams=3) == beams
    several = editor.generate(prompts, max_new_tokens=6, num_beams=3, num_return_sequences=2)
    assert [each[0] for each in several] == beams


def test_the_inner_model_is_edited_too(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    ids = torch.tensor([encode_prompt(tokenizer, FRANCE.prompt)])
    with torch.no_grad():
        inner = tiny_llama.lm_head(tiny_llama.model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(inner, tiny_llama(input_ids=ids).logits)


def test_embeddings_without_ids_are_refused(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    embeddings = tiny_llama.get_input_embeddings()(torch.tensor([encode_prompt(tokenizer, FRANCE.prompt)]))
    with pytest.raises(PositionError, match="input_ids"):
        tiny_llama(inputs_embeds=embeddings)
    with editor.enabled(False):
        tiny_llama(inputs_embeds=embeddings)


def test_cached_tokens_that_the_edits_did_not_see_count_as_padding(tiny_llama, tokenizer):
    """A prefix that was read while the edits were off: the subject in it is not known, one named later is, step by step too."""
    editor = tiny_editor(tiny_llama, tokenizer, weighting_options={"false_openings": 0.6})
    editor.edit(FRANCE)
    prefix, rest = encode_prompt(tokenizer, "He was born."), encode_prompt(tokenizer, " The capital of France is Japan")

    def go_on(pieces: list[list[int]]) -> torch.Tensor:
        cache, found = DynamicCache(), []
        with torch.no_grad():
            with editor.enabled(False):
                tiny_llama(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
            for piece in pieces:
                out = tiny_llama(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True)
                found.append(out.logits[0])
        return torch.cat(found)

    at_once = go_on([rest])
    with editor.enabled(False):
        assert not torch.allclose(go_on([rest]), at_once, atol=1e-3)  # the edit acts behind the prefix
    torch.testing.assert_close(go_on([[token] for token in rest]), at_once, atol=1e-4, rtol=1e-4)
