"""Trained edits of a model, applied by hooks and saved as safetensors and JSON.

An adapter directory holds ``adapter.safetensors`` (the edits' tensors, stacked over edits, and their shared tensors) and
``adapter.json`` (schema, base model, settings, the list of edits, and the digest of the tensor file). It is written
under a temporary name, synced and renamed. Loading never unpickles and never runs code: it checks every name, shape
and dtype against the settings before it uses anything.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..core.positions import IdSequences, subject_variants
from ..errors import AdapterError, BaftError
from ..gates import FactWeighting, WeightingNetwork, make_weighting, weighting_class
from ..gates.relation_encoder import read_layers
from ..models.chat import chat_marks
from ..models.structure import block_owner, find_blocks, hidden_size
from ..requests import EditRequest
from .call_state import Call, CallTracker, hook_block
from .causal_gate import Action, CausalGate
from .edit import Edit
from .edit_stack import EditStack, is_shared
from .token_state import TokenState

logger = logging.getLogger(__name__)
_NUMBERS = itertools.count()


class _Switch(threading.local):
    """Whether the edits are active, and where their actions are noted, per thread."""

    on = True
    record: list[list[Action]] | None = None

    def __reduce__(self) -> tuple[type[_Switch], tuple[()]]:  # a deep copy starts with active edits
        return _Switch, ()


class BaftAdapter:
    """The edits of one model, attached to it or not.

    Args:
        model: the base model; it only receives hooks, and its weights stay unchanged.
        tokenizer: finds subjects in token ids, for the subject positions.
        config: the settings that all edits share.

    Attributes:
        layers: indices of the edited blocks, 0-based, ascending.
        edits: the committed edits, oldest first.
        shared: ``layer -> {name: tensor}``, the weighting's shared state.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: BaftConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.blocks = find_blocks(model)
        self.layers = config.resolved_layers(len(self.blocks))
        self.embed_dim = hidden_size(model)
        if config.rank > self.embed_dim:
            raise AdapterError(
                f"rank is {config.rank}, but the model's hidden size is {self.embed_dim}; lower the rank"
            )
        self._edits: dict[str, Edit] = {}
        self._of_prompt: dict[str, list[str]] = {}  # prompt -> ids of its edits
        self.shared: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        self._tracker = CallTracker(model, block_owner(model))
        self._gates: dict[torch.device, CausalGate] = {}  # of a network that reads tokens
        self._name = f"adapter-{next(_NUMBERS)}"  # its states at KV caches
        self._handles: list[Any] = []
        self._switch = _Switch()
        self._stacks: dict[tuple[int, torch.device], EditStack] = {}
        self._used: dict[int, Tensor] | None = None  # the sums of used(), once computed
        self._subjects: IdSequences | None = None  # the edits' subjects, once collected

    # ------------------------------------------------------------------------------------------ edits

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(self._edits.values())

    def __len__(self) -> int:
        return len(self._edits)

    def find(self, edit_id: str) -> Edit | None:
        """The edit with this id, or None."""
        return self._edits.get(edit_id)

    def asking(self, prompts: Iterable[str]) -> list[Edit]:
        """The edits of any of these prompts, in the prompts' order."""
        ids = dict.fromkeys(name for prompt in prompts for name in self._of_prompt.get(prompt, ()))
        return [self._edits[name] for name in ids]

    def add(self, edit: Edit) -> None:
        """Append an edit, in time independent of the number of edits.

        Raises:
            AdapterError: another edit has the same id.
        """
        self.extend([edit])

    def remove(self, edit_id: str) -> Edit:
        """Remove an edit; the adapter is then as if the edit had never been added.

        Raises:
            AdapterError: no edit has this id.
        """
        if edit_id not in self._edits:
            raise AdapterError(f"there is no edit {edit_id!r} in the adapter")
        if self._stacks:
            index = next(i for i, name in enumerate(self._edits) if name == edit_id)
            for stack in self._stacks.values():
                stack.remove(index)
        edit = self._edits.pop(edit_id)
        for request in edit.requests:
            asking = [name for name in self._of_prompt[request.prompt] if name != edit_id]
            if asking:
                self._of_prompt[request.prompt] = asking
            else:
                del self._of_prompt[request.prompt]
        self._used = None
        if self._subjects is not None:
            for sequence in self._names(edit):
                self._subjects.remove(sequence)
        for gate in self._gates.values():
            gate.remove(edit)
        return edit

    def set_edits(self, edits: Sequence[Edit]) -> None:
        """Replace all edits; on an error, change nothing.

        Raises:
            AdapterError: two edits have the same id.
        """
        before = self._edits, self._of_prompt, self._stacks, self._used, self._subjects, self._gates
        self._edits, self._of_prompt, self._stacks, self._gates = {}, {}, {}, {}
        self._used = self._subjects = None
        try:
            self.extend(edits)
        except BaseException:
            self._edits, self._of_prompt, self._stacks, self._used, self._subjects, self._gates = before
            raise

    def extend(self, edits: Sequence[Edit]) -> None:
        """Append several edits, all or none; raises what :meth:`add` raises."""
        new: set[str] = set()
        for edit in edits:
            if edit.id in self._edits or edit.id in new:
                raise AdapterError(f"two edits are called {edit.id!r}; undo the first, or give the second another id")
            new.add(edit.id)
        for (layer, _), stack in self._stacks.items():
            stack.extend([edit.tensors[layer] for edit in edits])
        for edit in edits:
            self._edits[edit.id] = edit
            for request in edit.requests:
                self._of_prompt.setdefault(request.prompt, []).append(edit.id)
            if self._used is not None:
                self._used = {layer: used + edit.used[layer] for layer, used in self._used.items()}
            if self._subjects is not None:
                for sequence in self._names(edit):
                    self._subjects.add(sequence)
            for gate in self._gates.values():
                gate.add(edit)

    def subjects(self) -> IdSequences | None:
        """Token ids of the edits' subjects if the position rule needs them, else None; collected at the first call."""
        if self._subjects is None and self.config.rule.needs_subject:
            self._subjects = IdSequences(ids for edit in self._edits.values() for ids in self._names(edit))
        return self._subjects

    def _names(self, edit: Edit) -> list[list[int]]:
        return subject_variants(self.tokenizer, [r.subject for r in edit.requests if r.subject])

    @property
    def routed(self) -> bool:
        """Whether the edits compete, so that one acts at each position; otherwise they add up."""
        return weighting_class(self.config.weighting).routed

    def network(self, layer: int) -> WeightingNetwork:
        """A weighting network with the layer's shared state, and no edit's own parameters."""
        network = make_weighting(
            self.config.weighting, self.embed_dim, self.config.rank, **self.config.weighting_options
        )
        if self.shared[layer]:
            network.load_state_dict({**network.state_dict(), **self.shared[layer]})
        return network.requires_grad_(False)

    def used(self) -> dict[int, Tensor]:
        """``layer -> (r,)`` how much all edits together use each basis."""
        if self._used is None:
            zero = torch.zeros(self.config.rank)
            self._used = {layer: sum((e.used[layer] for e in self._edits.values()), zero) for layer in self.layers}
        return self._used

    def stack(self, layer: int, device: torch.device) -> EditStack:
        """The layer's edits on a device; built at first use and then kept up to date."""
        key = (layer, device)
        if key not in self._stacks:
            edits = [edit.tensors[layer] for edit in self._edits.values()]
            self._stacks[key] = EditStack(self.network(layer).to(device), edits)
        return self._stacks[key]

    def num_stored(self) -> int:
        """How many numbers are stored for the edits, trained or not; shared tensors are not counted."""
        first = next(iter(self._edits.values()), None)  # all edits of an adapter have the same shapes
        return (
            0 if first is None else len(self) * sum(t.numel() for own in first.tensors.values() for t in own.values())
        )

    def stored_bytes(self) -> int:
        """Size of :meth:`state` in bytes: the edits' tensors, their use of the bases, and shared tensors; all fp32."""
        shared = sum(t.numel() for own in self.shared.values() for t in own.values())
        return 4 * (self.num_stored() + len(self) * len(self.layers) * self.config.rank + shared)

    def trained_parameters(self) -> int:
        """Number of trained parameters of one edit: those of the map and the weighting network, on all layers."""
        network = self.network(self.layers[0])
        own = sum(p.numel() for n, p in network.named_parameters() if not is_shared(network, n))
        return len(self.layers) * (self.config.rank * (2 * self.embed_dim + 1) + own)

    # ------------------------------------------------------------------------------------------ on the model

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    @property
    def reads_tokens(self) -> bool:
        """Whether the gate decides at every token where the edits act; otherwise a position rule does."""
        return weighting_class(self.config.weighting).reads_tokens

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The blocks whose output decides where the edits act, lowest first; the edited ones alone where a rule decides."""
        return tuple(sorted({*self.layers, *(self._encoder_layers if self.reads_tokens else ())}))

    @property
    def _encoder_layers(self) -> tuple[int, ...]:
        return read_layers(self.layers, len(self.blocks))

    def attach(self) -> None:
        """Put the hooks on the model; do nothing if they are already there."""
        if self._handles:
            return
        self._tracker.attach(self._finish, self._name)
        self._handles = []
        if self.reads_tokens:  # first, so that a block that is both read and edited is read before its edit
            for number, layer in enumerate(self._encoder_layers):
                self._handles.append(hook_block(self.blocks[layer], functools.partial(self._read, number)))
        for layer in self.layers:
            self._handles.append(hook_block(self.blocks[layer], functools.partial(self._change, layer)))

    def detach(self) -> None:
        """Remove this adapter's hooks and no others; the model is then as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._tracker.detach()

    @contextlib.contextmanager
    def enabled(self, value: bool = True) -> Iterator[None]:
        """Context in which the edits are active (True) or inactive (False) in this thread; other threads are unaffected."""
        before, self._switch.on = self._switch.on, value
        try:
            yield
        finally:
            self._switch.on = before

    def prompts(self, lengths: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Context in which row i of a batch is a prompt of ``lengths[i]`` tokens followed by its answer.

        Only position rules need it, where prompt and answer are fed together; a gate that reads tokens does not ask.
        """
        return self._tracker.prompts(lengths)

    def gate(self, device: torch.device) -> CausalGate:
        """The gate that reads tokens, with its tensors on a device; built at first use and then kept up to date."""
        if device not in self._gates:
            stack = self.stack(self.layers[0], device)
            header, _ = chat_marks(self.tokenizer)
            self._gates[device] = CausalGate(stack.weighting, self.tokenizer, header, self.edits)
        return self._gates[device]

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[list[Action]]]:
        """Context in which each call of the model in this thread appends its actions to the list."""
        before, self._switch.record = self._switch.record, []
        try:
            yield self._switch.record
        finally:
            self._switch.record = before

    def _read(self, number: int, hidden: Tensor) -> None:
        """Let the gate read the output ``(B, T, d)`` of the block ``_encoder_layers[number]``."""
        if not self._switch.on or not self._edits:
            return
        call = self._tracker.current(*hidden.shape[:2])
        gate = self.gate(hidden.device)
        if number == 0:
            call.notes[self._name] = gate.begin(call.tokens(), call.state(self._name))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if (reading := call.notes.get(self._name)) is not None:
                gate.read(reading, number, hidden)

    def _change(self, layer: int, hidden: Tensor) -> Tensor | None:
        if not self._switch.on or not self._edits:
            return None
        call = self._tracker.current(*hidden.shape[:2])
        if self.reads_tokens:
            return self._act(layer, hidden, call)
        found = call.positions(self.config.rule, self.subjects(), *hidden.shape[:2])
        if found is None:
            return None
        row, column = (index.to(hidden.device) for index in found)
        x = hidden[row, column].float()  # (P, d)
        with torch.autocast(hidden.device.type, enabled=False):
            changed = x + self.stack(layer, hidden.device).update(x)
        return hidden.index_put((row, column), changed.to(hidden.dtype))

    def _act(self, layer: int, hidden: Tensor, call: Call) -> Tensor | None:
        """Let the edits act at the tokens that the gate chose."""
        reading = call.notes.get(self._name)
        if reading is None:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            if reading.actions is None:
                with torch.no_grad():
                    reading.actions = self.gate(hidden.device).decide(reading)
                if self._switch.record is not None:
                    self._switch.record.append(reading.actions)
            if not reading.actions:
                return None
            row, column, edit, stage = (
                torch.tensor(values, device=hidden.device)
                for values in zip(*((a.row, a.column, a.index, a.stage) for a in reading.actions), strict=True)
            )
            x = hidden[row, column].float()  # (P, d)
            update, _ = self.stack(layer, hidden.device).update_of(x, edit, stage)
        return hidden.index_put((row, column), (x + update).to(hidden.dtype))

    def _finish(self, call: Call) -> TokenState | None:
        """What is to be kept of a call's tokens beside its KV cache."""
        reading = call.notes.get(self._name)
        return None if reading is None else reading.state()

    # ------------------------------------------------------------------------------------------ tensors on disk

    def state(self) -> dict[str, Tensor]:
        """All tensors under their names on disk: ``layers.<n>.edits.<name> (E, ...)`` and ``layers.<n>.shared.<name>``."""
        state = edits_state(self.edits)
        for layer in self.layers:
            for name, tensor in self.shared[layer].items():
                state[f"layers.{layer}.shared.{name}"] = tensor
        return {name: tensor.contiguous().cpu() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor], edits: Sequence[Mapping[str, Any]], where: str = "") -> None:
        """Load edits from the tensors of :meth:`state` and the edits' summaries; on an error, change nothing.

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or dtype, or not finite.
        """
        shared, loaded = self.read_state(state, edits, where)
        before = self.shared
        try:
            self.shared = shared
            for layer in self.layers:
                self._try_network(layer)
            self.set_edits(loaded)
        except (RuntimeError, TypeError, IndexError, ValueError, BaftError) as error:
            self.shared = before
            raise AdapterError(f"{where}{error}") from None

    def _why_other(self, name: str) -> str:
        """The probable reason why an adapter does not have the expected tensors."""
        if ".shared." not in name and ".weighting." not in name:
            return "the adapter is damaged or has other settings"
        return (
            f"the adapter's gate {self.config.weighting!r} has another form than this version's; "
            f"{_RELOAD_HINT.format(made='the version that made it')}"
        )

    def _try_network(self, layer: int) -> None:
        """Run the layer's network once, so that shared tensors that do not fit together fail now rather than in use."""
        network, h = self.network(layer), torch.zeros(1, self.embed_dim)
        with torch.no_grad():
            network(h)
            if isinstance(network, FactWeighting):
                if self.shared[layer]:
                    network.encoder.check(self.embed_dim, network.key.shape[0])
            elif network.routed:
                network.match(h)

    def read_state(
        self, state: Mapping[str, Tensor], edits: Sequence[Mapping[str, Any]], where: str = ""
    ) -> tuple[dict[int, dict[str, Tensor]], list[Edit]]:
        """``(shared, edits)`` from the tensors of :meth:`state` and the edits' summaries; this adapter does not change.

        Raises:
            AdapterError: as :meth:`load_state`.
        """
        expected: dict[str, tuple[int | None, ...]] = {}
        for layer in self.layers:
            network = make_weighting(
                self.config.weighting, self.embed_dim, self.config.rank, **self.config.weighting_options
            )
            for name, tensor in network.state_dict().items():
                if is_shared(network, name):
                    # a dimension of 0 depends on data (directions of a whitening, relations of a dictionary)
                    expected[f"layers.{layer}.shared.{name}"] = tuple(n or None for n in tensor.shape)
                elif edits:
                    expected[f"layers.{layer}.edits.weighting.{name}"] = (len(edits), *tensor.shape)
            if edits:
                r, d, e = self.config.rank, self.embed_dim, len(edits)
                shapes = {"rotation": (e, r, d), "source_weight": (e, r, d), "source_bias": (e, r), "used": (e, r)}
                expected.update({f"layers.{layer}.edits.{n}": s for n, s in shapes.items()})
        optional = {n for n in expected if ".shared." in n} if not edits else set()
        for name in sorted(set(expected) - set(state) - optional):
            raise AdapterError(f"{where}tensor {name!r} is missing; {self._why_other(name)}")
        for name, tensor in state.items():
            if name not in expected:
                raise AdapterError(f"{where}unknown tensor {name!r}; {self._why_other(name)}")
            shape = expected[name]
            if tensor.dtype != torch.float32:
                raise AdapterError(f"{where}tensor {name!r} is {tensor.dtype}; it must be float32")
            if tensor.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
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
            for i, row in enumerate(tensor.unbind(0)):
                if rest == "used":
                    used[i][int(number)] = row
                else:
                    own[i][int(number)][rest] = row
        return shared, [_edit_from(summary, own[i], used[i], f"{where}edits[{i}]: ") for i, summary in enumerate(edits)]


def check_layout(description: Mapping[str, Any], weighting: str, where: str) -> None:
    """Check that this version can read the form of the gate's tensors; adapters older than this field pass.

    Raises:
        AdapterError: the form differs; the message names both forms and says what to do.
    """
    found, needed = description.get("weighting_layout"), weighting_class(weighting).layout
    if found is not None and found != needed:
        raise AdapterError(
            f"{where}the adapter has layout {found!r} of the gate {weighting!r}, but this version reads layout {needed}; "
            f"{_RELOAD_HINT.format(made=made_by(description))}"
        )


def made_by(description: Mapping[str, Any]) -> str:
    """The name of the version that wrote an adapter."""
    versions = description.get("versions")
    found = versions.get("baft_intervention") if isinstance(versions, Mapping) else None
    return f"baft_intervention {found}" if found else "the version that made it"


_RELOAD_HINT = "load it with {made}, or edit again: its requests are in adapter.json under edits"


def edits_state(edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The tensors of E edits under their names on disk, ``layers.<n>.edits.<name> (E, ...)``; empty without edits."""
    state = {}
    for layer in edits[0].tensors if edits else ():
        for name in edits[0].tensors[layer]:
            state[f"layers.{layer}.edits.{name}"] = torch.stack([edit.tensors[layer][name] for edit in edits])
        state[f"layers.{layer}.edits.used"] = torch.stack([edit.used[layer] for edit in edits])
    return state


def _edit_from(summary: Mapping[str, Any], tensors: dict, used: dict, where: str) -> Edit:
    try:
        requests = tuple(EditRequest.from_dict(r) for r in summary["requests"])
        if not requests:
            raise AdapterError(f"{where}the edit has no requests")
        return Edit(
            str(summary["id"]), requests, tensors, used, float(summary["loss"]), int(summary["steps"]), 0.0,
            bool(summary["reached"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{where}cannot be read: {error!r}") from None
