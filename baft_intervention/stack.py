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
_CANDIDATES = 32  # edits of one subject that a position is compared with; far more than there are


class _Match(nn.Module):
    def __init__(self, network: WeightingNetwork):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network.match(*inputs)


class _Evidence(nn.Module):
    def __init__(self, network: WeightingNetwork):
        super().__init__()
        self.network = network

    def forward(self, h: Tensor) -> Tensor:
        return self.network.evidence(h)


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
        self.network, self._match, self._evidence = network, _Match(network), _Evidence(network)
        shared = {n: t for n, t in network.state_dict().items() if is_shared(network, n)}
        self.state = {**state, **shared}
        self._dims = {n: None if n in shared else 0 for n in self.state}

    def on_all(self, x: Tensor) -> Tensor:
        """Every edit's weights for the same input: ``(P, d) -> (E, P, r)``."""
        return self._vmap(self.network, self.state, "", (x,), (None,))

    def on_own(self, x: Tensor, state: Mapping[str, Tensor] | None = None, evidence: Tensor | None = None) -> Tensor:
        """Edit e's weights for its own input: ``(E, n, d) -> (E, n, r)``, or ``(E, d) -> (E, r)``."""
        inputs = (x,) if evidence is None else (x, evidence)
        return self._vmap(self.network, {**self.state, **(state or {})}, "", inputs, (0,) * len(inputs))

    def match_own(self, x: Tensor, evidence: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``(E, d), (E,) -> (E,)``, see :meth:`WeightingNetwork.match`."""
        inputs = (x, evidence)
        return self._vmap(self._match, {**self.state, **state}, "network.", inputs, (0,) * len(inputs))

    def match(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.match`."""
        return self._vmap(self._match, self.state, "network.", (x,), (None,))

    def evidence(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.evidence`."""
        return self._vmap(self._evidence, self.state, "network.", (x,), (None,))

    def picked(self, index: Tensor) -> dict[str, Tensor]:
        """State of the edits ``index (P,)``: ``name -> (P, ...)``."""
        return {n: t if self._dims[n] is None else t[index] for n, t in self.state.items()}

    def _vmap(
        self,
        module: nn.Module,
        state: Mapping[str, Tensor],
        prefix: str,
        inputs: tuple[Tensor, ...],
        input_dims: tuple[int | None, ...],
    ) -> Tensor:
        dims = {prefix + n: self._dims[n] for n in state}
        state = {prefix + n: t for n, t in state.items()}
        count = next((t.shape[0] for n, t in state.items() if dims[n] is not None), 1)
        if count == 1 and all(d is None for d in input_dims):  # nothing to map over: one edit, or no tensors at all
            only = {n: t if dims[n] is None else t[0] for n, t in state.items()}
            return functional_call(module, only, inputs).unsqueeze(0)
        return vmap(lambda s, *x: functional_call(module, s, x), in_dims=(dims, *input_dims))(state, *inputs)


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

    def evidence(self, x: Tensor) -> Tensor:
        """Every edit's evidence at the read layer: ``(P, d) -> (E, P)``."""
        return self.weighting.evidence(x.float())

    def update(self, x: Tensor, evidence: Tensor | None = None) -> Tensor:
        """What the edits add: ``(P, d) -> (P, d)``, fp32.

        Args:
            x: representations at the edited positions.
            evidence: ``(E, P)`` for a network that reads the subject.
        """
        x = x.float()
        if len(self) == 1 and evidence is None:
            return self._single(x)[0]
        if self.routed:
            return self._routed(x, evidence)[0]
        weights = self.weighting.on_all(x)  # (E, P, r)
        return baft_update(x.expand(len(self), *x.shape), self.rotation, self.source, self.bias, weights).sum(0)

    def weights(self, x: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(w, edit)``: of a routed network the winner's weights ``(P, r)`` and index ``(P,)``; else ``w (E, P, r)``."""
        x = x.float()
        if self.routed:
            return self._routed(x, evidence)[1:]
        return self.weighting.on_all(x), torch.arange(len(self), device=x.device)

    def _single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update and weights of the only edit: the arithmetic of a BasisWeightedMap, bit for bit."""
        weights = self.weighting.on_all(x)[0]
        return baft_update(x, self.rotation[0], self.source[0], self.bias[0], weights), weights

    def _routed(self, x: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if len(self) == 1 and evidence is None:  # nothing to choose
            return *self._single(x), torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        if evidence is None:
            best = self.weighting.match(x).argmax(0)  # (P,)
            weights = self.weighting.on_own(x, self.weighting.picked(best))  # (P, r)
        else:
            best, found = self._among_candidates(x, evidence)
            weights = self.weighting.on_own(x, self.weighting.picked(best), found)
        update = baft_update_each(x, self.rotation[best], self.source[best], self.bias[best], weights)
        return update, weights, best

    def _among_candidates(self, x: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """The best-matching edit of each position, ``(P,)``, and its evidence, among those with the most evidence."""
        k, positions = min(_CANDIDATES, len(self)), x.shape[0]
        found, candidates = evidence.topk(k, dim=0)  # (k, P) each
        flat = candidates.flatten()
        match = self.weighting.match_own(x.repeat(k, 1), found.flatten(), self.weighting.picked(flat))
        winner = match.view(k, positions).argmax(0, keepdim=True)  # (1, P)
        return candidates.gather(0, winner)[0], found.gather(0, winner)[0]
