"""All edits of one layer as stacked tensors: E gates are evaluated in one batch instead of a loop.

Every input is compared with each edit's gate tensors (keys, thresholds), so these are stacked over edits in buffers whose
capacity doubles: adding an edit is amortised O(1). Where edits compete, only the winners' maps are read, and each edit's map
stays in its own tensors; nothing is stored twice.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..core.functional import baft_update
from ..gates import WeightingNetwork

MAP_TENSORS = ("rotation", "source_weight", "source_bias")
_PREFIX = "weighting."
_SMALLEST = 16  # first capacity of a buffer


class _Method(nn.Module):
    """A method of a weighting network as a module, which :func:`functional_call` needs."""

    def __init__(self, network: WeightingNetwork, name: str):
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.network, self.name)(*inputs)


class _Lock:
    """A lock that a deep copy of its owner replaces by a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


def is_shared(network: WeightingNetwork, name: str) -> bool:
    """Whether all edits of a layer share the tensor ``name`` of the network's state."""
    return name.split(".", 1)[0] in network.shared


class GrowingStack:
    """Tensors of E edits stacked by name, ``name -> (E, ...)``. Appending is amortised O(1): capacity doubles."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}  # name -> (capacity, ...)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Append one row for each mapping ``name -> tensor``; all mappings have the same names and shapes."""
        if not rows:
            return
        begin, end = self._count, self._count + len(rows)
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written to later
            for name, like in rows[0].items():
                buffer = self._buffers.get(name)
                if buffer is None or len(buffer) < end:
                    larger = like.new_empty(max(_SMALLEST, end, 2 * begin), *like.shape)
                    if buffer is not None:
                        larger[:begin] = buffer[:begin]
                    self._buffers[name] = buffer = larger
                buffer[begin:end] = rows[0][name] if len(rows) == 1 else torch.stack([row[name] for row in rows])
        self._count = end

    def remove(self, index: int) -> None:
        """Remove row ``index``; later rows move up, so the order is kept."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer in self._buffers.values():
                buffer[index : self._count - 1] = buffer[index + 1 : self._count].clone()
        self._count -= 1

    def views(self) -> dict[str, Tensor]:
        """Views ``name -> (E, ...)`` of the filled part."""
        return {name: buffer[: self._count] for name, buffer in self._buffers.items()}


class WeightingStack:
    """One weighting network with the gate tensors of E edits.

    Args:
        network: gives the structure and the shared tensors.
        state: ``name -> (E, ...)``, every tensor that is not shared.
    """

    def __init__(self, network: WeightingNetwork, state: Mapping[str, Tensor]):
        self.network = network
        self._lock = _Lock()  # functional_call swaps the module's tensors while it runs
        self._match = _Method(network, "match")
        self._shared = {n: t for n, t in network.state_dict().items() if is_shared(network, n)}
        self.set_state(state)

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the edits' tensors: ``name -> (E, ...)``."""
        self.state = {**state, **self._shared}
        self._dims = {n: None if n in self._shared else 0 for n in self.state}

    def on_all(self, x: Tensor) -> Tensor:
        """Each edit's weights on the same input: ``(P, d) -> (E, P, r)``."""
        return self._vmap(self.network, self.state, "", (x,), (None,))

    def on_own(self, x: Tensor, state: Mapping[str, Tensor] | None = None, stage: Tensor | None = None) -> Tensor:
        """Edit e's weights on its own input: ``(E, n, d) -> (E, n, r)``, or ``(E, d) -> (E, r)``.

        Args:
            x: the inputs.
            state: the edits' tensors; all edits' by default.
            stage: for a network that reads tokens, see :meth:`~..gates.fact.FactWeighting.forward`.
        """
        inputs = (x,) if stage is None else (x, stage)
        return self._vmap(self.network, {**self.state, **(state or {})}, "", inputs, (0,) * len(inputs))

    def match(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.match`."""
        return self._vmap(self._match, self.state, "network.", (x,), (None,))

    def picked(self, index: Tensor) -> dict[str, Tensor]:
        """Tensors of the edits ``index (P,)``: ``name -> (P, ...)``."""
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
        with self._lock:
            return self._mapped(module, state, dims, inputs, input_dims)

    @staticmethod
    def _mapped(
        module: nn.Module,
        state: Mapping[str, Tensor],
        dims: Mapping[str, int | None],
        inputs: tuple[Tensor, ...],
        input_dims: tuple[int | None, ...],
    ) -> Tensor:
        count = next((t.shape[0] for n, t in state.items() if dims[n] is not None), 1)
        if count == 1 and all(d is None for d in input_dims):  # one edit, or no tensors: nothing to map over
            only = {n: t if dims[n] is None else t[0] for n, t in state.items()}
            return functional_call(module, only, inputs).unsqueeze(0)
        return vmap(lambda s, *x: functional_call(module, s, x), in_dims=(dims, *input_dims))(state, *inputs)


class EditStack:
    """All edits of one layer at inference; edits can be added and removed.

    Edits with a routed network compete: each position gets the update of its best-matching edit. Other updates are summed.

    Args:
        network: the weighting network's structure with its shared tensors, on the device where the stack is used.
        edits: for each edit its tensors, ``rotation (r, d)``, ``source_weight (r, d)``, ``source_bias (r,)`` and
            ``weighting.<name>``.
    """

    def __init__(self, network: WeightingNetwork, edits: Sequence[Mapping[str, Tensor]] = ()):
        self.routed = network.routed
        tensors = [*network.parameters(), *network.buffers()]
        self._device = tensors[0].device if tensors else None
        self._maps: list[tuple[Tensor, Tensor, Tensor]] = []  # R (r, d), A (r, d), b (r,) of each edit
        self._stacked_maps = GrowingStack()  # the same, stacked, where updates are summed
        self._keys = GrowingStack()
        self.weighting = WeightingStack(network, {})
        self.extend(edits)

    def __len__(self) -> int:
        return len(self._maps)

    def extend(self, edits: Sequence[Mapping[str, Tensor]]) -> None:
        """Append edits."""
        moved = [{n: t if self._device is None else t.to(self._device) for n, t in edit.items()} for edit in edits]
        self._maps += [(edit["rotation"], edit["source_weight"], edit["source_bias"]) for edit in moved]
        if not self.routed:
            self._stacked_maps.extend([{n: edit[n] for n in MAP_TENSORS} for edit in moved])
        self._keys.extend([{n[len(_PREFIX) :]: t for n, t in e.items() if n.startswith(_PREFIX)} for e in moved])
        self.weighting.set_state(self._keys.views())

    def remove(self, index: int) -> None:
        """Remove an edit; the others keep their order."""
        del self._maps[index]
        if not self.routed:
            self._stacked_maps.remove(index)
        self._keys.remove(index)
        self.weighting.set_state(self._keys.views())

    def update(self, x: Tensor) -> Tensor:
        """The edits' summed or routed update: ``(P, d) -> (P, d)``, fp32.

        Args:
            x: representations at the edited positions.
        """
        x = x.float()
        if len(self) == 1:
            return self._single(x)
        if self.routed:
            return self._of_winners(x, *self._route(x))
        weights = self.weighting.on_all(x)  # (E, P, r)
        maps = self._stacked_maps.views()
        rotation, source, bias = (maps[name] for name in MAP_TENSORS)  # (E, r, d) (E, r, d) (E, r)
        return baft_update(x.expand(len(self), *x.shape), rotation, source, bias, weights).sum(0)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(w, edit)``: the winner's weights ``(P, r)`` and index ``(P,)`` if the network is routed, else ``w (E, P, r)``."""
        x = x.float()
        if self.routed:
            return self._route(x)
        return self.weighting.on_all(x), torch.arange(len(self), device=x.device)

    def update_of(self, x: Tensor, edit: Tensor, stage: Tensor) -> tuple[Tensor, Tensor]:
        """``(update (P, d), w (P, r))`` of the edits ``edit (P,)``, each at its own position ``x (P, d)`` and ``stage (P,)``."""
        x = x.float()
        weights = self.weighting.on_own(x, self.weighting.picked(edit), stage)
        return self._of_winners(x, weights, edit), weights

    def _single(self, x: Tensor) -> Tensor:
        """The update of the only edit, bit for bit that of a :class:`BasisWeightedMap`."""
        return baft_update(x, *self._maps[0], self.weighting.on_all(x)[0])

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(P, r)`` of each position's best-matching edit, and that edit's index ``(P,)``."""
        if len(self) == 1:  # nothing to choose
            return self.weighting.on_all(x)[0], torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        best = self.weighting.match(x).argmax(0)  # (P,)
        return self.weighting.on_own(x, self.weighting.picked(best)), best

    def _of_winners(self, x: Tensor, weights: Tensor, best: Tensor) -> Tensor:
        """The winners' updates ``(P, d)``: exactly 0 where no gate is open."""
        won: dict[int, list[int]] = {}  # edit -> its positions
        for position, edit in enumerate(torch.where((weights != 0).any(-1), best, -1).tolist()):
            if edit >= 0:
                won.setdefault(edit, []).append(position)
        update = torch.zeros_like(x)
        for edit, positions in won.items():
            rows = torch.tensor(positions, device=x.device)
            update = update.index_copy(0, rows, baft_update(x[rows], *self._maps[edit], weights[rows]))
        return update
