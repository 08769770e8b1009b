"""The edits of one layer as stacked tensors: one batch of maps instead of a loop over edits.

What every input is compared with (the weighting's tensors: keys, thresholds) is stacked over edits in rows with room to
spare, so that adding an edit costs the same whether it is the tenth or the ten-thousandth. Where edits compete, only the
maps of those that win are looked at, and these stay where they are: ``E`` edits are kept once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..core.functional import baft_update
from ..gates import WeightingNetwork

MAP_TENSORS = ("rotation", "source_weight", "source_bias")
_PREFIX = "weighting."
_CANDIDATES = 32  # edits of one subject that a position is compared with; far more than there are
_AT_ONCE = 1 << 22  # subject scores that are held at a time
_SMALLEST = 16  # rows that a stack begins with


class _Question(nn.Module):
    """A method of a weighting network as a module, for :func:`functional_call`."""

    def __init__(self, network: WeightingNetwork, name: str):
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.network, self.name)(*inputs)


def is_shared(network: WeightingNetwork, name: str) -> bool:
    """Whether the tensor ``name`` of the network's state is common to all edits of a layer."""
    return name.split(".", 1)[0] in network.shared


class Rows:
    """Tensors of E edits stacked by name: ``name -> (E, ...)``, with room for more.

    The room doubles when it is used up: n rows added one by one are n copies of a row and at most n more for moving house.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}  # name -> (capacity, ...)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Add one row for each mapping ``name -> tensor``; all have the same names and shapes."""
        if not rows:
            return
        begin, end = self._count, self._count + len(rows)
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be written to later
            for name, like in rows[0].items():
                room = self._room.get(name)
                if room is None or len(room) < end:
                    larger = like.new_empty(max(_SMALLEST, end, 2 * begin), *like.shape)
                    if room is not None:
                        larger[:begin] = room[:begin]
                    self._room[name] = room = larger
                room[begin:end] = rows[0][name] if len(rows) == 1 else torch.stack([row[name] for row in rows])
        self._count = end

    def remove(self, index: int) -> None:
        """Take row ``index`` out; those behind it move up, so the order stays."""
        with torch.inference_mode(False), torch.no_grad():
            for room in self._room.values():
                room[index : self._count - 1] = room[index + 1 : self._count].clone()
        self._count -= 1

    def views(self) -> dict[str, Tensor]:
        """``name -> (E, ...)``; no copies."""
        return {name: room[: self._count] for name, room in self._room.items()}


class WeightingStack:
    """One weighting network with the parameters of E edits.

    Args:
        network: the structure, and the shared tensors.
        state: ``name -> (E, ...)``, everything that is not shared.
    """

    def __init__(self, network: WeightingNetwork, state: Mapping[str, Tensor]):
        self.network = network
        asked = (
            _Question(network, name)
            for name in ("priority", "subject_score", "answer_score", "name_scores", "combined_subject_score")
        )
        self._priority, self._subject_score, self._answer_score, self._name_scores, self._combined = asked
        self._shared = {n: t for n, t in network.state_dict().items() if is_shared(network, n)}
        self.set_state(state)

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of other edits: ``name -> (E, ...)``."""
        self.state = {**state, **self._shared}
        self._dims = {n: None if n in self._shared else 0 for n in self.state}

    def on_all(self, x: Tensor) -> Tensor:
        """Every edit's weights for the same input: ``(P, d) -> (E, P, r)``."""
        return self._vmap(self.network, self.state, "", (x,), (None,))

    def on_own(
        self, x: Tensor, state: Mapping[str, Tensor] | None = None, subject_score: Tensor | None = None
    ) -> Tensor:
        """Edit e's weights for its own input: ``(E, n, d) -> (E, n, r)``, or ``(E, d) -> (E, r)``."""
        inputs = (x,) if subject_score is None else (x, subject_score)
        return self._vmap(self.network, {**self.state, **(state or {})}, "", inputs, (0,) * len(inputs))

    def priority_own(self, x: Tensor, subject_score: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``(E, d), (E,) -> (E,)``, see :meth:`WeightingNetwork.priority`."""
        inputs = (x, subject_score)
        return self._vmap(self._priority, {**self.state, **state}, "network.", inputs, (0,) * len(inputs))

    def priority(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.priority`."""
        return self._vmap(self._priority, self.state, "network.", (x,), (None,))

    def subject_score(self, x: Tensor) -> Tensor:
        """``(P, d) -> (E, P)``, see :meth:`WeightingNetwork.subject_score`."""
        return self._vmap(self._subject_score, self.state, "network.", (x,), (None,))

    def subject_and_answer_scores(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the edits ``index (K,)`` alone: ``(P, d) -> (K, P)`` each, see :meth:`WeightingNetwork.answer_score`."""
        state = self.picked(index)
        subject_score = self._vmap(self._subject_score, state, "network.", (x,), (None,))
        return subject_score, self._vmap(self._answer_score, state, "network.", (x,), (None,))

    def combined_subject_score(self, index: Tensor, x: Tensor, row: Tensor, best: Tensor) -> Tensor:
        """Scores ``(K, B)`` of whole prompts for the edits ``index (K,)``.

        Args:
            x, row: ``(P, d)`` tokens and the prompt of each, ``(P,)``.
            best: ``(K, B)`` the largest score of a prompt's tokens.
        """
        state = self.picked(index)
        each = self._vmap(self._name_scores, state, "network.", (x,), (None,))  # (K, P, k)
        name_scores = each.new_full((*best.shape, each.shape[-1]), -1.0)
        name_scores.scatter_reduce_(1, row[None, :, None].expand_as(each), each, "amax", include_self=True)  # (K, B, k)
        return self._vmap(self._combined, state, "network.", (best, name_scores), (0, 0))

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
    """All edits of one layer, for inference; edits can be added and taken out.

    Routed networks compete: each position gets the update of its best-matching edit alone. Others are summed.

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
        self._stacked_maps = Rows()  # the same where all of them act: what is summed is computed at once
        self._keys = Rows()
        self.weighting = WeightingStack(network, {})
        self.extend(edits)

    def __len__(self) -> int:
        return len(self._maps)

    def extend(self, edits: Sequence[Mapping[str, Tensor]]) -> None:
        """Add edits behind those that are there."""
        moved = [{n: t if self._device is None else t.to(self._device) for n, t in edit.items()} for edit in edits]
        self._maps += [(edit["rotation"], edit["source_weight"], edit["source_bias"]) for edit in moved]
        if not self.routed:
            self._stacked_maps.extend([{n: edit[n] for n in MAP_TENSORS} for edit in moved])
        self._keys.extend([{n[len(_PREFIX) :]: t for n, t in e.items() if n.startswith(_PREFIX)} for e in moved])
        self.weighting.set_state(self._keys.views())

    def remove(self, index: int) -> None:
        """Take an edit out; the order of the others stays."""
        del self._maps[index]
        if not self.routed:
            self._stacked_maps.remove(index)
        self._keys.remove(index)
        self.weighting.set_state(self._keys.views())

    def subject_scores(self, x: Tensor, row: Tensor, column: Tensor, rows: int) -> Tensor:
        """How surely each prompt names each edit's subject, and does not name its answer behind it: ``(E, B)``.

        Args:
            x: ``(P, d)`` representations at the read layer of all prompt tokens.
            row, column: ``(P,)`` where each token lies.
            rows: B.
        """
        x, best = x.float(), torch.full((len(self), rows), -1.0, device=x.device)
        piece = max(1, _AT_ONCE // len(self))
        for tokens, own in zip(x.split(piece), row.split(piece), strict=True):
            each = self.weighting.subject_score(tokens)  # (E, p)
            best.scatter_reduce_(1, own.expand_as(each), each, "amax", include_self=True)
        # edits whose subject may be named: few. An edit without a subject scores 1 everywhere
        named = ((best > 0) & (best < 1)).any(1).nonzero().flatten()  # (K,)
        if not len(named):
            return best
        some = best[named]
        best[named] = torch.where(some > 0, self.weighting.combined_subject_score(named, x, row, some), some)
        if self.weighting.network.reads_answer:
            subject, answer = self.weighting.subject_and_answer_scores(named, x)  # (K, P) each
            width = int(column.max()) + 1
            where = torch.full((len(named), rows, width), -2.0, device=x.device)
            said = where.clone()
            where[:, row, column], said[:, row, column] = subject, answer
            behind = torch.arange(width, device=x.device) > where.argmax(-1, keepdim=True)
            answered = torch.where(behind, said, -2.0).amax(-1)  # (K, B)
            best[named] = torch.minimum(best[named], -answered)
        return best

    def update(self, x: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """What the edits add: ``(P, d) -> (P, d)``, fp32.

        Args:
            x: representations at the edited positions.
            subject_score: ``(E, P)`` for a network that reads the subject.
        """
        x = x.float()
        if len(self) == 1 and subject_score is None:
            return self._single(x)
        if self.routed:
            return self._of_winners(x, *self._route(x, subject_score))
        weights = self.weighting.on_all(x)  # (E, P, r)
        maps = self._stacked_maps.views()
        rotation, source, bias = (maps[name] for name in MAP_TENSORS)  # (E, r, d) (E, r, d) (E, r)
        return baft_update(x.expand(len(self), *x.shape), rotation, source, bias, weights).sum(0)

    def weights(self, x: Tensor, subject_score: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(w, edit)``: of a routed network the winner's weights ``(P, r)`` and index ``(P,)``; else ``w (E, P, r)``."""
        x = x.float()
        if self.routed:
            return self._route(x, subject_score)
        return self.weighting.on_all(x), torch.arange(len(self), device=x.device)

    def _single(self, x: Tensor) -> Tensor:
        """Update of the only edit: the arithmetic of a BasisWeightedMap, bit for bit."""
        return baft_update(x, *self._maps[0], self.weighting.on_all(x)[0])

    def _route(self, x: Tensor, subject_score: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights ``(P, r)`` of the best-matching edit of each position, and which it is ``(P,)``."""
        if subject_score is not None:
            best, found = self._among_candidates(x, subject_score)
            return self.weighting.on_own(x, self.weighting.picked(best), found), best
        if len(self) == 1:  # nothing to choose
            return self.weighting.on_all(x)[0], torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        best = self.weighting.priority(x).argmax(0)  # (P,)
        return self.weighting.on_own(x, self.weighting.picked(best)), best

    def _of_winners(self, x: Tensor, weights: Tensor, best: Tensor) -> Tensor:
        """The winners' updates ``(P, d)``: 0 where no gate is open, and no map is touched there."""
        won: dict[int, list[int]] = {}  # edit -> its positions
        for position, edit in enumerate(torch.where((weights != 0).any(-1), best, -1).tolist()):
            if edit >= 0:
                won.setdefault(edit, []).append(position)
        update = torch.zeros_like(x)
        for edit, positions in won.items():
            rows = torch.tensor(positions, device=x.device)
            update = update.index_copy(0, rows, baft_update(x[rows], *self._maps[edit], weights[rows]))
        return update

    def _among_candidates(self, x: Tensor, subject_score: Tensor) -> tuple[Tensor, Tensor]:
        """The best-matching edit of each position, ``(P,)``, and its subject score, among those with the highest."""
        most = int((subject_score > 0).sum(0).max()) if subject_score.numel() else 0
        k, positions = max(1, min(_CANDIDATES, most)), x.shape[0]
        found, candidates = subject_score.topk(k, dim=0)  # (k, P) each
        flat = candidates.flatten()
        fits = self.weighting.priority_own(x.repeat(k, 1), found.flatten(), self.weighting.picked(flat))
        winner = fits.view(k, positions).argmax(0, keepdim=True)  # (1, P)
        return candidates.gather(0, winner)[0], found.gather(0, winner)[0]
