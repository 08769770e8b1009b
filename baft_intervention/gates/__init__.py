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

The default, ``fact``, is asked at every token whether its subject has been named and its relation is about to be stated: see
:class:`FactWeighting`. The others act at the positions of a rule.

A network of your own is one class and one line::

    @register_weighting("mine")
    class Mine(WeightingNetwork):
        def forward(self, h): ...

Parameters and buffers of a network are stacked over edits by :func:`torch.func.functional_call` under ``vmap``, so a
network is written for one edit and works for thousands. What all edits share (the whitening) lives in ``shared``
submodules, which are stored once.
"""

from .base import (
    WeightingNetwork,
    make_weighting,
    register_weighting,
    weighting_class,
    weighting_names,
)
from .cosine import CosineWeighting
from .fact import FactWeighting
from .relation_encoder import RelationEncoder
from .simple import ConstantWeighting, LinearWeighting, MLPWeighting
from .whitened import WhitenedWeighting

__all__ = [
    "ConstantWeighting",
    "CosineWeighting",
    "FactWeighting",
    "LinearWeighting",
    "MLPWeighting",
    "RelationEncoder",
    "WeightingNetwork",
    "WhitenedWeighting",
    "make_weighting",
    "register_weighting",
    "weighting_class",
    "weighting_names",
]
