"""BaFT: basis-level representation fine-tuning, for editing what a language model knows (arXiv 2503.00306).

The public names. What needs pyvene, pyreft or datasets is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "BaftAdapter",
    "BaftConfig",
    "BaftEditor",
    "BaftError",
    "BaftTrainer",
    "BasisWeightedLoReFTIntervention",
    "BasisWeightedMap",
    "ConfigError",
    "DataError",
    "Edit",
    "EditError",
    "EditReport",
    "EditRequest",
    "MergeReport",
    "Message",
    "ModelError",
    "PositionError",
    "Probe",
    "RequestError",
    "StoreError",
    "WeightingNetwork",
    "__version__",
    "load_facts",
    "load_model",
    "load_requests",
    "make_edit_data_module",
    "register_format",
    "register_method",
    "register_metric",
    "register_positions",
    "register_weighting",
]

# name -> module; resolved on first use, so that `import baft_intervention` costs nothing it does not need
_PUBLIC = {
    "AdapterError": "errors",
    "BaftAdapter": "runtime.adapter",
    "BaftConfig": "config",
    "BaftEditor": "editor.editor",
    "BaftError": "errors",
    "BaftTrainer": "reft.trainer",
    "BasisWeightedLoReFTIntervention": "reft.intervention",
    "BasisWeightedMap": "core.basis_map",
    "ConfigError": "errors",
    "DataError": "errors",
    "Edit": "runtime.adapter",
    "EditError": "errors",
    "EditReport": "editor.report",
    "EditRequest": "requests",
    "Message": "requests",
    "MergeReport": "storage.merge",
    "ModelError": "errors",
    "PositionError": "errors",
    "Probe": "requests",
    "RequestError": "errors",
    "StoreError": "errors",
    "WeightingNetwork": "gates",
    "load_facts": "data",
    "load_model": "models.loading",
    "load_requests": "data",
    "make_edit_data_module": "reft.data_module",
    "register_format": "data",
    "register_method": "evaluation.methods",
    "register_metric": "evaluation.record_metrics",
    "register_positions": "core.positions",
    "register_weighting": "gates",
}

_NEEDS = {"pyvene": "reft", "pyreft": "reft", "datasets": "data"}  # import name -> extra that brings it

if TYPE_CHECKING:
    from .config import BaftConfig
    from .core.basis_map import BasisWeightedMap
    from .core.positions import register_positions
    from .data import load_facts, load_requests, register_format
    from .editor.editor import BaftEditor
    from .editor.report import EditReport
    from .errors import (
        AdapterError,
        BaftError,
        ConfigError,
        DataError,
        EditError,
        ModelError,
        PositionError,
        RequestError,
        StoreError,
    )
    from .evaluation.methods import register_method
    from .evaluation.record_metrics import register_metric
    from .gates import WeightingNetwork, register_weighting
    from .models.loading import load_model
    from .reft.data_module import make_edit_data_module
    from .reft.intervention import BasisWeightedLoReFTIntervention
    from .reft.trainer import BaftTrainer
    from .requests import EditRequest, Message, Probe
    from .runtime.adapter import BaftAdapter, Edit
    from .storage.merge import MergeReport


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    except ModuleNotFoundError as error:
        extra = _NEEDS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        raise ImportError(
            f"{name} needs the package {error.name!r}; install it with: pip install 'baft_intervention[{extra}]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
