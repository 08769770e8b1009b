"""Checks that a saved adapter fits the model and settings of an editor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import BaftConfig
from ..errors import AdapterError
from ..models.fingerprint import config_hash, model_fingerprint
from ..runtime.adapter import BaftAdapter, check_layout


def check_base(description: Mapping[str, Any], adapter: BaftAdapter, source: str) -> None:
    """Check that saved edits belong to the adapter's base model, gate layout and layers.

    Args:
        description: contents of ``adapter.json``.
        adapter: the adapter that is to receive the edits.
        source: prefix of error messages.

    Raises:
        AdapterError: they differ; the message gives both values of the first difference.
    """
    check_layout(description, adapter.config.weighting, source)
    base = description["base_model"]
    for name, here in (("config_hash", config_hash(adapter.model)), ("fingerprint", model_fingerprint(adapter.model))):
        if base.get(name) != here:
            reason = "architecture differs" if name == "config_hash" else "weights differ"
            raise AdapterError(
                f"{source}the adapter was made for {base.get('name')!r} ({base.get('dtype')}), but this model's {reason} "
                f"({name} {str(base.get(name))[:12]} in the adapter, {here[:12]} here); nothing was loaded"
            )
    if list(description["layers"]) != list(adapter.layers):
        raise AdapterError(
            f"{source}the adapter edits layers {description['layers']}, but the settings say {list(adapter.layers)}"
        )


def check_settings(theirs: BaftConfig, ours: BaftConfig, source: str) -> None:
    """Check that two configs agree on every setting that gives the tensors their meaning.

    Args:
        theirs: settings of the saved adapter.
        ours: settings of this editor.
        source: prefix of error messages.

    Raises:
        AdapterError: a setting of :meth:`BaftConfig.identity_fields` differs; the message names the first one.
    """
    for name in BaftConfig.identity_fields():
        if getattr(theirs, name) != getattr(ours, name):
            raise AdapterError(
                f"{source}: the adapter has {name} = {getattr(theirs, name)!r}, but this editor has {getattr(ours, name)!r}; "
                "load it with BaftEditor.from_pretrained"
            )
