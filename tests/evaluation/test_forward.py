"""Logits at chosen positions, skipped blocks, decoding: all against the plain computation."""

import pytest
import torch

from baft_intervention.evaluation.forward import (
    LogitReader,
    capture_block_input,
    decode_tokens,
    end_token_ids,
    resume_at,
)
from baft_intervention.models.structure import find_blocks
from baft_intervention.models.tokenization import pad_rows
from tiny import EOS, tiny_model, tiny_tokenizer

ROWS = [[5, 9, 20, 31, 40], [7, 8], [60, 61, 62]]


def batch():
    ids, mask = pad_rows(ROWS, 0)
    rows, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 4, 1, 0])
    return ids, mask, rows, columns


def test_reader_gives_the_full_logits_on_every_architecture(any_model):
    ids, mask, rows, columns = batch()
    full = any_model(input_ids=ids, attention_mask=mask).logits[rows, columns]
    reader = LogitReader(any_model)
    logits, hidden, _ = reader(ids, mask, rows, columns)
    assert reader.selective is True  # Gemma's soft cap included
    torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-5)
    again, *_ = reader(ids, mask, rows[:1], columns[:1], extra=hidden)
    torch.testing.assert_close(again[1:], full, rtol=1e-5, atol=1e-5)


def test_reader_leaves_no_hook(tiny_llama):
    LogitReader(tiny_llama)(*batch())
    assert not tiny_llama.get_output_embeddings()._forward_pre_hooks


def test_reader_falls_back_where_the_head_is_not_called(tiny_llama):
    head, body = tiny_llama.get_output_embeddings(), tiny_llama.model

    def forward(input_ids, attention_mask=None, **kwargs):
        hidden = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return type("Output", (), {"logits": hidden @ head.weight.T})()

    tiny_llama.forward = forward
    ids, mask, rows, columns = batch()
    reader = LogitReader(tiny_llama)
    logits, hidden, _ = reader(ids, mask, rows, columns)
    assert reader.selective is False
    assert hidden is None
    torch.testing.assert_close(logits, tiny_llama(ids, mask).logits[rows, columns])
    with pytest.raises(RuntimeError, match="keep log-probabilities"):
        reader(ids, mask, rows, columns, extra=torch.zeros(1, 32))


@pytest.mark.parametrize("layer", [1, 3])
def test_resuming_gives_the_same_logits_on_every_architecture(any_model, layer):
    ids, mask, *_ = batch()
    with torch.no_grad():
        full = any_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        start = capture_block_input(any_model, layer, ids, mask)
        calls = []
        handle = find_blocks(any_model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
        with resume_at(any_model, start):
            resumed = any_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        handle.remove()
    kept = mask.bool()
    torch.testing.assert_close(resumed[kept], full[kept])
    assert all("forward" not in b.__dict__ for b in find_blocks(any_model))


def test_resume_at_block_0_computes_everything(tiny_llama):
    ids, mask, *_ = batch()
    assert capture_block_input(tiny_llama, 0, ids, mask) is None
    with resume_at(tiny_llama, None):
        tiny_llama(input_ids=ids, attention_mask=mask)


def test_resume_puts_blocks_back_after_an_error(tiny_llama):
    ids, mask, *_ = batch()
    start = capture_block_input(tiny_llama, 2, ids, mask)
    with pytest.raises(ZeroDivisionError), resume_at(tiny_llama, start):
        raise ZeroDivisionError
    assert all("forward" not in b.__dict__ for b in find_blocks(tiny_llama))


def slow_greedy(model, prompt, limit, end_ids):
    ids = list(prompt)
    for _ in range(limit):
        token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_decoding_a_batch_is_decoding_each_alone(any_model):
    limits = [6, 3, 8]
    found = decode_tokens(LogitReader(any_model), ROWS, limits, end_ids={EOS}, pad_id=0)
    assert found == [slow_greedy(any_model, p, n, {EOS}) for p, n in zip(ROWS, limits, strict=True)]


def test_known_tokens_do_not_change_the_text(tiny_llama):
    reader = LogitReader(tiny_llama)
    plain = decode_tokens(reader, ROWS, [6] * 3, end_ids={EOS}, pad_id=0)
    for known in ([plain[0][:1], [], plain[2][:4]], plain):
        assert decode_tokens(reader, ROWS, [6] * 3, end_ids={EOS}, pad_id=0, known=known) == plain


def test_decoding_stops_before_the_end_token(tiny_llama):
    reader = LogitReader(tiny_llama)
    [plain] = decode_tokens(reader, ROWS[:1], [6], end_ids=set(), pad_id=0)
    [cut] = decode_tokens(reader, ROWS[:1], [6], end_ids={plain[2]}, pad_id=0)
    assert cut == plain[: plain.index(plain[2])]
    assert decode_tokens(reader, ROWS[:1], [6], end_ids={plain[2]}, pad_id=0, known=[plain]) == [cut]


def test_sampled_rows_depend_on_their_seed_alone(tiny_llama):
    reader = LogitReader(tiny_llama)

    def sample(seed, rows):
        samplers = [torch.Generator().manual_seed(seed), *[None] * (len(rows) - 1)]
        return decode_tokens(reader, rows, [8] * len(rows), end_ids={EOS}, pad_id=0, samplers=samplers)

    assert sample(1, ROWS)[0] == sample(1, ROWS[:1])[0]
    assert sample(1, ROWS)[0] != sample(2, ROWS)[0]
    assert sample(1, ROWS)[1:] == sample(2, ROWS)[1:]


def test_end_token_ids_come_from_both_places():
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 8]
    assert end_token_ids(model, tiny_tokenizer()) == {EOS, 7, 8}
