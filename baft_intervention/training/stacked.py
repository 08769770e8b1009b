"""The maps of E edits as stacked tensors: trained together, each with its own loss and optimiser state.

There is one tensor ``(E, L, ...)`` for each trained name, stacked over edits and layers. So clipping, AdamW (which works
element by element, so it mixes no edits) and dropping finished edits take a few operations whatever the number of layers.
On a CPU torch's fused AdamW takes a tenth of the time of the plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from ..config import BaftConfig
from ..core.basis_map import BasisWeightedMap
from ..core.functional import baft_update
from ..core.orthonormal import orthonormal_rows
from ..gates import WeightingNetwork
from ..runtime.edit_stack import is_shared
from ..runtime.partial_forward import Changes
from .maps import EditedPositions, EditMaps, Maps
from .types import TrainingContext

_WEIGHTING = "weighting."


def signature(maps: Maps) -> tuple:
    """What edits must have in common to be stacked: names, shapes and which tensors are trained, layer by layer."""
    found = []
    for layer, module in sorted(maps.items()):
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found.append((layer, name, tuple(tensor.shape), name in trained))
        found.append((layer, type(module.weighting).__qualname__))
    return tuple(found)


@dataclass(frozen=True)
class _Leaf:
    """A trained name, and the layers that have it in one shape."""

    name: str
    layers: tuple[int, ...]


class StackedMaps(EditMaps):
    """The maps of E edits as stacked tensors, and AdamW on them.

    Args:
        maps: for each edit ``layer -> map``, all of one :func:`signature`.
        device: where all of them are trained.

    Attributes:
        tensors: ``(E, L, ...)`` for each trained name, the leaves of the graph.
    """

    def __init__(self, maps: Sequence[Maps], config: BaftConfig, context: TrainingContext, device: torch.device):
        super().__init__(maps, config, context, dict.fromkeys(maps[0], device))
        self._device = device
        self._leaves = _leaves(maps[0], self.layers)
        self.tensors = [
            torch.stack(
                [torch.stack([each[n].get_parameter(leaf.name).detach() for n in leaf.layers]) for each in maps]
            ).to(device, torch.float32)
            for leaf in self._leaves
        ]
        self._optimiser = self._make_optimiser()
        trained = {(layer, leaf.name) for leaf in self._leaves for layer in leaf.layers}
        self._networks = {layer: _on(device, maps[0][layer].weighting) for layer in self.layers}
        self._fixed = {
            layer: {
                name: torch.stack([_tensor(each[layer], name) for each in maps]).to(device)
                for name in _own_names(maps[0][layer])
                if (layer, name) not in trained
            }
            for layer in self.layers
        }
        self._state: dict[int, dict[str, Tensor]] = {}
        self._constant: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def _make_optimiser(self) -> torch.optim.AdamW:
        config = self.config
        for tensor in self.tensors:
            tensor.requires_grad_()
        fused = all(t.device.type in ("cpu", "cuda") for t in self.tensors)
        return torch.optim.AdamW(self.tensors, config.learning_rate, weight_decay=config.weight_decay, fused=fused)

    def changes(self, positions: EditedPositions) -> tuple[Changes, dict[int, Tensor]]:
        state: dict[int, dict[str, Tensor]] = {layer: dict(fixed) for layer, fixed in self._fixed.items()}
        for leaf, tensor in zip(self._leaves, self.tensors, strict=True):
            # one decomposition for the bases of all edits and layers
            values = orthonormal_rows(tensor) if leaf.name == "basis" else tensor
            # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole, for each layer
            for layer, value in zip(leaf.layers, values.unbind(1), strict=True):
                state[layer][leaf.name] = value
        for layer in self.layers:
            if "basis" in (fixed := self._fixed[layer]):
                state[layer]["basis"] = orthonormal_rows(fixed["basis"])
        self._state, weights = state, {}
        return {layer: self._change(layer, positions, weights) for layer in self.layers}, weights

    def _change(self, layer: int, positions: EditedPositions, weights: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):  # fp32 throughout, as in a BasisWeightedMap
                x, gates, earlier = self._constant.get(layer) or self._read(layer, hidden, positions)
                if gates is None:
                    gates = self.gates(layer, x, positions.stage if self.config.reads_tokens else None)
                own = self._state[layer]
                delta = baft_update(x, own["basis"], own["source_weight"], own["source_bias"], gates)
                weights[layer] = positions.count(gates)
                return positions.put(hidden, x + (delta if earlier is None else delta + earlier))

        return change

    def _read(
        self, layer: int, hidden: Tensor, positions: EditedPositions
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input, the weights (None where they are trained) and the earlier edits' update; kept where they are constant."""
        x = positions.take(hidden)
        earlier = None
        if layer in self.earlier:
            earlier = self.earlier[layer](x.flatten(0, 1)).view_as(x)
        found = (x, None if layer in self.trained_gates else self.gates(layer, x), earlier)
        if layer == self.layers[0]:  # no edit acts below it
            self._constant[layer] = found
        return found

    def gates(self, layer: int, hidden: Tensor, stage: Tensor | None = None) -> Tensor:
        """``w (E, n, r)`` of each edit on its own ``hidden (E, n, d)``, or of all on the same ``(n, d)``."""
        own = {n.removeprefix(_WEIGHTING): t for n, t in self._state[layer].items() if n.startswith(_WEIGHTING)}
        network, same = self._networks[layer], hidden.ndim == 2
        if len(self) == 1 or not own:
            only = {n: t[0] for n, t in own.items()}
            inputs = (hidden if same else hidden.squeeze(0), *(() if stage is None else (stage.squeeze(0),)))
            single = functional_call(network, only, inputs)
            return single.unsqueeze(0) if single.ndim == 2 else single
        if stage is not None:
            return vmap(lambda s, h, n: functional_call(network, s, (h, n)))(own, hidden, stage.to(hidden.device))
        return vmap(lambda s, h: functional_call(network, s, (h,)), in_dims=(0, None if same else 0))(own, hidden)

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None]) -> None:
        found = [g for g in gradients if g is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in found])  # (names, E)
        factor = (self.config.max_grad_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            # the optimiser leaves out a tensor without a gradient, decay included
            tensor.grad = (
                None if gradient is None else (gradient * factor.view(-1, *[1] * (gradient.ndim - 1))).contiguous()
            )
        self._optimiser.param_groups[0]["lr"] = self.config.rate_at(self.step)
        self._optimiser.step()
        self.step += 1

    @torch.no_grad()
    def store(self, edit: int) -> Maps:
        for leaf, tensor in zip(self._leaves, self.tensors, strict=True):
            for value, layer in zip(tensor[edit], leaf.layers, strict=True):
                self.maps[edit][layer].get_parameter(leaf.name).copy_(value)
        return self.maps[edit]

    @torch.no_grad()
    def keep(self, edits: Sequence[int]) -> None:
        index = torch.tensor(list(edits), device=self._device)
        self.maps = [self.maps[i] for i in edits]
        states = [self._optimiser.state[tensor] for tensor in self.tensors]
        self.tensors = [tensor.detach()[index] for tensor in self.tensors]
        self._optimiser = self._make_optimiser()
        for tensor, state in zip(self.tensors, states, strict=True):
            # each edit has its own moments; the count of steps is common
            self._optimiser.state[tensor] = {n: t[index] if t.ndim else t for n, t in state.items()}
        self._fixed = {layer: {n: t[index] for n, t in fixed.items()} for layer, fixed in self._fixed.items()}
        self._constant = {}


def _leaves(maps: Maps, layers: Sequence[int]) -> list[_Leaf]:
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for layer in layers:
        for name, parameter in maps[layer].named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name, tuple(parameter.shape)), []).append(layer)
    return [_Leaf(name, tuple(found)) for (name, _), found in groups.items()]


def _on(device: torch.device, network: WeightingNetwork) -> WeightingNetwork:
    """The network on ``device``: a copy where it is elsewhere, because the edit's own one stays where it is."""
    tensors = [*network.parameters(), *network.buffers()]
    return network if all(t.device == device for t in tensors) else copy.deepcopy(network).to(device)


def _own_names(module: BasisWeightedMap) -> list[str]:
    """Names of the tensors that belong to one edit alone."""
    names = [n for n, _ in [*module.named_parameters(), *module.named_buffers()]]
    return [n for n in names if not (n.startswith(_WEIGHTING) and is_shared(module.weighting, n[len(_WEIGHTING) :]))]


def _tensor(module: BasisWeightedMap, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    return getattr(module.get_submodule(parent), last).detach()
