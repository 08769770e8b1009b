"""Weighting networks: how much each basis acts on an input.

A weighting network computes ``w(h) in (0, 1)^r`` from a representation ``h (..., d)``. The idea is the paper's (one
weight for each basis, computed from the input); the forms below are our reading.

=============  ==========================================  ======================================================
name           w(h)                                        for
=============  ==========================================  ======================================================
``constant``   ``value``                                   BaFT becomes ReFT; ``value=1`` is exactly LoReFT
``linear``     ``sigmoid(W norm(h) + c)``                  the plainest reading of the paper
``mlp``        ``sigmoid(W2 gelu(W1 norm(h) + c1) + c2)``  a curved border between edited and other input
``whitened``   ``sigmoid(W (h - mu) + c)``                 the linear gate, initialised from the edit and unrelated text
``cosine``     ``sigmoid(a (cos(S(h - mu), e) - theta))``  requests that name no subject
=============  ==========================================  ======================================================

The default, ``subject_relation``, compares subject and relation: see :class:`SubjectRelationWeighting`.

A network of your own is one class and one line::

    @register_weighting("mine")
    class Mine(WeightingNetwork):
        def forward(self, h): ...

Parameters and buffers of a network are stacked over edits by :func:`torch.func.functional_call` under ``vmap``, so a
network is written for one edit and works for thousands. What all edits share (the whitening) lives in ``shared``
submodules, which are stored once.
"""

from .base import (
    EditContext,
    SharedContext,
    WeightingNetwork,
    make_weighting,
    register_weighting,
    weighting_class,
    weighting_names,
)
from .cosine import CosineWeighting
from .simple import ConstantWeighting, LinearWeighting, MLPWeighting
from .subject_relation import SubjectRelationWeighting
from .whitened import WhitenedWeighting

__all__ = [
    "ConstantWeighting",
    "CosineWeighting",
    "EditContext",
    "LinearWeighting",
    "MLPWeighting",
    "SharedContext",
    "SubjectRelationWeighting",
    "WeightingNetwork",
    "WhitenedWeighting",
    "make_weighting",
    "register_weighting",
    "weighting_class",
    "weighting_names",
]
