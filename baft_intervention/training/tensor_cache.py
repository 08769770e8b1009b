"""Tensors that are computed once a model and kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor] | None:
    """The file's tensors; None without a file, and, logged, for one that cannot be read or lacks one of ``names``."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        if missing := sorted(set(names) - set(found)):
            raise KeyError(missing[0])
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s cannot be read (%s); it is computed again", path, error)
        return None
    return found


def store_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file in one step; where that fails, log it and go on."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)
    except OSError as error:
        logger.warning("%s cannot be cached in %s (%s); it is computed again next time", path.name, path.parent, error)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
