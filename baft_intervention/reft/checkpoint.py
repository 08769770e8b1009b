"""Save and load the interventions of a pyreft model as safetensors and JSON, without pickle.

Loading copies into the model's own parameters, and copies either everything or nothing. It detects an interrupted save.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..environment import library_versions
from ..errors import AdapterError
from ..runtime.edit_stack import is_shared
from .intervention import BasisWeightedLoReFTIntervention

SCHEMA = 1
TENSORS, DESCRIPTION = "interventions.safetensors", "interventions.json"
_EXTRA = "_extra_state"


def _state(reft_model: Any) -> dict[str, Tensor]:
    """What is saved: ``interventions.<key>.<name>``, and ``model.<name>`` for each trainable base parameter."""
    state = {
        f"interventions.{key}.{name}": tensor
        for key, module in reft_model.interventions.items()
        for name, tensor in module.state_dict().items()
    }
    state.update({f"model.{n}": p for n, p in reft_model.model.named_parameters() if p.requires_grad})
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def save_interventions(reft_model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write the interventions of a ``pyreft.ReftModel`` to a folder, replacing an earlier save.

    Each file is written under a temporary name, synced and renamed. The description is written last and holds the
    digest of the tensors, so :func:`load_interventions` refuses a save that was interrupted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blob = save_tensors(_state(reft_model), metadata={"format": "pt"})
    description = {
        "schema": SCHEMA,
        "interventions": {
            key: {
                "type": type(module).__name__,
                "layer": reft_model.representations[key].layer,
                "component": reft_model.representations[key].component,
            }
            for key, module in reft_model.interventions.items()
        },
        "versions": library_versions(),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    text = json.dumps(description, indent=1, sort_keys=True).encode()
    for name, data in ((TENSORS, blob), (DESCRIPTION, text)):
        partial = folder / f".{name}.{os.getpid()}"
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return folder


def load_interventions(reft_model: Any, folder: str | os.PathLike[str]) -> None:
    """Load saved interventions into a ``pyreft.ReftModel`` of the same configuration, in place.

    Values are copied into the existing parameters, so an optimiser keeps working.

    Raises:
        AdapterError: a file is missing, damaged or of another schema, or the interventions do not match the model's;
            the model is unchanged.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        blob = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} holds no readable interventions: {error}") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        schema = description.get("schema") if isinstance(description, dict) else None
        raise AdapterError(f"{folder / DESCRIPTION} has schema {schema!r}; this version reads schema {SCHEMA}")
    if hashlib.sha256(blob).hexdigest() != description.get("tensors_sha256"):
        raise AdapterError(f"{folder / TENSORS} is truncated or altered: its sha256 is not the one in {DESCRIPTION}")
    try:
        state = load_tensors(blob)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{folder / TENSORS} is not a safetensors file: {error}") from None
    _check(state, reft_model, folder)
    for key, module in reft_model.interventions.items():
        prefix = f"interventions.{key}."
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    with torch.no_grad():
        for name, parameter in reft_model.model.named_parameters():
            if f"model.{name}" in state:
                parameter.copy_(state[f"model.{name}"])


def _check(state: dict[str, Tensor], reft_model: Any, folder: Path) -> None:
    own = _state(reft_model)
    if foreign := sorted(set(state) ^ set(own)):
        where = "saved, but not in the model" if foreign[0] in state else "in the model, but not saved"
        raise AdapterError(
            f"{folder}: tensor {foreign[0]!r} is {where}; load into a model with the same ReftConfig and weighting"
        )
    for name, tensor in sorted(state.items()):
        if name.endswith(_EXTRA):
            if not torch.equal(tensor, own[name]):
                theirs, here = (bytes(t.tolist()).decode("utf-8", "replace") for t in (tensor, own[name]))
                raise AdapterError(
                    f"{folder}: the saved weighting is {theirs}, but the model's is {here}; they must be equal"
                )
        elif tensor.shape != own[name].shape and not _is_data(reft_model, name):
            raise AdapterError(
                f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, but the model's has {tuple(own[name].shape)}"
            )


def _is_data(reft_model: Any, name: str) -> bool:
    """Whether the tensor's shape depends on data, such as the number of directions of a whitening."""
    for key, module in reft_model.interventions.items():
        prefix = f"interventions.{key}.map.weighting."
        if name.startswith(prefix) and isinstance(module, BasisWeightedLoReFTIntervention):
            return is_shared(module.map.weighting, name.removeprefix(prefix))
    return False
