"""Why an edit acts on a text or not: where, with which weights, and what its gate found there.

    found = inspect_prompt(editor, "The currency of Japan is the")
    print(found.edits[0].reason)    # does not act: the text asks something else (at ' the' 0.21 of 0.60 needed, …)

Nothing is guessed: the text is run as :meth:`BaftEditor.generate` would run it, and the numbers are those from which the
adapter computes the update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..editor.editor import BaftEditor
from ..errors import EditError, RequestError
from ..gates import WeightingNetwork
from ..gates.relation_encoder import read_layers
from ..models.chat import render_chat
from ..models.structure import compute_device, context_length
from ..models.tokenization import encode_prompt, pad_token_id
from ..runtime.adapter import BaftAdapter, Edit
from ..runtime.causal_gate import Action, CausalGate, Reading
from ..runtime.edit_stack import MAP_TENSORS
from ..training.relation_texts import relations


@dataclass(frozen=True)
class EditView:
    """One edit on one text, at one layer.

    Args:
        id, prompt, target: of the edit (the first request's, where it has several).
        layer: the edited block.
        weights: ``(T, r)``, the weight of each basis at each token. For the default gate 0 where the edit does not act; for a
            gate that acts at positions, the weight that the basis would have there.
        acts: indices of the tokens at which the edit's update is added.
        stages: for each of them, how many tokens of its answer the edit has said before; 0 where the answer begins.
        token: index of the token that fits the edit best, behind a mention of its subject or at an edited position; None where
            there is none.
        subject: indices of the first and last token of the last mention of its subject before ``token``; None without.
        score: how well ``token`` fits: the default gate's ``z . key``, another gate's match; None for a network without.
        threshold: what the score must exceed.
        asked: how likely the text at ``token`` asks about this subject rather than another one; None where nobody asks that.
        relation: name of the known relation that is nearest to what the text asks at ``token``; None without the default gate.
        reason: one line for people.
    """

    id: str
    prompt: str
    target: str
    layer: int
    weights: tuple[tuple[float, ...], ...]
    acts: tuple[int, ...]
    stages: tuple[int, ...]
    token: int | None
    subject: tuple[int, int] | None
    score: float | None
    threshold: float | None
    asked: float | None
    relation: str | None
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What the edits of an adapter make of a text.

    Args:
        prompt: the text that was given.
        tokens: ``(T,)`` texts of its tokens and of the generated ones.
        prompt_length: how many of them were given.
        positions: indices of the tokens that the adapter's rule edits; empty where the gate decides.
        edits: views, those that act first, then by how well they fit; at most ``top`` a layer.
        total: how many edits the adapter has.
        acting: ids of all edits that act, shown or not.
    """

    prompt: str
    tokens: tuple[str, ...]
    prompt_length: int
    positions: tuple[int, ...]
    edits: tuple[EditView, ...]
    total: int
    acting: tuple[str, ...]


@torch.no_grad()
def inspect_prompt(
    editor: BaftEditor, prompt: str | Sequence[Mapping[str, str]], *, top: int = 3, generate: int = 0
) -> Inspection:
    """Look at one text through every edit.

    Args:
        editor: with at least one edit; it is left as it was.
        prompt: a text or a conversation, as it would be given to :meth:`BaftEditor.generate`.
        top: how many edits a layer to show; those that act come first.
        generate: let the edited model continue by so many tokens, and look at these too.

    Raises:
        EditError: there is no edit.
        RequestError: an empty prompt, one too long for the model, ``top`` below 1 or ``generate`` below 0.
    """
    adapter = editor.adapter
    if not adapter.edits:
        raise EditError("there is no edit to inspect; make one with baft edit, or editor.edit(...)")
    text = prompt if isinstance(prompt, str) else render_chat(editor.tokenizer, prompt)
    if not text.strip():
        raise RequestError(f"the prompt {text!r} is empty; give some text")
    for name, value, least in (("top", top, 1), ("generate", generate, 0)):
        if value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}")
    ids = encode_prompt(editor.tokenizer, text)
    length = len(ids)
    if generate:
        ids = _continued(editor, ids, generate)
    seen = read_ids(editor, ids, length)
    tokens = tuple(editor.tokenizer.decode([i]) for i in ids)
    positions: list[int] = []
    if adapter.reads_tokens:
        heard = _Heard(adapter, ids, seen, tokens)
        views = [view for layer in adapter.layers for view in heard.views(layer, seen[layer], top)]
        acting = list(dict.fromkeys(action.edit for action in heard.actions))
    else:
        positions = _edited_positions(adapter, ids, length)
        views, acting = _views_at_positions(adapter, seen, positions, tokens, top)
    return Inspection(text, tokens, length, tuple(positions), tuple(views), len(adapter.edits), tuple(acting))


def _continued(editor: BaftEditor, ids: Sequence[int], count: int) -> list[int]:
    """The ids and the edited model's ``count`` likeliest next ones, fewer where it ends the text."""
    context = context_length(editor.model)
    if context and len(ids) + count > context:
        raise RequestError(
            f"a prompt of {len(ids)} tokens and {count} new ones, but the model reads {context}; shorten the prompt, or "
            "generate fewer"
        )
    model: Any = editor.model
    given = torch.tensor([list(ids)], device=compute_device(model))
    with acting(editor.adapter), editor.adapter.prompts([len(ids)]):
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, temperature=None,
            top_p=None, top_k=None, pad_token_id=pad_token_id(editor.tokenizer),
        )  # fmt: skip
    return getattr(out, "sequences", out)[0].tolist()


@torch.no_grad()
def read_ids(editor: BaftEditor, ids: Sequence[int], prompt_length: int | None = None) -> dict[int, Tensor]:
    """``layer -> (T, d)``: what the gate and the edits find at each block that they read, with the edits acting (fp32).

    At an edited block this is the block's output before its own edits are added, those of lower blocks included.

    Args:
        editor: its model is run once.
        ids: one text.
        prompt_length: where the prompt ends, for a position rule; by default all is prompt.
    """
    adapter = editor.adapter
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[layer] = hidden[0].detach().float()

        return hook

    # before every other hook: the adapter's own would have changed the output already
    handles = [adapter.blocks[layer].register_forward_hook(keep(layer), prepend=True) for layer in adapter.read_layers]
    device = compute_device(editor.model)
    try:
        with acting(adapter), adapter.prompts([prompt_length or len(ids)]):
            editor.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextlib.contextmanager
def acting(adapter: BaftAdapter) -> Iterator[None]:
    """Inside, the edits are on the model and act; after, as before."""
    attached = adapter.attached
    adapter.attach()
    try:
        with adapter.enabled(True):
            yield
    finally:
        if not attached:
            adapter.detach()


# ------------------------------------------------------------------------------------------- a gate that reads tokens


def let_read(gate: CausalGate, adapter: BaftAdapter, ids: Sequence[int], seen: Mapping[int, Tensor]) -> Reading:
    """What a gate reads of one text, from the outputs ``layer -> (T, d)`` of the blocks."""
    reading = gate.begin(torch.tensor([list(ids)]), None)
    for number, layer in enumerate(read_layers(adapter.layers, len(adapter.blocks))):
        gate.read(reading, number, seen[layer].unsqueeze(0))
    return reading


@dataclass(frozen=True)
class _Best:
    """The token that fits an edit best; fields as in :class:`EditView`."""

    token: int
    subject: tuple[int, int] | None
    score: float
    asked: float
    begins: bool
    open: bool
    relation: str | None


class _Heard:
    """What the gate heard in one text, and what it decided.

    Args:
        adapter: whose edits are asked.
        ids: of the text.
        seen: of :func:`read_ids`.
        tokens: texts of the tokens.
    """

    def __init__(self, adapter: BaftAdapter, ids: Sequence[int], seen: Mapping[int, Tensor], tokens: Sequence[str]):
        self.adapter, self.tokens = adapter, tokens
        gate = adapter.gate(seen[adapter.layers[0]].device)
        reading = let_read(gate, adapter, ids, seen)
        self.actions = gate.decide(reading)
        self.thresholds = gate.weighting.state["threshold"].tolist()
        self.best: dict[str, _Best] = {}
        names = _nearest_relations(gate, reading)
        for candidate, own, name in zip(reading.candidates, gate.explain(reading), names, strict=True):
            for edit, (score, asked, begins, is_open) in own.items():
                before = self.best.get(edit)
                if before is None or (is_open, begins, score) > (before.open, before.begins, before.score):
                    span = candidate.named.get(edit)
                    self.best[edit] = _Best(candidate.column, span, score, asked, begins, is_open, name)

    def views(self, layer: int, x: Tensor, top: int) -> list[EditView]:
        """The edits at one layer, the best first; ``x (T, d)`` is what they find there."""
        edits = self.adapter.edits

        def fit(index: int) -> tuple[bool, float]:
            best = self.best.get(edits[index].id)
            return any(a.index == index for a in self.actions), best.score if best else -math.inf

        order = sorted(range(len(edits)), key=fit, reverse=True)
        return [self._view(layer, index, x) for index in order[:top]]

    def _view(self, layer: int, index: int, x: Tensor) -> EditView:
        edit = self.adapter.edits[index]
        own = [action for action in self.actions if action.index == index]
        weights = torch.zeros(len(x), self.adapter.config.rank)
        if own:
            columns = [action.column for action in own]
            which = torch.full((len(own),), index, device=x.device)
            stages = torch.tensor([action.stage for action in own], device=x.device)
            _, found = self.adapter.stack(layer, x.device).update_of(x[columns], which, stages)
            weights[columns] = found.cpu()
        request, best = edit.requests[0], self.best.get(edit.id)
        return EditView(
            edit.id, request.prompt, request.target_new, layer, _rows(weights), tuple(a.column for a in own),
            tuple(a.stage for a in own), best and best.token, best and best.subject, best and best.score,
            self.thresholds[index], best.asked if best and best.subject else None, best and best.relation,
            self._reason(edit, self.thresholds[index], own),
        )  # fmt: skip

    def _reason(self, edit: Edit, threshold: float, own: Sequence[Action]) -> str:
        best = self.best.get(edit.id)
        if own:
            begun = [a for a in own if a.stage == 0]
            said = ", ".join(
                f"{self.tokens[a.column]!r} ({a.score + threshold:.2f}, {threshold:.2f} needed)" for a in begun[:3]
            )
            more = ", …" if len(begun) > 3 else ""
            behind = len(own) - len(begun)
            tail = f" and on {behind} token{'s' * (behind > 1)} of its answer" if behind else ""
            return f"acts on {said}{more}{tail}"
        if best is None:
            named = " or ".join(repr(r.subject) for r in edit.requests)
            return f"does not act: the subject {named} is not named"
        at = f"at {self.tokens[best.token]!r}"
        if best.open:
            return f"does not act: {self._loss(edit, best, at)}"
        if not best.begins:
            return (
                f"does not act: no answer begins behind its subject ({at} {best.score:.2f} of {threshold:.2f} needed)"
            )
        if best.score > threshold:
            return (
                f"does not act: another subject is asked about ({at} the probability of its own is {best.asked:.2f}; the "
                f"relation fits, {best.score:.2f} of {threshold:.2f} needed)"
            )
        near = "" if best.relation is None else f', nearest known relation "{best.relation}"'
        return f"does not act: the text asks something else ({at} {best.score:.2f} of {threshold:.2f} needed{near})"

    def _loss(self, edit: Edit, best: _Best, at: str) -> str:
        """Why an edit whose gate is open does not act."""
        there = next((a for a in self.actions if a.column == best.token), None)
        if there is not None:
            return f"edit {there.edit!r} fits better {at}" if there.stage == 0 else f"{at} edit {there.edit!r} answers"
        before = next((a for a in reversed(self.actions) if a.column < best.token), None)
        whose = "its own answer" if before is None or before.edit == edit.id else f"the answer of edit {before.edit!r}"
        return f"{at} the text stands right behind {whose}"


def _nearest_relations(gate: CausalGate, reading: Reading) -> list[str | None]:
    """For each candidate, the name of the known relation nearest to what the text asks there."""
    known, names = gate.encoder.relations, [relation["name"] for relation in relations()[1]]
    if not reading.candidates or not 0 < len(known) <= len(names):
        return [None] * len(reading.candidates)
    z = reading.encoded(gate.encoder)[0]
    return [names[i] for i in (z @ known.to(z).mT).argmax(-1).tolist()]


# ------------------------------------------------------------------------------------------- gates at positions


def basis_weights(adapter: BaftAdapter, layer: int, x: Tensor, index: Tensor | None = None) -> Tensor:
    """The weights of edits at every token, each as if its gate were open: ``x (T, d) -> (K, T, r)``.

    Args:
        adapter: with at least one edit.
        layer: an edited block.
        x: representations there, see :func:`read_ids`.
        index: ``(K,)`` which edits; all of them where None.
    """
    weighting = adapter.stack(layer, x.device).weighting
    index = torch.arange(len(adapter.edits)) if index is None else index
    index = index.to(x.device)
    return weighting.on_own(x.expand(len(index), *x.shape), weighting.picked(index))


def edit_network(adapter: BaftAdapter, layer: int, edit: Edit) -> WeightingNetwork:
    """The weighting network of one edit, on the CPU."""
    own = {n.split(".", 1)[1]: t for n, t in edit.tensors[layer].items() if n not in MAP_TENSORS}
    network = adapter.network(layer)
    network.load_state_dict({**network.state_dict(), **own})
    return network


def _edited_positions(adapter: BaftAdapter, ids: Sequence[int], length: int) -> list[int]:
    rule, subjects = adapter.config.rule, adapter.subjects()
    named = None if subjects is None else subjects.mask(torch.tensor([list(ids)]))
    mask = rule.mask(torch.tensor([0]), torch.tensor([length]), torch.arange(len(ids)), named)
    return mask[0].nonzero().flatten().tolist()


def _views_at_positions(
    adapter: BaftAdapter, seen: Mapping[int, Tensor], positions: Sequence[int], tokens: Sequence[str], top: int
) -> tuple[list[EditView], list[str]]:
    """The views, and the ids of all edits that act."""
    views: list[EditView] = []
    active: dict[str, None] = {}
    for layer in adapter.layers:
        acts, match = _acts_and_match(adapter, layer, seen[layer], positions)
        active |= {edit.id: None for edit, where in zip(adapter.edits, acts, strict=True) if where}
        fit = match.amax(1) if match.numel() else torch.zeros(len(adapter.edits))
        order = sorted(range(len(adapter.edits)), key=lambda e: (not acts[e], -float(fit[e])))
        shown = torch.tensor(order[:top])
        weights = basis_weights(adapter, layer, seen[layer], shown).cpu()
        winner = next((adapter.edits[i].id for i in order if acts[i]), "")
        for e, w in zip(shown.tolist(), weights, strict=True):
            views.append(_view_at_positions(adapter, layer, e, match[e], positions, w, acts[e], winner, tokens))
    return views, list(active)


def _acts_and_match(
    adapter: BaftAdapter, layer: int, x: Tensor, positions: Sequence[int]
) -> tuple[list[list[int]], Tensor]:
    """For each edit the tokens at which it acts, and ``(E, P)``: how well the P edited tokens fit it."""
    stack, acts = adapter.stack(layer, x.device), [[] for _ in adapter.edits]
    if not positions:
        return acts, torch.empty(len(acts), 0)
    at = x[list(positions)]  # (P, d)
    weights, winner = stack.weights(at)
    if not adapter.routed:  # (E, P, r): the updates of all edits are added up
        for e, p in (weights.amax(-1) > 0).nonzero().tolist():
            acts[e].append(positions[p])
        return acts, weights.mean(-1).cpu()
    for position, e, w in zip(positions, winner.tolist(), weights.amax(-1).tolist(), strict=True):
        if w > 0:
            acts[e].append(position)
    return acts, stack.weighting.match(at).cpu()


def _view_at_positions(
    adapter: BaftAdapter,
    layer: int,
    index: int,
    match: Tensor,
    positions: Sequence[int],
    weights: Tensor,
    acts: Sequence[int],
    winner: str,
    tokens: Sequence[str],
) -> EditView:
    edit, score, token = adapter.edits[index], None, None
    if positions and adapter.routed:
        score, token = float(match.max()), positions[int(match.argmax())]
    fits = "" if score is None else f" (match {score:+.2f}, above 0 needed)"
    if acts:
        where = ", ".join(repr(tokens[p]) for p in acts[:3]) + (", …" if len(acts) > 3 else "")
        reason = f"acts on {where}, weight {float(weights[list(acts)].mean()):.2f}{fits}"
    elif not positions:
        rule = adapter.config.positions or "last"
        reason = f"does not act: the positions {rule!r} find no token in this prompt"
    elif score is not None and score > 0 and winner not in ("", edit.id):
        reason = f"does not act: edit {winner!r} fits better{fits}"
    else:
        reason = f"does not act: the gate is closed{fits}"
    request = edit.requests[0]
    return EditView(
        edit.id, request.prompt, request.target_new, layer, _rows(weights), tuple(acts), (0,) * len(acts), token, None,
        score, None if score is None else 0.0, None, None, reason,
    )  # fmt: skip


def _rows(x: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x.tolist())


# ------------------------------------------------------------------------------------------- in a terminal

BLOCKS, ASCII = "·░▒▓█", ".:-=#"  # weight 0, then up to 1/4, 1/2, 3/4, 1
_BASES = 48  # at most so many are drawn in a line


def heat_lines(found: Inspection, view: EditView, *, shades: str = BLOCKS) -> list[tuple[str, bool]]:
    """An edit's heat map for a terminal, one line a token: ``(line, whether the edit acts there)``.

    A star marks tokens that the edit, or the position rule, acts on, and a plus those of its own answer; a line parts the generated
    tokens from the given ones.

    Args:
        found: of :func:`inspect_prompt`.
        view: one of its edits.
        shades: five characters, from weight 0 to 1.
    """
    names = [repr(token)[1:-1] for token in found.tokens]
    width = min(max(len(name) for name in names), 24)
    rank = len(view.weights[0])
    bases = f"basis 1 to {rank}" if rank <= _BASES else f"basis 1 to {_BASES} of {rank}"
    lines = [(f"    {'token':{width}}  mean  {bases}", False)]
    stage = dict(zip(view.acts, view.stages, strict=True))
    for t, (name, row) in enumerate(zip(names, view.weights, strict=True)):
        if t == found.prompt_length:
            lines.append(("    generated:", False))
        mark = "+" if stage.get(t) else "*" if t in stage or t in found.positions else " "
        cells = "".join(shades[math.ceil(min(w, 1.0) * 4)] for w in row[:_BASES])
        lines.append((f"  {mark} {name[:width]:{width}}  {sum(row) / rank:4.2f}  {cells}", t in stage))
    return lines
