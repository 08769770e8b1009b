"""The relation encoder of a model: what it reads, that it learns, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from baft_intervention.gates import RelationEncoder
from baft_intervention.gates.relation_encoder import WINDOW, read_layers
from baft_intervention.runtime.representations import read_blocks
from baft_intervention.training import relation_training
from baft_intervention.training.relation_texts import RelationText, relation_texts, relations
from baft_intervention.training.relation_training import (
    encode_at,
    encode_rows,
    get_encoder,
    read_texts,
    relation_means,
    train_encoder,
)
from edits import FRANCE, tiny_editor

LAYERS = read_layers((3,), 4)
TEXTS = (
    RelationText("The capital of France is", 0, subject="France"),
    RelationText("What is the capital of Leo?", 0, subject="Leo"),
    RelationText("France and the capital of London", 0, subject="London"),
    RelationText("Who is the mother of Leo?", 1, subject="Leo"),
    RelationText("The mother of France is", 1, subject="France"),
    RelationText("Is Rome the capital of Italy?", near=0, subject="Italy"),
    RelationText("Is London the mother of Italy?", near=1, subject="Italy"),
    RelationText("What is Rome known for?", subject="Rome"),
    RelationText("Rome is a city in Italy, and a painter was born in it.", subject="Rome", running=True),
    RelationText("Who is the mother of Rome?", 1, subject="Nowhere"),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, quick_encoder: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(relation_training, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def read(tiny_llama, tokenizer):
    return read_texts(tiny_llama, tokenizer, TEXTS, LAYERS)


# ------------------------------------------------------------------------------------------ the texts


def test_the_relations_are_many_and_each_has_many_wordings(tokenizer):
    subjects, found = relations()
    assert len(found) > 500
    assert len({relation["name"] for relation in found}) == len(found)
    for relation in found:
        assert len(relation["questions"]) >= 6
        assert len(relation["statements"]) >= 6
        assert all(form.count("{}") == 1 for form in (*relation["questions"], *relation["statements"]))
    assert all(names for names in subjects.values())
    texts = relation_texts(tokenizer, limit=5)
    assert texts == relation_texts(tokenizer, limit=5)  # in a fixed order
    assert {text.relation for text in texts} == {-1, *range(5)}
    assert all(text.subject.lower() in text.text.lower() for text in texts if not text.running)
    assert not any("{}" in text.text for text in texts)


# ------------------------------------------------------------------------------------------ reading


def test_all_tokens_are_read_and_standardised(read, tiny_llama, tokenizer):
    rows = [tokenizer(text.text)["input_ids"] for text in TEXTS]
    assert read.lengths.tolist() == [len(row) for row in rows]
    assert read.states.shape == (sum(map(len, rows)), len(LAYERS), 32)
    assert torch.allclose(read.states.float().norm(dim=-1), torch.tensor(32**0.5), atol=0.02)
    found = read_blocks(tiny_llama, tokenizer, rows, [range(len(row)) for row in rows], sorted(set(LAYERS)))
    for i in (0, 5):
        for number, layer in enumerate(LAYERS):
            expected = F.normalize((found[layer][i] - read.mean[number]) / read.scale[number], dim=-1) * 32**0.5
            own = read.states[read.begins[i] : read.begins[i] + read.lengths[i], number].float()
            assert torch.allclose(own, expected, atol=0.02)


def test_the_subject_is_the_last_token_of_its_last_mention(read, tokenizer):
    for i, text in enumerate(TEXTS[:-1]):
        ids = tokenizer(text.text)["input_ids"]
        at = int(read.subject[i])
        assert tokenizer.decode(ids[: at + 1]).endswith(text.subject)
        assert text.subject not in tokenizer.decode(ids[at + 1 :])
    assert int(read.subject[-1]) == -1  # not in the text


def test_rows_and_texts_give_the_same_directions(read, tiny_llama, tokenizer):
    encoder = RelationEncoder().build(32)
    encoder.salience.normal_(generator=torch.Generator().manual_seed(0))
    encoder.mean, encoder.scale = read.mean, read.scale
    index = torch.arange(len(TEXTS))
    z = encode_at(encoder, read, index, index, read.lengths - 1)[0]
    rows = [tokenizer(text.text)["input_ids"] for text in TEXTS]
    assert torch.allclose(encode_rows(tiny_llama, tokenizer, encoder, LAYERS, rows), z, atol=0.02)  # half precision


def test_a_long_rows_end_decides(tiny_llama, tokenizer):
    encoder = RelationEncoder().build(32)
    row = tokenizer(" He was born in London." * 20)["input_ids"]
    assert len(row) > WINDOW
    short, whole = encode_rows(tiny_llama, tokenizer, encoder, LAYERS, [row[:3], row])
    assert torch.isfinite(whole).all()
    assert not torch.allclose(short, whole)


# ------------------------------------------------------------------------------------------ learning


def test_training_lowers_the_loss_and_gives_each_relation_a_mean(tiny_llama, tokenizer):
    count = 26
    texts = [text for text in relation_texts(tokenizer, limit=count) if not text.running]
    texts += [text for text in relation_texts(tokenizer, limit=1) if text.running][:40]
    read = read_texts(tiny_llama, tokenizer, texts, LAYERS)
    encoder = RelationEncoder().build(32)
    encoder.mean, encoder.scale = read.mean, read.scale
    losses = train_encoder(encoder, read, steps=20, relations=12)
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    label = torch.tensor([text.relation for text in texts])
    own = [(label == r).nonzero().flatten() for r in range(count)]
    assert encoder.relations.shape == (count, 256)
    assert torch.allclose(encoder.relations.norm(dim=-1), torch.ones(count), atol=1e-5)
    assert torch.allclose(encoder.relations, relation_means(encoder, read, own), atol=1e-5)
    found = encoder.false_openings
    assert torch.equal(found, found.sort().values)
    assert float((found > encoder.threshold(0.1)).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not any(tensor.requires_grad for tensor in encoder.buffers())


# ------------------------------------------------------------------------------------------ keeping


def same(one: RelationEncoder, other: RelationEncoder) -> bool:
    return all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


def test_an_encoder_is_made_once_a_model(tiny_llama, tokenizer, own_cache, monkeypatch):
    first = get_encoder(tiny_llama, tokenizer, LAYERS)
    (file,) = (own_cache / "encoders").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(relation_training, "new_encoder", lambda *_: pytest.fail("the encoder is made again"))
        assert same(get_encoder(tiny_llama, tokenizer, LAYERS), first)
        for changed in ({"layers": (0, 1, 1, 2, 2)}, {"cache": False}):
            with pytest.raises(pytest.fail.Exception, match="made again"):
                get_encoder(tiny_llama, tokenizer, **{"layers": LAYERS, **changed})
    file.write_bytes(b"damaged")
    assert same(get_encoder(tiny_llama, tokenizer, LAYERS), first)


def test_the_packages_own_encoder_comes_first(tiny_llama, tokenizer, own_cache, tmp_path, monkeypatch):
    get_encoder(tiny_llama, tokenizer, LAYERS)
    (file,) = (own_cache / "encoders").iterdir()
    shipped: Any = RelationEncoder().build(32, seed=9)
    (tmp_path / "shipped").mkdir()
    save_file({n: t.half().contiguous() for n, t in shipped.state_dict().items()}, tmp_path / "shipped" / file.name)
    monkeypatch.setattr(relation_training, "SHIPPED", tmp_path / "shipped")
    found = get_encoder(tiny_llama, tokenizer, LAYERS)
    assert torch.equal(found.value, shipped.value.half().float())


def test_a_folder_that_cannot_be_written_is_logged(tiny_llama, tokenizer, own_cache, caplog):
    own_cache.write_text("not a folder")
    assert get_encoder(tiny_llama, tokenizer, LAYERS).value.numel()
    assert "cannot be cached" in caplog.text


def test_edits_on_the_model_do_not_matter(tiny_llama, tokenizer, monkeypatch):
    seen = []

    def look(model, tokenizer, layers):
        seen.append(read_texts(model, tokenizer, TEXTS, layers).states)
        return RelationEncoder().build(32)

    monkeypatch.setattr(relation_training, "new_encoder", look)
    get_encoder(tiny_llama, tokenizer, LAYERS, cache=False)
    tiny_editor(tiny_llama, tokenizer, weighting="constant", positions="all", layers=(0,)).edit(FRANCE)
    get_encoder(tiny_llama, tokenizer, LAYERS, cache=False)
    assert torch.equal(*seen)
