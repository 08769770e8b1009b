"""The parts and sizes of a transformers model: its decoder blocks, width, context length and devices.

All functions look at modules and the config, never at class names. A new architecture with an ordinary stack of decoder
blocks therefore works without changes here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # config fields for the number of blocks


def text_config(model: nn.Module) -> Any:
    """The config of the language part: ``config.text_config`` of a multimodal model, else ``config``.

    Raises:
        ModelError: the model has no config.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config; give a transformers model")
    return getattr(config, "text_config", None) or config


def first_field(config: Any, *names: str) -> Any:
    """The value of the first of these config fields that is set, or None."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder blocks, found by structure.

    It is the outermost ``ModuleList`` with as many members as the config has layers, all of one class. The search skips the
    parts of a multimodal model that read images or sound.

    Raises:
        ModelError: there is no such list, or there are several.
    """
    depth = first_field(text_config(model), *DEPTH_FIELDS)
    if depth is None:
        raise ModelError(f"the config of {type(model).__name__} does not give the number of layers (num_hidden_layers)")
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


def block_owner(model: nn.Module) -> nn.Module:
    """The module that calls the decoder blocks: ``model.model`` of most, ``transformer`` of GPT-2."""
    blocks = find_blocks(model)
    return next(m for m in model.modules() if any(child is blocks for child in m.children()))


def hidden_size(model: nn.Module) -> int:
    """``d``, the width of the residual stream that the blocks read and write.

    Raises:
        ModelError: the config does not give it.
    """
    value = first_field(text_config(model), "hidden_size", "n_embd", "d_model")
    if value is None:
        raise ModelError(f"the config of {type(model).__name__} does not give hidden_size")
    return int(value)


def context_length(model: nn.Module) -> int | None:
    """The maximum number of tokens that the model reads; None if its config does not give it."""
    value = first_field(text_config(model), "max_position_embeddings", "n_positions", "n_ctx")
    return int(value) if isinstance(value, int) and value > 0 else None


def compute_device(module: nn.Module) -> torch.device:
    """The device on which a block, or a model's first part, computes.

    Parameters that accelerate has offloaded stay on the meta device; accelerate's hook names the device they run on.

    Raises:
        ModelError: no parameter has values, and no hook names a device.
    """
    first = next(iter(module.parameters()), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in accelerate_hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    raise ModelError(f"{type(module).__name__} has no parameters with values; load the model with its weights")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over processes (FSDP, ``fully_shard``); all ranks must then take part in every call."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def split_reason(model: nn.Module) -> str:
    """Why the model is not entirely on one device, as a phrase for error messages; empty if it is."""
    if is_sharded(model):
        return "its parameters are sharded over processes"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "parts of it are offloaded"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return f"its layers are on several devices ({', '.join(devices)})" if len(devices) > 1 else ""


def accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, unpacked from its ``SequentialHook``."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))
