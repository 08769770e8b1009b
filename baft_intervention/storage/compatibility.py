"""Whether an adapter that was read belongs to the model and the settings at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import BaftConfig
from ..errors import AdapterError
from ..models.fingerprint import config_hash, model_fingerprint
from ..runtime.adapter import BaftAdapter, check_layout

# settings that only training reads: an adapter made with others answers the same
_TRAINING_ONLY = {
    "learning_rate", "weight_decay", "steps", "loss_target", "append_eos", "ending", "ending_coefficient",
    "locality_coefficient", "output_coefficient",
    "balance_coefficient", "bank_size", "max_grad_norm", "seed", "engine", "init", "allocation", "schedule", "bases", "order",
    "mini_batch", "epochs", "augmentations",
}  # fmt: skip


def check_base(description: Mapping[str, Any], adapter: BaftAdapter, where: str) -> None:
    """Refuse a description of edits of another model, of another form of the gate, or on other layers than the adapter's.

    Raises:
        AdapterError: which it is; the message says what was found and what is needed.
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
    """Refuse an adapter whose tensors mean something else with our settings.

    Raises:
        AdapterError: a setting that differs, other than those that training alone reads.
    """
    for field in dataclasses.fields(BaftConfig):
        if getattr(theirs, field.name) != getattr(ours, field.name) and field.name not in _TRAINING_ONLY:
            raise AdapterError(
                f"{where}: the adapter has {field.name} = {getattr(theirs, field.name)!r}, this editor "
                f"{getattr(ours, field.name)!r}; load it with BaftEditor.from_pretrained"
            )
