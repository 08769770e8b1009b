"""Trained edits on a model: attached by hooks, saved as safetensors and JSON.

An adapter directory holds ``adapter.safetensors`` (the edits' tensors, stacked over edits, and what they share) and
``adapter.json`` (schema, base model, settings, the list of edits, and the digest of the tensor file). It is written
beside its place, synced, and renamed. Loading never unpickles and never runs code: every name, shape and dtype is
checked against the settings before anything is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import BaftConfig
from .errors import AdapterError
from .hooks import CallTracker, hook_block
from .models import find_blocks, hidden_size
from .positions import PositionRule, subject_variants
from .requests import EditRequest
from .stack import EditStack, is_shared
from .weighting import WeightingNetwork, make_weighting, weighting_class

logger = logging.getLogger(__name__)
_PROMPT = PositionRule("prompt")


@dataclass(frozen=True)
class Edit:
    """One committed edit.

    Args:
        id: name in the adapter; the request's own, or the first request's of a joint group.
        requests: what was asked, without probes.
        tensors: ``layer -> {name: tensor}``, fp32 on the CPU.
        used: ``layer -> (r,)`` use of the bases.
        loss: mean cross entropy over target tokens at the end (nats).
        steps, seconds: of training; a loaded edit has taken 0 seconds.
        reached: whether every target token is the edited model's argmax after its prompt.
    """

    id: str
    requests: tuple[EditRequest, ...]
    tensors: Mapping[int, Mapping[str, Tensor]] = field(repr=False)
    used: Mapping[int, Tensor] = field(repr=False)
    loss: float
    steps: int
    seconds: float
    reached: bool

    def summary(self) -> dict[str, Any]:
        """What ``adapter.json`` says about the edit: no times, so that the same edits give the same bytes."""
        requests = [dataclasses.replace(r, probes=()).to_dict() for r in self.requests]
        return {
            "id": self.id, "requests": requests, "loss": self.loss, "steps": self.steps, "reached": self.reached,
        }  # fmt: skip


class BaftAdapter:
    """The edits of one model, attached to it or not.

    Args:
        model: the base model; only hooks are added to it, its weights stay as they are.
        tokenizer: finds subjects in ids, for the subject positions.
        config: settings that all edits share.

    Attributes:
        layers: edited blocks, 0-based, ascending.
        edits: the committed edits in order.
        shared: ``layer -> {name: tensor}``, the weighting's shared state.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: BaftConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.blocks = find_blocks(model)
        self.layers = config.resolved_layers(len(self.blocks))
        network = make_weighting(config.weighting, 2, 1, **config.weighting_options)
        # the block at which the network looks for the subject; None for a network that does not
        self.read_layer = network.read_layer(self.layers, len(self.blocks)) if network.reads_subject else None
        self.embed_dim = hidden_size(model)
        if config.rank > self.embed_dim:
            raise AdapterError(
                f"rank is {config.rank}, but the model's hidden size is {self.embed_dim}; lower the rank"
            )
        self.edits: tuple[Edit, ...] = ()
        self.shared: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        self._tracker = CallTracker(model)
        self._handles: list[Any] = []
        self._enabled = True
        self._stacks: dict[tuple[int, torch.device], EditStack] = {}
        self._subjects: list[list[int]] = []

    # ------------------------------------------------------------------------------------------ edits

    def set_edits(self, edits: Sequence[Edit]) -> None:
        """Replace the list of edits, at once or not at all."""
        ids = [edit.id for edit in edits]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise AdapterError(f"two edits are called {twice!r}; undo the first, or give the second another id")
        subjects = [r.subject for e in edits for r in e.requests if r.subject] if self.config.rule.needs_subject else []
        variants = subject_variants(self.tokenizer, subjects)
        self.edits, self._subjects, self._stacks = tuple(edits), variants, {}

    @property
    def routed(self) -> bool:
        """Whether the edits compete, one acting at each position, or add up."""
        return weighting_class(self.config.weighting).routed

    def network(self, layer: int) -> WeightingNetwork:
        """The weighting network's structure with the layer's shared state."""
        network = make_weighting(
            self.config.weighting, self.embed_dim, self.config.rank, **self.config.weighting_options
        )
        if self.shared[layer]:
            network.load_state_dict({**network.state_dict(), **self.shared[layer]})
        return network.requires_grad_(False)

    def used(self) -> dict[int, Tensor]:
        """``layer -> (r,)`` use of the bases by all edits."""
        zero = torch.zeros(self.config.rank)
        return {layer: sum((edit.used[layer] for edit in self.edits), zero) for layer in self.layers}

    def stack(self, layer: int, device: torch.device) -> EditStack:
        """The layer's edits on a device; built at first use after a change."""
        key = (layer, device)
        if key not in self._stacks:
            edits = [{n: t.to(device) for n, t in edit.tensors[layer].items()} for edit in self.edits]
            self._stacks[key] = EditStack(self.network(layer).to(device), edits)
        return self._stacks[key]

    def num_stored(self) -> int:
        """Numbers kept for the edits, trained or not (what they share is not counted)."""
        return sum(t.numel() for e in self.edits for tensors in e.tensors.values() for t in tensors.values())

    def trained_parameters(self) -> int:
        """Numbers that training changes for one edit: the map's and the weighting network's parameters on all layers."""
        network = self.network(self.layers[0])
        own = sum(p.numel() for n, p in network.named_parameters() if not is_shared(network, n))
        return len(self.layers) * (self.config.rank * (2 * self.embed_dim + 1) + own)

    # ------------------------------------------------------------------------------------------ on the model

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model; does nothing where they are."""
        if self._handles:
            return
        self._tracker.attach()
        self._handles = []
        if self.read_layer is not None:  # first, so that a block that is read and edited is read unedited
            self._handles.append(hook_block(self.blocks[self.read_layer], self._read))
        for layer in self.layers:
            self._handles.append(hook_block(self.blocks[layer], lambda h, layer=layer: self._change(layer, h)))

    def detach(self) -> None:
        """Take this adapter's hooks off, and no other's; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._tracker.detach()

    @contextlib.contextmanager
    def enabled(self, value: bool = True) -> Iterator[None]:
        """Inside, the edits act (True) or do not (False)."""
        before, self._enabled = self._enabled, value
        try:
            yield
        finally:
            self._enabled = before

    def prompts(self, lengths: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Inside, row i of a batch begins with a prompt of ``lengths[i]`` tokens; what follows is its answer.

        Needed where prompt and answer are fed together (teacher forcing) or without a cache: the edit sits on the
        prompt. Rows that beams or return sequences repeat are understood. Without it a call that finds no cached
        tokens is taken to be all prompt.
        """
        return self._tracker.prompts(lengths)

    def _read(self, hidden: Tensor) -> None:
        """Keep, for each edit and row, how surely the prompt names the edit's subject: its best token's evidence."""
        if not self._enabled or not self.edits:
            return
        call = self._tracker.current()
        found = call.positions(_PROMPT, [], hidden.shape[0], hidden.shape[1])
        if found is None:
            return
        row, column = (index.to(hidden.device) for index in found)
        x = hidden[row, column].float()  # (P, d)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for layer in self.layers:
                each = self.stack(layer, hidden.device).evidence(x)  # (E, P)
                best = torch.full((each.shape[0], hidden.shape[0]), -1.0, device=each.device)
                call.evidence[layer] = best.scatter_reduce(1, row.expand_as(each), each, "amax", include_self=True)

    def _change(self, layer: int, hidden: Tensor) -> Tensor | None:
        if not self._enabled or not self.edits:
            return None
        found = self._tracker.current().positions(self.config.rule, self._subjects, hidden.shape[0], hidden.shape[1])
        if found is None:
            return None
        row, column = (index.to(hidden.device) for index in found)
        x = hidden[row, column].float()  # (P, d)
        evidence = self._tracker.current().evidence.get(layer)
        if evidence is not None:
            evidence = evidence.to(hidden.device)[:, row]  # (E, P)
        with torch.autocast(hidden.device.type, enabled=False):
            changed = x + self.stack(layer, hidden.device).update(x, evidence)
        return hidden.index_put((row, column), changed.to(hidden.dtype))

    # ------------------------------------------------------------------------------------------ tensors on disk

    def state(self) -> dict[str, Tensor]:
        """All tensors under their names on disk: ``layers.<n>.edits.<name> (E, ...)``, ``layers.<n>.shared.<name>``."""
        state = {}
        for layer in self.layers:
            for name in self.edits[0].tensors[layer] if self.edits else ():
                state[f"layers.{layer}.edits.{name}"] = torch.stack([e.tensors[layer][name] for e in self.edits])
            if self.edits:
                state[f"layers.{layer}.edits.used"] = torch.stack([e.used[layer] for e in self.edits])
            for name, tensor in self.shared[layer].items():
                state[f"layers.{layer}.shared.{name}"] = tensor
        return {name: tensor.contiguous().cpu() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor], edits: Sequence[Mapping[str, Any]], where: str = "") -> None:
        """Take edits from :meth:`state`'s tensors and their summaries, after every check; nothing is kept on an error.

        Raises:
            AdapterError: a tensor that is missing, unknown, of another shape or dtype, or not finite.
        """
        expected: dict[str, tuple[int, ...] | None] = {}
        for layer in self.layers:
            network = make_weighting(
                self.config.weighting, self.embed_dim, self.config.rank, **self.config.weighting_options
            )
            for name, tensor in network.state_dict().items():
                if is_shared(network, name):
                    # k directions of a whitening are data: only the last dimension is known
                    expected[f"layers.{layer}.shared.{name}"] = None
                elif edits:
                    expected[f"layers.{layer}.edits.weighting.{name}"] = (len(edits), *tensor.shape)
            if edits:
                r, d, e = self.config.rank, self.embed_dim, len(edits)
                shapes = {"rotation": (e, r, d), "source_weight": (e, r, d), "source_bias": (e, r), "used": (e, r)}
                expected.update({f"layers.{layer}.edits.{n}": s for n, s in shapes.items()})
        optional = {n for n in expected if ".shared." in n} if not edits else set()
        for name in sorted(set(expected) - set(state) - optional):
            raise AdapterError(f"{where}tensor {name!r} is missing; the adapter is damaged or of other settings")
        for name, tensor in state.items():
            if name not in expected:
                raise AdapterError(f"{where}unknown tensor {name!r}; the adapter is damaged or of other settings")
            shape = expected[name]
            if tensor.dtype != torch.float32:
                raise AdapterError(f"{where}tensor {name!r} is {tensor.dtype}; it must be float32")
            if shape is not None and tuple(tensor.shape) != shape:
                raise AdapterError(f"{where}tensor {name!r} has shape {tuple(tensor.shape)}; it must be {shape}")
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{where}tensor {name!r} has values that are not finite")
        shared: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        own: list[dict[int, dict[str, Tensor]]] = [{layer: {} for layer in self.layers} for _ in edits]
        used: list[dict[int, Tensor]] = [{} for _ in edits]
        for name, tensor in state.items():
            _, number, kind, rest = name.split(".", 3)
            if kind == "shared":
                shared[int(number)][rest] = tensor
                continue
            for i in range(len(edits)):
                if rest == "used":
                    used[i][int(number)] = tensor[i].clone()
                else:
                    own[i][int(number)][rest] = tensor[i].clone()
        loaded = [_edit_from(summary, own[i], used[i], f"{where}edits[{i}]: ") for i, summary in enumerate(edits)]
        before = self.shared
        try:
            self.shared = shared
            for layer in self.layers:
                self.network(layer)  # shapes of the shared state
            self.set_edits(loaded)
        except (RuntimeError, AdapterError) as error:
            self.shared = before
            raise AdapterError(f"{where}{error}") from None


def _edit_from(summary: Mapping[str, Any], tensors: dict, used: dict, where: str) -> Edit:
    try:
        requests = tuple(EditRequest.from_dict(r) for r in summary["requests"])
        if not requests:
            raise AdapterError(f"{where}no request")
        return Edit(
            str(summary["id"]), requests, tensors, used, float(summary["loss"]), int(summary["steps"]), 0.0,
            bool(summary["reached"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{where}cannot be read: {error!r}") from None
