"""BaFT as an intervention type for pyvene and pyreft."""

from __future__ import annotations

from typing import Any, Literal

from pyvene import (
    DistributedRepresentationIntervention,
    RepresentationConfig,
    SourcelessIntervention,
    TrainableIntervention,
)
from torch import Tensor

from ..core.basis_map import BasisWeightedMap
from ..errors import ConfigError
from ..gates import WeightingNetwork


class BasisWeightedLoReFTIntervention(
    SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention
):
    """BaFT for pyvene: ``Phi(h) = h + R^T diag(w(h)) (A h + b - R h)`` (Liu et al. 2025, arXiv 2503.00306).

    Use it like one of pyreft's own interventions::

        config = pyreft.ReftConfig(representations={
            "layer": 20, "component": "block_output", "low_rank_dimension": 12,
            "intervention": BasisWeightedLoReFTIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=12)})
        reft_model = pyreft.get_reft_model(model, config)

    Unlike pyreft's ``LoreftIntervention``, it keeps parameters and arithmetic in fp32 on models of any dtype, and has
    no dropout on the residual stream. It loads in place, so an optimiser keeps its parameters. Its basis stays
    orthonormal to 1e-5 under any optimiser, weight decay included.

    Args:
        embed_dim: d, the size of the intervened representation.
        low_rank_dimension: r, the number of bases (pyreft's name for the rank), 1 <= r <= d.
        weighting: name of a registered weighting network (``constant``, ``linear``, ``mlp``, ``cosine``, or your own),
            or an existing network.
        weighting_options: keyword arguments for the named network.
        init: ``identity`` (no effect until trained) or ``random`` (as in LoReFT).
        keep_last_dim, use_fast, subspace_partition: pyvene's own arguments; ``subspace_partition`` must be None.

    Shapes: ``base (B, P, d)`` or ``(B, T, d)`` -> the same shape and dtype.

    Raises:
        ConfigError: r is out of range, the weighting is unknown, or subspaces are given, which this map does not support.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        weighting: str | WeightingNetwork = "linear",
        weighting_options: dict[str, Any] | None = None,
        init: Literal["identity", "random"] = "identity",
        keep_last_dim: bool = True,
        use_fast: bool = False,
        subspace_partition: list | None = None,
        **pyvene_metadata: Any,
    ):
        unknown = set(pyvene_metadata) - _PYVENE_METADATA
        if unknown:
            raise ConfigError(f"unknown argument {sorted(unknown)[0]!r} of BasisWeightedLoReFTIntervention")
        if subspace_partition is not None:
            raise ConfigError(
                f"subspace_partition is {subspace_partition!r}; BaFT weighs its bases itself, so leave it out"
            )
        super().__init__(embed_dim=int(embed_dim), keep_last_dim=keep_last_dim, use_fast=use_fast)
        self.map = BasisWeightedMap(
            int(embed_dim), low_rank_dimension, weighting=weighting, weighting_options=weighting_options, init=init
        )

    @property
    def rotation(self) -> Tensor:
        """``R (r, d)``, orthonormal rows."""
        return self.map.rotation

    @property
    def last_weights(self) -> Tensor | None:
        """``w(h) (B, P, r)`` of the most recent call, detached; None before the first call."""
        return self.map.last_weights

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, base: Tensor, source: Any = None, subspaces: Any = None
    ) -> Tensor:
        if subspaces is not None and any(s is not None for s in subspaces):
            raise ConfigError("BasisWeightedLoReFTIntervention has no subspaces; it weighs every basis by the input")
        return self.map(base)

    def __str__(self) -> str:
        rank, dim = self.map.basis.shape
        return f"BasisWeightedLoReFTIntervention(d={dim}, r={rank})"


# what pyvene passes to an intervention class besides embed_dim and our own arguments; none of it changes the map
_PYVENE_METADATA = {*RepresentationConfig._fields, "interchange_dim"}
