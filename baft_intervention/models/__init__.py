"""The base model: loading it by name, its structure, its identity, its tokenisation and its chat template."""

from .fingerprint import config_hash, model_fingerprint
from .loading import load_model
from .structure import find_blocks, hidden_size

__all__ = ["config_hash", "find_blocks", "hidden_size", "load_model", "model_fingerprint"]
