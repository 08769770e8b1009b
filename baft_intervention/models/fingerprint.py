"""The identity of a model: a hash of its architecture and a fingerprint of its weights.

A saved adapter records both, so that its edits load only on the model that they were trained for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .structure import DEPTH_FIELDS, accelerate_hooks, first_field, hidden_size, text_config

_SAMPLE = 16384  # elements of each large tensor that a fingerprint hashes one by one


def config_hash(model: nn.Module) -> str:
    """sha256 (hex) of the config values that define the architecture.

    It covers type, sizes, head counts, activation, norm epsilon and rotary bases, which mean the same in every supported
    version of transformers. (``to_dict()`` gains and renames fields with every release.) It leaves out dtype, name, library
    version and weight tying.
    """
    config = text_config(model)
    hidden = hidden_size(model)
    heads = first_field(config, "num_attention_heads", "n_head", "num_heads")
    facts = {
        "model_type": getattr(config, "model_type", None),
        "vocab_size": getattr(config, "vocab_size", None),
        "hidden_size": hidden,
        "num_layers": first_field(config, *DEPTH_FIELDS),
        "num_heads": heads,
        "num_key_value_heads": first_field(config, "num_key_value_heads") or heads,
        "head_dim": first_field(config, "head_dim") or (hidden // heads if heads else None),
        "intermediate_size": first_field(config, "intermediate_size", "n_inner", "ffn_dim"),
        "activation": first_field(config, "hidden_activation", "hidden_act", "activation_function"),
        "norm_eps": first_field(config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
        "rope_bases": sorted(set(_rope_bases(config))),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _rope_bases(config: Any) -> Iterator[float]:
    """Every rotary base. transformers 5 keeps them in ``rope_parameters``, sometimes one for each layer type."""
    for name in ("rope_theta", "rope_local_base_freq", "rotary_emb_base"):
        if (value := getattr(config, name, None)) is not None:
            yield float(value)
    todo = [getattr(config, "rope_parameters", None)]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
            if isinstance(item.get("rope_theta"), (int, float)):
                yield float(item["rope_theta"])


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of the model's parameters: names, shapes, dtypes and values.

    For each parameter, the hash covers the exact integer sum of its bytes, read as 64-bit words; this reveals any single
    changed bit. It also covers up to 16384 elements at an even stride (every element of a smaller tensor); this reveals a
    permutation. The fingerprint detects mix-ups. It does not protect against forgery.

    Buffers, hooks, ``requires_grad`` and the placement of tensors do not matter. The result is the same on the CPU, on a GPU,
    spread over several GPUs, offloaded, or sharded (every rank must then call this), and for tied and untied embeddings with
    equal values. The dtype does matter.

    Raises:
        ModelError: a parameter has no values (it is on the meta device, and accelerate has not offloaded it).
    """
    digest = hashlib.sha256()
    parameters = {_stable_name(n): (n, p) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, (own_name, parameter) in sorted(parameters.items()):
        parameter = _values(model, own_name, parameter)
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|".encode())
        flat = parameter.detach().reshape(-1)  # a copy only if it is not contiguous
        sample = flat if flat.numel() <= _SAMPLE else flat[:: math.ceil(flat.numel() / _SAMPLE)]
        digest.update(_bytes(sample))
        if sample.numel() < flat.numel():
            whole = flat.numel() - flat.numel() % 8  # 8 elements fill whole words in every dtype
            digest.update(_word_sum(flat[:whole]).to_bytes(8, "little", signed=True))
            digest.update(_bytes(flat[whole:]))
    return digest.hexdigest()


def _values(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter with all its values, even if it is sharded or offloaded."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if not parameter.is_meta:
        return parameter
    owner, _, last = name.rpartition(".")
    for hook in accelerate_hooks(model.get_submodule(owner)):
        if (kept := getattr(hook, "weights_map", None)) is not None:
            return kept[last].to(parameter.dtype)
    raise ModelError(f"parameter {name!r} is on the meta device; load the model with its weights")


def _stable_name(name: str) -> str:
    """A parameter's name without torch.compile's prefix, and with transformers 5's name for GPT-NeoX's head."""
    return name.replace("_orig_mod.", "").replace("embed_out.", "lm_head.")


def _bytes(flat: torch.Tensor) -> bytes:
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _word_sum(flat: torch.Tensor) -> int:
    """Sum of the bytes as int64 words, modulo 2**64. It is exact, so it is the same in any order and on any device."""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # a view as int64 must begin at a multiple of 8 bytes
    return int(flat.view(torch.int64).sum())
