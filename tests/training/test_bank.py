"""The bank: the texts that the package ships, and representations that are the base model's whoever acts on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from baft_intervention.errors import ConfigError
from baft_intervention.models.structure import find_blocks
from baft_intervention.training import bank as bank_module
from baft_intervention.training.bank import Bank, encode_texts, get_bank, shipped_texts
from edits import BANK, FRANCE, tiny_editor
from tiny import tiny_model

LAYERS = (1, 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: Bank, other: Bank) -> bool:
    return one.unrelated.keys() == other.unrelated.keys() and all(
        torch.equal(x, other.unrelated[layer]) for layer, x in one.unrelated.items()
    )


def test_the_shipped_texts_are_many_and_varied() -> None:
    texts = shipped_texts()
    assert len(texts) == len(set(texts)) == 256
    assert all(text == text.strip() and 0 < len(text) < 200 for text in texts)
    assert sum(text.endswith("?") for text in texts) >= 30
    assert sum(text[-1].isalnum() for text in texts) >= 100  # they break off: an unfinished prompt looks like that


def test_a_text_gives_its_last_token_and_three_inside(tiny_llama, tokenizer) -> None:
    rows = encode_texts(tokenizer, ["", *BANK, "long " * 200])
    assert len(rows) == len(BANK) + 1
    assert max(map(len, rows)) == 64
    bank = get_bank(tiny_llama, tokenizer, LAYERS, texts=BANK, cache=False)
    assert set(bank.unrelated) == {1, 2}
    counts = [min(4, max(len(row) - 1, 1)) for row in encode_texts(tokenizer, BANK)]
    assert len(bank.unrelated[1]) == sum(counts)
    with pytest.raises(ConfigError, match="bank_texts has no text with a token"):
        encode_texts(tokenizer, [""])


def test_a_bank_is_computed_once_a_model(tiny_llama, tokenizer, own_cache, monkeypatch) -> None:
    first = get_bank(tiny_llama, tokenizer, LAYERS)
    (file,) = (own_cache / "banks").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "_read", lambda *_: pytest.fail("the bank is computed again"))
        assert same(get_bank(tiny_llama, tokenizer, LAYERS), first)
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            get_bank(tiny_llama, tokenizer, LAYERS, texts=BANK)
    file.write_bytes(b"damaged")
    assert same(get_bank(tiny_llama, tokenizer, LAYERS), first)


@pytest.mark.parametrize("state", ["another editor's edits", "a user's hook", "train mode"])
def test_the_cached_bank_is_the_base_models(tokenizer, state: str) -> None:
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    clean = get_bank(model, tokenizer, LAYERS, texts=BANK, cache=False)
    if state == "another editor's edits":
        tiny_editor(model, tokenizer, weighting="constant", positions="all", layers=(1,)).edit(FRANCE)
    elif state == "a user's hook":
        find_blocks(model)[0].register_forward_hook(
            lambda _module, _args, out: (out[0] + 1, *out[1:]) if type(out) is tuple else out + 1
        )
    else:
        model.train()
    hooks = [list(module._forward_hooks) for module in model.modules()]
    get_bank(model, tokenizer, LAYERS, texts=BANK)
    cached = get_bank(model, tokenizer, LAYERS, texts=BANK)
    assert same(cached, clean)
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert model.training == (state == "train mode")
