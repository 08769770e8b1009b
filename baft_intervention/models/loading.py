"""Loading a model by name: a built-in, a local folder or a hub id.

The built-in, ``smollm2-135m``, is a Llama of 135 M parameters that is installed as a package, so that everything runs without
a hub. :func:`load_model` returns model and tokenizer. It never runs remote code and reads only safetensors weights.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .embedded import BUILTIN_MODELS, converted_folder

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_CLOSE = 0.8  # minimum similarity (difflib's ratio) of a misspelling; smolm2-135m has 0.96
_FOLDER_MARKS = ("config.json", "adapter.json")  # a folder with one of these is a model or an adapter


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
        device: ``None`` is the CPU. ``"auto"`` is the GPU if there is one. ``"spread"`` fills all GPUs, then the CPU, then the
            disk (accelerate's ``device_map="auto"``).
        dtype: a ``torch.dtype`` or ``"float32"``, ``"bfloat16"``, ``"float16"``. ``None`` and ``"auto"`` keep the
            checkpoint's dtype (float32 for the built-in).
        revision: branch, tag or commit of a hub id.

    Returns:
        The model in eval mode, with its ``requires_grad`` flags unchanged, and its tokenizer. The tokenizer always has a
        padding token: if it defines none, an existing token is used, so that the embeddings keep their size.

    Raises:
        ModelError: the name cannot be resolved, or the model cannot be loaded; the message says how to fix it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name)
    source = resolve_model(name)
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    mapped = {"device_map": "auto"} if device == "spread" else {}
    target = None if mapped else _device(device)
    if source == name and not os.path.isdir(source):  # a hub id; a folder has no revision
        kwargs["revision"] = revision or "main"
        # without a network, transformers would retry each request for half a minute even if the cache holds the model
        kwargs["local_files_only"] = not hub_answers(name, "config.json", revision)
    elif revision is not None:
        raise ModelError(f"revision {revision!r} was given for {name!r}, which is not a hub id; leave revision out")
    try:
        with _quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, **kwargs)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, **{_dtype_keyword(): _dtype(dtype)}, **kwargs, **mapped
            )
    except Exception as error:  # from_pretrained raises OSError, ValueError, KeyError, SafetensorError, …
        raise ModelError(_load_hint(name, source, error)) from error
    give_pad_token(tokenizer, name)
    if name in BUILTIN_MODELS:
        model.config._name_or_path = name  # so that a saved adapter names the built-in, not this machine's cache
    return (model if target is None else model.to(target)).eval(), tokenizer


def resolve_model(name: str) -> str:
    """The folder or hub id that ``name`` stands for; the first use of a built-in converts it into the cache.

    Raises:
        ModelError: ``name`` is a path that is not a folder, a folder without ``config.json``, a misspelt name, or not a
            valid hub id.
    """
    if name in BUILTIN_MODELS:
        return str(converted_folder(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder {name!r} has no config.json; give a folder written by model.save_pretrained()")
        return str(path)
    known = ", ".join(sorted(BUILTIN_MODELS))
    if path.is_file():
        raise ModelError(
            f"{name!r} is a file, not a folder; give the folder that holds config.json, or one of: {known}"
        )
    if similar := _similar_name(name):
        raise ModelError(
            f"there is no model {name!r}; did you mean {similar!r}? A model on the hub needs its owner's name, user/model"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"{name!r} is not a folder and cannot be a hub id; give a folder, a hub id or one of: {known}")
    return name


def _similar_name(name: str) -> str | None:
    """The built-in, or the model or adapter folder in the same place, whose name ``name`` probably misspells."""
    folder, last = os.path.split(name)
    try:
        beside = [p.name for p in Path(folder).expanduser().iterdir() if any((p / m).is_file() for m in _FOLDER_MARKS)]
    except OSError:
        beside = []
    names = {n.lower(): n for n in (beside if folder else [*beside, *BUILTIN_MODELS])}
    found = difflib.get_close_matches(last.lower(), names, n=1, cutoff=_CLOSE)
    return os.path.join(folder, names[found[0]]) if found else None


def hub_answers(repo_id: str, file: str, revision: str | None = None) -> bool:
    """Whether the hub can be reached: one request for a file's metadata, without retries.

    It is False without a network, in offline mode, or if the hub does not answer within ``HF_HUB_ETAG_TIMEOUT`` seconds.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision))
    except HfHubHTTPError:  # the hub did answer: no such repository, no such file, no permission
        return True
    except Exception as error:  # errors of the HTTP client, which differs between versions
        logger.debug("the hub cannot be reached: %r", error)
        return False
    return True


def give_pad_token(tokenizer: Any, name: str = "") -> None:
    """If the tokenizer has no padding token, use one of its other tokens.

    Raises:
        ModelError: the tokenizer has no tokens at all.
    """
    if tokenizer.pad_token_id is not None:
        return
    token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    if not token:
        raise ModelError(f"the tokenizer of {name!r} has no token to pad with; set tokenizer.pad_token")
    tokenizer.pad_token = token


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ModelError(f"dtype {dtype} is not a floating-point type; give one of: {', '.join(DTYPES)}")
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; give one of: {', '.join(DTYPES)}, auto")
    return DTYPES[dtype]


def _dtype_keyword() -> str:
    """``torch_dtype`` became ``dtype`` in transformers 4.56; the old name warns there."""
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
        raise ModelError(f"device is {str(device)!r}, but torch sees no GPU; use cpu or auto")
    return found


def _load_hint(name: str, source: str, error: Exception) -> str:
    """One line that says what went wrong and how to fix it."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if name in BUILTIN_MODELS:
        return f"the converted {name!r} in {source} cannot be read ({reason}); delete that folder and try again"
    if os.path.isdir(source):
        return (
            f"no model can be loaded from folder {name!r}: {reason}; it must hold config.json, tokenizer files and "
            "safetensors weights, as model.save_pretrained() and tokenizer.save_pretrained() write them"
        )
    return (
        f"{name!r} is not a built-in ({', '.join(sorted(BUILTIN_MODELS))}), not a local folder, and could not be "
        f"loaded from the hub: {reason}; check the name and the network, or give a folder"
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bar inside the block; it would break the caller's own bar."""
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()
