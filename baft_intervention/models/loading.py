"""Which model is edited: resolving a name, and the few facts about a model that the rest needs.

A name is ``smollm2-135m`` (embedded: a real 135 M parameter Llama that comes as a package from the package
index, so that everything runs without a hub), a local folder, or a hub id. :func:`load_model` gives model and
tokenizer for each of them; remote code is never run and only safetensors weights are read.

The structural helpers look at modules and config, never at class names, so that a new architecture with an
ordinary stack of decoder blocks works the day it appears.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_SAMPLE = 16384  # elements of each large tensor that a fingerprint hashes one by one


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)`` for a built-in name, a local folder or a hub id.

    Args:
        name: ``"smollm2-135m"``, a folder with ``config.json`` and safetensors weights, or a hub id.
        device: where the model goes; ``None`` is the CPU, ``"auto"`` the GPU where there is one, ``"spread"`` all GPUs, and
            what they do not hold the CPU and the disk (``device_map="auto"`` of accelerate).
        dtype: a ``torch.dtype`` or ``"float32"``, ``"bfloat16"``, ``"float16"``; ``None`` and ``"auto"`` keep
            what the checkpoint has (float32 for the built-in).
        revision: branch, tag or commit of a hub id.

    Returns:
        The model in eval mode, its ``requires_grad`` flags untouched, and its tokenizer, which always has a
        padding token (the embeddings are not resized: an existing token serves, masked out).

    Raises:
        ModelError: the name cannot be resolved, or what it names cannot be loaded; the message says the mend.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import embedded

    name = os.fspath(name)
    source = resolve_model(name)
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    mapped = {"device_map": "auto"} if device == "spread" else {}
    place = None if mapped else _device(device)
    if source == name and not os.path.isdir(source):  # a hub id; a folder has no revision
        kwargs["revision"] = revision or "main"
    elif revision is not None:
        raise ModelError(f"revision {revision!r} was given for {name!r}, which is no hub id; leave revision out")
    try:
        with _quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, **kwargs)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, **{_dtype_keyword(): _dtype(dtype)}, **kwargs, **mapped
            )
    except Exception as error:  # from_pretrained raises OSError, ValueError, KeyError, SafetensorError, …
        raise ModelError(_load_hint(name, source, error)) from error
    give_pad_token(tokenizer, name)
    if name in embedded.BUILTIN_MODELS:
        model.config._name_or_path = name  # a saved adapter then names the built-in, not this machine's cache
    return (model if place is None else model.to(place)).eval(), tokenizer


def resolve_model(name: str) -> str:
    """The folder or hub id that ``name`` stands for; a built-in is converted into the cache at first use.

    Raises:
        ModelError: a path that is no folder, a folder without ``config.json``, a word that is neither.
    """
    from . import embedded

    if name in embedded.BUILTIN_MODELS:
        return str(embedded.converted_folder(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder {name!r} has no config.json; give a folder written by model.save_pretrained()")
        return str(path)
    known = ", ".join(sorted(embedded.BUILTIN_MODELS))
    if path.is_file():
        raise ModelError(
            f"{name!r} is a file, not a folder; give the folder that holds config.json, or one of: {known}"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"{name!r} is no folder, and cannot be a hub id; give a folder, a hub id or one of: {known}")
    return name


def give_pad_token(tokenizer: Any, name: str = "") -> None:
    """See to it that ``tokenizer`` can pad, with a token that it has already.

    Raises:
        ModelError: the tokenizer has no token at all to pad with.
    """
    if tokenizer.pad_token_id is not None:
        return
    token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    if not token:
        raise ModelError(f"the tokenizer of {name!r} has no token to pad with; set tokenizer.pad_token")
    tokenizer.pad_token = token


# ------------------------------------------------------------------------------------------- structure


def text_config(model: nn.Module) -> Any:
    """The config of the language part: ``config.text_config`` of a multimodal model, else ``config``.

    Raises:
        ModelError: the model has no config.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config; give a transformers model")
    return getattr(config, "text_config", None) or config


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder blocks, found by structure.

    It is the outermost ``ModuleList`` whose members are of one class and as many as the config has layers;
    the towers of other modalities are passed over.

    Raises:
        ModelError: no such list, or several that cannot be told apart.
    """
    config = text_config(model)
    depth = _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if depth is None:
        raise ModelError(f"the config of {type(model).__name__} names no number of layers (num_hidden_layers)")
    found: dict[str, nn.ModuleList] = {}
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or re.search(r"vision|visual|audio|speech|image", name):
            continue
        seen.append(f"{name} ({len(module)})")
        if len(module) == depth and len({type(member) for member in module}) == 1:
            found[name] = module
    outer = {n: m for n, m in found.items() if n.count(".") == min(k.count(".") for k in found)}
    if len(outer) == 1:
        return next(iter(outer.values()))
    if outer:
        raise ModelError(
            f"{type(model).__name__} has several stacks of {depth} blocks ({', '.join(outer)}); "
            "only decoder-only language models can be edited"
        )
    raise ModelError(
        f"no stack of {depth} blocks of one class in {type(model).__name__}; "
        f"its module lists are: {', '.join(seen[:8]) or 'none'}; only decoder-only language models can be edited"
    )


def num_layers(model: nn.Module) -> int:
    """How many decoder blocks the model has; layers are counted from 0."""
    return len(find_blocks(model))


def hidden_size(model: nn.Module) -> int:
    """``d``, the width of the residual stream that the blocks read and write.

    Raises:
        ModelError: the config does not say.
    """
    value = _first(text_config(model), "hidden_size", "n_embd", "d_model")
    if value is None:
        raise ModelError(f"the config of {type(model).__name__} names no hidden_size")
    return int(value)


def compute_device(module: nn.Module) -> torch.device:
    """The device on which a model's first part, or a block, computes.

    Parameters that accelerate has offloaded lie on the meta device until then; its hook says where they will be.

    Raises:
        ModelError: no parameter has values, and nobody says where they will be.
    """
    first = next(iter(module.parameters()), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _accelerate_hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    raise ModelError(f"{type(module).__name__} has no parameters with values; load the model with its weights")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are cut in pieces over processes (FSDP, ``fully_shard``): each call is then one of all ranks."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def spread(model: nn.Module) -> str:
    """Why a model is not in one piece on one device, in words; empty where it is."""
    if is_sharded(model):
        return "its parameters are sharded over processes"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "parts of it are offloaded"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return f"its layers are on several devices ({', '.join(devices)})" if len(devices) > 1 else ""


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model reads at most; None where its config does not say."""
    value = _first(text_config(model), "max_position_embeddings", "n_positions", "n_ctx")
    return int(value) if isinstance(value, int) and value > 0 else None


# ------------------------------------------------------------------------------------------- identity


def config_hash(model: nn.Module) -> str:
    """sha256 (hex) over what the config says about the architecture.

    Only facts that mean the same in every supported version of transformers go in (``to_dict()`` itself gains
    and renames fields with every release): type, sizes, head counts, activation, norm epsilon, rotary bases.
    Not the dtype, name, library version, or tying.
    """
    config = text_config(model)
    hidden = hidden_size(model)
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    facts = {
        "model_type": getattr(config, "model_type", None),
        "vocab_size": getattr(config, "vocab_size", None),
        "hidden_size": hidden,
        "num_layers": _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        "num_heads": heads,
        "num_key_value_heads": _first(config, "num_key_value_heads") or heads,
        "head_dim": _first(config, "head_dim") or (hidden // heads if heads else None),
        "intermediate_size": _first(config, "intermediate_size", "n_inner", "ffn_dim"),
        "activation": _first(config, "hidden_activation", "hidden_act", "activation_function"),
        "norm_eps": _first(config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
        "rope_bases": sorted(set(_rope_bases(config))),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the model's parameters: names, shapes, dtypes and values.

    What it covers: of every parameter the exact integer sum of its bytes read as 64-bit words, so that one
    changed bit anywhere shows, and besides 16384 elements at an even stride one by one (all of a smaller
    tensor), so that a permutation shows as well. It is a fingerprint against mix-ups, not a signature
    against forgery. Buffers, hooks and ``requires_grad`` do not enter, nor where the tensors lie: the result
    is the same on the CPU, on a GPU, spread over several, offloaded or sharded (then every rank must call this),
    and for tied and untied embeddings with equal values. A model loaded in another dtype is another model.

    Raises:
        ModelError: a parameter has no values (on the meta device, and not offloaded by accelerate).
    """
    digest = hashlib.sha256()
    parameters = {_stable_name(n): (n, p) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, (own_name, parameter) in sorted(parameters.items()):
        parameter = _values(model, own_name, parameter)
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|".encode())
        flat = parameter.detach().reshape(-1)  # a copy only where it is not contiguous
        sample = flat if flat.numel() <= _SAMPLE else flat[:: math.ceil(flat.numel() / _SAMPLE)]
        digest.update(_bytes(sample))
        if sample.numel() < flat.numel():
            whole = flat.numel() - flat.numel() % 8  # 8 elements fill whole words whatever the dtype
            digest.update(_word_sum(flat[:whole]).to_bytes(8, "little", signed=True))
            digest.update(_bytes(flat[whole:]))
    return digest.hexdigest()


def _values(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter whole and with values, wherever they are kept."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if not parameter.is_meta:
        return parameter
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    for hook in _accelerate_hooks(module):
        if (kept := getattr(hook, "weights_map", None)) is not None:
            return kept[last].to(parameter.dtype)
    raise ModelError(f"parameter {name!r} is on the meta device; load the model with its weights")


def _stable_name(name: str) -> str:
    """A parameter's name without torch.compile's prefix, and GPT-NeoX's head as transformers 5 calls it."""
    return name.replace("_orig_mod.", "").replace("embed_out.", "lm_head.")


def _bytes(flat: torch.Tensor) -> bytes:
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _word_sum(flat: torch.Tensor) -> int:
    """Sum of the bytes as int64 words modulo 2**64: exact, hence the same in any order and on any device."""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # a view as int64 must begin at a word
    return int(flat.view(torch.int64).sum())


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that the config has and that is set."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


def _rope_bases(config: Any) -> Iterator[float]:
    """Every rotary base; the fields were moved into ``rope_parameters`` (perhaps per layer type) in 5.x."""
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


# ------------------------------------------------------------------------------------------- loading


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ModelError(f"dtype {dtype} is no floating point type; give one of: {', '.join(DTYPES)}")
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; give one of: {', '.join(DTYPES)}, auto")
    return DTYPES[dtype]


def _dtype_keyword() -> str:
    """``torch_dtype`` was renamed to ``dtype`` in transformers 4.56 and warns there."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _device(device: str | torch.device | None) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is unknown; give cpu, cuda, cuda:1, …, auto or spread") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but torch sees no GPU here; use cpu or auto")
    return found


def _load_hint(name: str, source: str, error: Exception) -> str:
    """What went wrong, in one line, and what to do about it."""
    from . import embedded

    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if name in embedded.BUILTIN_MODELS:
        return f"the converted {name!r} in {source} cannot be read ({reason}); delete that folder and try again"
    if os.path.isdir(source):
        return (
            f"no model can be loaded from folder {name!r}: {reason}; it must hold config.json, tokenizer files and "
            "safetensors weights, as model.save_pretrained() and tokenizer.save_pretrained() write them"
        )
    return (
        f"{name!r} is no built-in ({', '.join(sorted(embedded.BUILTIN_MODELS))}), no local folder, and could not be "
        f"loaded from the hub: {reason}; check the name and the network, or give a folder"
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar for the loading of weights: it takes a second, and would break the caller's own bars."""
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()
