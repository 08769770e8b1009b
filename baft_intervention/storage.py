"""Writing and reading an adapter directory, so that nothing half-written, foreign or altered is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .errors import AdapterError

SCHEMA = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema": int, "base_model": dict, "config": dict, "layers": list, "edits": list, "tensors_sha256": str,
}  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import safetensors
    import transformers

    from . import __version__

    return {
        "baft_intervention": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "safetensors": safetensors.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _seal(description: Mapping[str, Any]) -> str:
    """sha256 over the description without its seal."""
    text = json.dumps({k: v for k, v in description.items() if k != "seal"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_directory(path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write both files into a new directory beside ``path``, sync them, and rename it into place.

    Raises:
        AdapterError: ``path`` is there and is no adapter directory, or cannot be written; what was there stays.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give the name of a folder for the adapter")
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION).is_file():
        raise AdapterError(f"folder {path} is not empty and holds no adapter; choose a new folder")
    blob = save_tensors(dict(state), metadata={"format": "pt"})
    description = {"schema": SCHEMA, **description, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    description["seal"] = _seal(description)
    text = json.dumps(description, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    fresh: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        for name, data in ((TENSORS, blob), (DESCRIPTION, text)):
            with open(fresh / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        os.chmod(fresh, 0o777 & ~_umask())
        _replace(fresh, path)
    except OSError as error:
        raise AdapterError(f"the adapter cannot be written to {path}: {error}; what was there is unchanged") from error
    finally:
        if fresh is not None and fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)
    return path


def _replace(fresh: Path, path: Path) -> None:
    if not path.exists():
        os.rename(fresh, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.rename(path, old)  # an empty folder may be renamed onto
    try:
        os.rename(fresh, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_directory(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check an adapter directory: ``(state, description)``.

    Raises:
        AdapterError: no such folder, a file that is missing, truncated or altered, or another schema.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise AdapterError(f"there is no adapter folder {path}")
    for name in (DESCRIPTION, TENSORS):
        file = path / name
        if file.is_symlink() and path.resolve() not in file.resolve().parents:
            raise AdapterError(f"{file} is a link out of the adapter folder; copy the file itself")
        if not file.is_file():
            raise AdapterError(f"folder {path} has no {name}; it is no adapter, or a damaged one")
    try:
        raw = (path / DESCRIPTION).read_bytes()
        blob = (path / TENSORS).read_bytes()
    except OSError as error:
        raise AdapterError(f"the adapter in {path} cannot be read: {error}") from error
    try:
        description = json.loads(raw.decode("utf-8", "surrogatepass"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path / DESCRIPTION} is truncated or no JSON: {error}") from None
    _check_description(path / DESCRIPTION, description)
    if hashlib.sha256(blob).hexdigest() != description["tensors_sha256"]:
        raise AdapterError(f"{path / TENSORS} is truncated or altered: its sha256 is not the one in {DESCRIPTION}")
    try:
        return load_tensors(blob), description
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path / TENSORS} is no safetensors file: {error}") from None


def _check_description(file: Path, description: Any) -> None:
    if not isinstance(description, dict):
        raise AdapterError(f"{file} must hold an object, not {type(description).__name__}")
    schema = description.get("schema")
    if schema != SCHEMA:
        raise AdapterError(f"{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    for name, kind in _REQUIRED.items():
        if not isinstance(description.get(name), kind):
            raise AdapterError(f"{file}: field {name!r} is {description.get(name)!r}; it is missing or of another type")
    if description.get("seal") != _seal(description):
        raise AdapterError(f"{file} was altered after it was written: its seal does not fit its content")
