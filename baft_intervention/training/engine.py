"""Which engine trains an edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import BaftConfig
from ..models.structure import split_reason
from .fast import FastEngine
from .reference import ReferenceEngine

logger = logging.getLogger(__name__)


def make_engine(
    model: nn.Module, tokenizer: Any, config: BaftConfig, layers: Sequence[int]
) -> ReferenceEngine | FastEngine:
    """The engine that ``config.engine`` names; for ``auto`` the fast one wherever it is exact.

    The reference engine also trains where the model is not in one piece on one device, and where the loss looks at the
    model's output on other texts.
    """
    if config.engine == "reference" or config.output_coefficient:
        return ReferenceEngine(model, tokenizer, config, layers)
    if reason := split_reason(model):
        name = type(model).__name__
        logger.warning("%s: %s; edits are trained by whole calls of it, not by the fast engine", name, reason)
        return ReferenceEngine(model, tokenizer, config, layers)
    return FastEngine(model, tokenizer, config, layers)
