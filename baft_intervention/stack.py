"""The edits of one layer as stacked tensors: one batch of maps instead of a loop over edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .functional import baft_update, baft_update_each
from .weighting import WeightingNetwork

MAP_TENSORS = ("rotation", "source_weight", "source_bias")
_PREFIX = "weighting."


class _Match(nn.Module):
    def __init__(self, network: WeightingNetwork):
        super().__init__()
        self.network = network

    def forward(self, h: Tensor) -> Tensor:
        return self.network.match(h)


def is_shared(network: WeightingNetwork, name: str) -> bool:
    """Whether the tensor ``name`` of the network's state is common to all edits of a layer."""
    return name.split(".", 1)[0] in network.shared


class WeightingStack:
    """One weighting network with the parameters of E edits.

    Args:
        network: the structure, and the shared tensors.
        state: ``name -> (E, ...)``, everything that is not shared.
    """

    def __init__(self, network: WeightingNetwork, state: Mapping[str, Tensor]):
        self.network, self._match = network, _Match(network)
        shared = {n: t for n, t in network.state_dict().items() if is_shared(network, n)}
        self.state = {**state, **shared}
        self._dims = {n: None if n in shared else 0 for n in self.state}

    def on_all(self, x: Tensor) -> Tensor:
        """Every edit's weights for the same input: ``(P, d) -> (E, P, r)``."""
        return self._vmap(self.network, self.state, self._dims, x, None)

    def on_own(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Edit e's weights for its own input: ``(E, n, d) -> (E, n, r)``, or ``(E, d) -> (E, r)``."""
        return self._vmap(self.network, {**self.state, **(state or {})}, self._dims, x, 0)

    def match(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.match`."""
        prefixed = {"network." + n: t for n, t in self.state.items()}
        return self._vmap(self._match, prefixed, {"network." + n: d for n, d in self._dims.items()}, x, None)

    def picked(self, index: Tensor) -> dict[str, Tensor]:
        """State of the edits ``index (P,)``: ``name -> (P, ...)``."""
        return {n: t if self._dims[n] is None else t[index] for n, t in self.state.items()}

    @staticmethod
    def _vmap(module: nn.Module, state: Mapping[str, Tensor], dims: dict, x: Tensor, x_dim: int | None) -> Tensor:
        if all(d is None for d in dims.values()) and x_dim is None:  # nothing to map over: a network without tensors
            return functional_call(module, dict(state), (x,)).unsqueeze(0)
        return vmap(lambda s, h: functional_call(module, s, (h,)), in_dims=(dims, x_dim))(dict(state), x)


class EditStack:
    """All edits of one layer, for inference.

    Routed networks compete: each position gets the update of its best-matching edit alone. Others are summed.

    Args:
        network: the weighting network's structure with its shared tensors.
        edits: for each edit its tensors, ``rotation (r, d)``, ``source_weight (r, d)``, ``source_bias (r,)`` and
            ``weighting.<name>``.
    """

    def __init__(self, network: WeightingNetwork, edits: Sequence[Mapping[str, Tensor]]):
        stacked = {n: torch.stack([e[n] for e in edits]) for n in edits[0]}
        self.rotation, self.source, self.bias = (stacked.pop(n) for n in MAP_TENSORS)  # (E, r, d) (E, r, d) (E, r)
        self.weighting = WeightingStack(network, {n[len(_PREFIX) :]: t for n, t in stacked.items()})
        self.routed = network.routed

    def __len__(self) -> int:
        return self.rotation.shape[0]

    def update(self, x: Tensor) -> Tensor:
        """``(P, d) -> (P, d)``, the sum of what the edits add; fp32."""
        x = x.float()
        if self.routed:
            return self._routed(x)[0]
        weights = self.weighting.on_all(x)  # (E, P, r)
        return baft_update(x.expand(len(self), *x.shape), self.rotation, self.source, self.bias, weights).sum(0)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(w, edit)``: for a routed network the winner's weights ``(P, r)`` and its index ``(P,)``; else ``w (E, P, r)``."""
        x = x.float()
        if self.routed:
            return self._routed(x)[1:]
        return self.weighting.on_all(x), torch.arange(len(self), device=x.device)

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(self) == 1:  # no choice to make, and the same arithmetic as a BasisWeightedMap, bit for bit
            weights = self.weighting.on_all(x)[0]
            update = baft_update(x, self.rotation[0], self.source[0], self.bias[0], weights)
            return update, weights, torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        best = self.weighting.match(x).argmax(0)  # (P,)
        weights = self.weighting.on_own(x, self.weighting.picked(best))  # (P, r)
        update = baft_update_each(x, self.rotation[best], self.source[best], self.bias[best], weights)
        return update, weights, best
