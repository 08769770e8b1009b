"""Facts about the user's machine: the cache folder, and the library versions that a result depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """Where computed files are kept: ``$BAFT_CACHE``, else ``baft_intervention`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME``, else ``~/.cache``.
    """
    if own := os.environ.get("BAFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baft_intervention"


def library_versions(*more: str) -> dict[str, str]:
    """Versions of Python, this package, torch, transformers, safetensors, and the packages named in ``more``.

    A package that is not installed is ``"absent"``.
    """
    from . import __version__

    found = {"baft_intervention": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
