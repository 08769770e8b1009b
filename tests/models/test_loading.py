"""Names resolved and models loaded: folders, hub ids, bad arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baft_intervention.errors import ModelError
from baft_intervention.models.fingerprint import model_fingerprint
from baft_intervention.models.loading import load_model, resolve_model
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model folder as ``save_pretrained`` writes it."""
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.pad_token == "<pad>"
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama", layers=2))


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.bfloat16, "auto", None])
def test_dtypes(folder: Path, dtype: object) -> None:
    expected = {"bf16": torch.bfloat16, "float16": torch.float16, torch.bfloat16: torch.bfloat16}
    assert load_model(folder, dtype=dtype)[0].dtype == expected.get(dtype, torch.float32)  # type: ignore[arg-type]


def test_a_tokenizer_without_padding_token_gets_one(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    model, tokenizer = load_model(folder)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.get_input_embeddings().weight.shape[0] == 384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown; give one of: float32"),
        ({"dtype": torch.int8}, "torch.int8 is not a floating-point type"),
        ({"device": "warp:9"}, "device 'warp:9' is unknown"),
        ({"revision": "main"}, "revision 'main' was given for .* not a hub id"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="torch sees no GPU"):
        load_model(folder, device="cuda")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give a folder written by"):
        load_model(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file, not a folder"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "no such model", ""])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder and cannot be a hub id.*smollm2-135m"):
        load_model(name)


def test_a_hub_that_is_not_reachable_is_named() -> None:
    with pytest.raises(ModelError, match=r"'no-one/no-model' is not a built-in .*check the name and the network"):
        load_model("no-one/no-model")


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="no model can be loaded from folder"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    model = tiny_model("llama", layers=2)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder)


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ModelError, match="no model can be loaded"):
        load_model(folder)


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm-135m"])
def test_a_misspelt_builtin_fails_with_the_right_name(name: str) -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        resolve_model(name)


def test_a_misspelt_folder_fails_with_the_right_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "modell").mkdir()  # holds no model
    with pytest.raises(ModelError, match="did you mean 'model'"):
        resolve_model("modle")
    with pytest.raises(ModelError, match=re.escape(f"did you mean '{folder}'")):
        resolve_model(f"{folder}l1")


@pytest.mark.parametrize("name", ["gpt2", "user/smolm2-135m", "bert-base-uncased"])
def test_a_hub_id_is_not_taken_for_a_misspelling(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.slow
def test_without_a_network_a_hub_id_fails_without_retries(tmp_path: Path) -> None:
    """In a process of its own, because the hub's library reads its environment when it is imported."""
    code = (
        "import time, transformers\n"
        "from baft_intervention import BaftEditor, ModelError\n"
        "from huggingface_hub.utils import _http\n"
        "_http.time.sleep = lambda seconds: exit(f'a retry in {seconds} s')\n"
        "try:\n    BaftEditor.from_pretrained('user/model')\n"
        "except ModelError as error:\n    print(error)\n"
    )
    # nothing listens on port 9 of the loopback address
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'user/model' is not a built-in" in result.stdout
    assert "check the name and the network" in result.stdout
