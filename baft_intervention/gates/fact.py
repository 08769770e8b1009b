"""The default gate, ``fact``: has the edit's subject been named, and is the text about to state its relation?"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import WeightingNetwork, register_weighting
from .relation_encoder import RelationEncoder

STAGES = 8  # tokens of an answer with weights of their own; later ones share the last


@register_weighting("fact")
class FactWeighting(WeightingNetwork):
    """``w(h) = [fact] sigmoid(W norm(h) + c_n)``: the paper's trained weights, behind a gate that knows the fact (ours).

    The gate is asked at every token. It is open (1, else 0) at token t where

    - the edit's subject has been named in the tokens up to t (:mod:`~baft_intervention.runtime.subject_index`),
    - the text asks about this subject, and an answer begins behind t: two outputs of the shared
      :class:`~baft_intervention.gates.relation_encoder.RelationEncoder`, and
    - the text is about to state the edit's relation: ``z_t . key > threshold``, with ``z`` the encoder's third output and ``key``
      its mean over the request's forms (as a question, as a statement, in chat; ``training/encoding.py``).

    Of several open edits the one with the largest ``z_t . key - threshold`` acts. It then acts on the tokens of its own
    answer too, as long as the text says that answer: ``c_n (r,)`` is the bias behind its n-th token, so that some bases begin the
    answer and others carry it on. ``W (r, d)`` and ``c`` are trained: ``r (d + STAGES)`` parameters.

    Args:
        false_openings: share of other questions about the same subject at which the gate may open; it decides the threshold,
            from relations that the encoder was not trained on. Lower is stricter, higher more general.
        initial_weight: ``sigmoid(c)`` at the start, in (0, 1).
        size: k of the encoder.
    """

    layout = 1
    routed = True
    shared = ("encoder",)
    key: Tensor
    threshold: Tensor
    reads_tokens: ClassVar[bool] = True

    def __init__(
        self, embed_dim: int, rank: int, *, false_openings: float = 0.02, initial_weight: float = 0.7, size: int = 256
    ):
        super().__init__(embed_dim, rank)
        if not 0.0 < false_openings < 1.0:
            raise ConfigError(
                f"false_openings is {false_openings}; it is a share and must lie strictly between 0 and 1"
            )
        if not 0.0 < initial_weight < 1.0:
            raise ConfigError(f"initial_weight is {initial_weight}; it must lie strictly between 0 and 1")
        self.false_openings = false_openings
        self.encoder = RelationEncoder()
        self.register_buffer("key", torch.zeros(size))  # 0: closed until initialised
        self.register_buffer("threshold", torch.tensor(1.0))
        self.weight = nn.Parameter(torch.zeros(rank, embed_dim))
        bias = math.log(initial_weight / (1.0 - initial_weight))
        self.bias = nn.Parameter(torch.full((STAGES, rank), bias))

    def forward(self, h: Tensor, stage: Tensor | None = None) -> Tensor:
        """``w (..., r)`` where the gate is open: ``h (..., d)``, ``stage (...)`` the number of the answer's tokens so far."""
        bias = self.bias[0] if stage is None else self.bias[stage.clamp(max=STAGES - 1)]
        return torch.sigmoid(F.linear(F.layer_norm(h, (self.embed_dim,)), self.weight) + bias)

    def match(self, h: Tensor) -> Tensor:
        """Positive where the text is about to state the edit's relation; ``h (..., k)`` is the encoder's ``z``."""
        return h @ self.key - self.threshold
