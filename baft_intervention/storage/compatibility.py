"""Whether a saved adapter fits the model and the settings at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import BaftConfig
from ..errors import AdapterError
from ..models.fingerprint import config_hash, model_fingerprint
from ..runtime.adapter import BaftAdapter, check_layout


def check_base(description: Mapping[str, Any], adapter: BaftAdapter, where: str) -> None:
    """Check that saved edits are of the adapter's model, gate layout and layers.

    Args:
        description: content of ``adapter.json``.
        where: prefix of messages.

    Raises:
        AdapterError: the first difference; the message says what was found and what is needed.
    """
    check_layout(description, adapter.config.weighting, where)
    base = description["base_model"]
    for what, here in (("config_hash", config_hash(adapter.model)), ("fingerprint", model_fingerprint(adapter.model))):
        if base.get(what) != here:
            reason = "architecture" if what == "config_hash" else "weights"
            raise AdapterError(
                f"{where}the adapter was made for {base.get('name')!r} ({base.get('dtype')}), and this model's "
                f"{reason} are not the same ({what} {str(base.get(what))[:12]} against {here[:12]}); nothing was loaded"
            )
    if list(description["layers"]) != list(adapter.layers):
        raise AdapterError(f"{where}layers are {description['layers']}, the settings say {list(adapter.layers)}")


def check_settings(theirs: BaftConfig, ours: BaftConfig, where: str) -> None:
    """Check that a saved adapter's tensors mean the same under our settings (:meth:`BaftConfig.identity_fields`).

    Raises:
        AdapterError: the first setting that differs.
    """
    for name in BaftConfig.identity_fields():
        if getattr(theirs, name) != getattr(ours, name):
            raise AdapterError(
                f"{where}: the adapter has {name} = {getattr(theirs, name)!r}, this editor {getattr(ours, name)!r}; "
                "load it with BaftEditor.from_pretrained"
            )
