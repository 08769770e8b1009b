"""The maps of an edit in training: how they are made, where they act, and the plain way to train them.

:class:`EditMaps` is what the training loop (:mod:`.batch`) needs of the maps of E edits. :class:`ModuleMaps` trains the
modules of one edit as they are, with torch's own AdamW; :class:`~.stacked.StackedMaps` trains many edits at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import BaftConfig
from ..core.basis_map import BasisWeightedMap
from ..core.losses import balance_loss, locality_loss
from ..requests import EditRequest
from ..runtime.distributed import DataParallel
from ..runtime.edit_stack import is_shared
from ..runtime.partial_forward import Changes
from .types import TrainingContext

Maps = Mapping[int, BasisWeightedMap]
"""``layer -> map`` of one edit."""


def edit_seed(seed: int, requests: Sequence[EditRequest]) -> int:
    """The seed of an edit, from the run's seed and the requests' texts: the same alone, in a batch, or resumed."""
    text = "\x1f".join(f"{r.prompt}\x1e{r.target_new}" for r in requests)
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{text}".encode("utf-8", "surrogatepass")).digest()[:7], "big")


def make_maps(
    config: BaftConfig, dim: int, layers: Sequence[int], shared: Mapping[int, Mapping[str, Tensor]], seed: int
) -> dict[int, BasisWeightedMap]:
    """Fresh maps of one edit, seeded, with the state that all edits of a layer share."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        maps = {
            layer: BasisWeightedMap(
                dim,
                config.rank,
                weighting=config.weighting,
                weighting_options=dict(config.weighting_options),
                init=config.init,
            )
            for layer in layers
        }
    for layer, module in maps.items():
        if (state := shared.get(layer)) and not config.reads_tokens:  # an encoder takes no part in training
            module.weighting.load_state_dict({**module.weighting.state_dict(), **state})
    return maps


@torch.no_grad()
def map_tensors(module: BasisWeightedMap) -> dict[str, Tensor]:
    """The tensors of a trained map that belong to its edit alone, fp32 on the CPU, as an adapter keeps them."""
    tensors = {name: getattr(module, name) for name in ("rotation", "source_weight", "source_bias")}
    for name, tensor in module.weighting.state_dict().items():
        if not is_shared(module.weighting, name):
            tensors[f"weighting.{name}"] = tensor
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


class EditedPositions:
    """The flat indices of the edited positions of E edits.

    Args:
        positions: for each edit its indices, at least one.
        device: of the hidden states.
        stages: for each position the number of the answer's tokens up to it; 0 by default.

    Attributes:
        index, stage: ``(E, n)``; short lists are filled up with their first entry.
        real: ``(E, n)`` bool, False at what fills up; None where all lists have one length.
    """

    def __init__(
        self, positions: Sequence[Sequence[int]], device: torch.device, stages: Sequence[Sequence[int]] | None = None
    ):
        width = max(len(p) for p in positions)
        stages = stages or [[0] * len(p) for p in positions]
        self.index, self.stage = (
            torch.tensor([[*p, *[p[0]] * (width - len(p))] for p in each], device=device)
            for each in (positions, stages)
        )
        self.real: Tensor | None = None
        if any(len(p) < width for p in positions):
            self.real = torch.tensor([[i < len(p) for i in range(width)] for p in positions], device=device)
        self._written = self.index.flatten() if self.real is None else self.index[self.real]

    def take(self, hidden: Tensor) -> Tensor:
        """``(P, d) -> (E, n, d)`` fp32."""
        return hidden[self.index.to(hidden.device)].float()

    def put(self, hidden: Tensor, new: Tensor) -> Tensor:
        """``hidden (P, d)`` with the rows ``new (E, n, d)`` in their places."""
        values = new.flatten(0, 1) if self.real is None else new[self.real.to(new.device)]
        return hidden.index_put((self._written.to(hidden.device),), values.to(hidden.dtype))

    def count(self, weights: Tensor) -> Tensor:
        """``(E, n, r)`` weights, 0 at what fills up."""
        return weights if self.real is None else weights * self.real.unsqueeze(-1)


class EditMaps:
    """The maps of E edits and their optimiser.

    Args:
        maps: for each edit ``layer -> map``.
        config: learning rate, decay, clipping, coefficients.
        context: bank, use of the bases, earlier edits.
        devices: ``layer -> device`` on which its maps are trained.

    Attributes:
        step: optimiser steps taken.
        trained_gates: layers whose gates have trained parameters.
        tensors: the trained tensors.
    """

    tensors: list[Tensor]

    def __init__(
        self, maps: Sequence[Maps], config: BaftConfig, context: TrainingContext, devices: Mapping[int, torch.device]
    ):
        self.maps, self.config, self.layers, self.step = list(maps), config, tuple(sorted(devices)), 0
        self.used = {n: context.used.get(n, torch.zeros(config.rank)).to(devices[n]) for n in self.layers}
        has_bank = [n for n in self.layers if config.locality_coefficient and n in context.bank]
        self.bank = {n: context.bank[n].to(devices[n]) for n in has_bank}
        self.earlier = {n: update for n, update in context.earlier.items() if n in devices}
        self.trained_gates = {n for n in self.layers if any(p.requires_grad for p in maps[0][n].weighting.parameters())}

    def __len__(self) -> int:
        return len(self.maps)

    def changes(self, positions: EditedPositions) -> tuple[Changes, dict[int, Tensor]]:
        """``(layer -> change of its output, layer -> w (E, n, r))``; a call of the changes fills the second one."""
        raise NotImplementedError

    def gates(self, layer: int, hidden: Tensor) -> Tensor:
        """``w (E, N, r)`` of each edit on the same ``hidden (N, d)``."""
        raise NotImplementedError

    def penalties(self, weights: Mapping[int, Tensor], parallel: DataParallel, device: torch.device) -> Tensor:
        """``(E,)`` locality and balance terms with their coefficients, on ``device``.

        Args:
            weights: ``layer -> (E, n, r)`` of the last forward pass.
            parallel: the ranks that train the edit; the sum over ranks is what one process computes.
        """
        config, total = self.config, torch.zeros(len(self), device=device)
        for layer in self.layers:
            if layer in self.bank and layer in self.trained_gates:
                unrelated = locality_loss(self.gates(layer, self.bank[layer]))
                total = total + parallel.share * config.locality_coefficient * unrelated.to(device)
            if config.balance_coefficient:
                own, used = parallel.use(weights[layer], self.used[layer])
                total = total + config.balance_coefficient * balance_loss(own, used).to(device)
        return total

    def gradients(self, total: Tensor) -> list[Tensor | None]:
        """Of the sum of the edits' losses; each edit's parameters affect its own loss alone."""
        return list(torch.autograd.grad(total, self.tensors, allow_unused=True))

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step of AdamW, with each edit's gradient clipped to ``config.max_grad_norm``."""
        raise NotImplementedError

    def store(self, edit: int) -> Maps:
        """The maps of edit number ``edit``, with its trained values."""
        return self.maps[edit]

    def keep(self, edits: Sequence[int]) -> None:
        """Go on with some of the edits."""
        raise NotImplementedError


class ModuleMaps(EditMaps):
    """The maps of one edit, trained as the modules that they are."""

    def __init__(self, maps: Maps, config: BaftConfig, context: TrainingContext, devices: Mapping[int, torch.device]):
        super().__init__([maps], config, context, devices)
        self.modules = {layer: maps[layer].to(devices[layer]) for layer in self.layers}
        self.tensors = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self.tensors, config.learning_rate, weight_decay=config.weight_decay)

    def changes(self, positions: EditedPositions) -> tuple[Changes, dict[int, Tensor]]:
        weights: dict[int, Tensor] = {}

        def change_of(layer: int) -> Callable[[Tensor], Tensor]:
            def change(hidden: Tensor) -> Tensor:
                x = positions.take(hidden)  # (1, n, d)
                stage = positions.stage[0].to(x.device) if self.config.reads_tokens else None
                delta, own = self.modules[layer].update(x[0], stage)
                if layer in self.earlier:
                    delta = delta + self.earlier[layer](x[0])
                weights[layer] = own.unsqueeze(0)
                return positions.put(hidden, x + delta)

            return change

        return {layer: change_of(layer) for layer in self.layers}, weights

    def gates(self, layer: int, hidden: Tensor) -> Tensor:
        return self.modules[layer].weighting(hidden).unsqueeze(0)

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.tensors, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.tensors, self.config.max_grad_norm)
        self._optimiser.param_groups[0]["lr"] = self.config.rate_at(self.step)
        self._optimiser.step()
        self.step += 1
