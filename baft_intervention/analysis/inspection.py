"""Why an edit fired or not: the weight of each basis at each token of a prompt, and what the weighting network saw.

    found = inspect_prompt(editor, "The currency of Japan is the")
    print(found.edits[0].reason)    # does not act: relation 0.18 against 0.61 of its nearest rival; …

Nothing is guessed: the prompt is run as :meth:`BaftEditor.generate` would run it, and the numbers are those from which the
adapter computes the update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..editor.editor import BaftEditor
from ..errors import EditError, RequestError
from ..gates import WeightingNetwork
from ..models.structure import compute_device
from ..models.tokenization import encode_prompt
from ..runtime.adapter import BaftAdapter, Edit
from ..runtime.edit_stack import MAP_TENSORS

_NO_RIVAL = -1.5  # `similarities` gives -2 where nothing competes; a cosine is at least -1


@dataclass(frozen=True)
class EditView:
    """One edit on one prompt, at one layer.

    Args:
        id, prompt, target: of the edit (the first request's, where it has several).
        layer: the edited block.
        weights: ``(T, r)``, the weight that each basis has, or would have, at each token.
        acts: indices of the tokens at which the edit's update is added.
        subject: the best token's subject score that the prompt names the edit's subject, above 0 where it does (a cosine less its
            threshold); None where the network does not ask, or the edit has no subject.
        subject_token: index of that token.
        relation: similarity to what the edit asks, at the edited token that fits best; None where the network does not tell.
        rival: similarity to the nearest other relation there, or to the edit's own sentence with another relation in it where the
            prompt is in these words; None where none competes.
        match: how well that token fits the edit, above 0 where it is taken to be the edit's; None for a network without.
        reason: one line for people.
    """

    id: str
    prompt: str
    target: str
    layer: int
    weights: tuple[tuple[float, ...], ...]
    acts: tuple[int, ...]
    subject: float | None
    subject_token: int | None
    relation: float | None
    rival: float | None
    match: float | None
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What the edits of an adapter make of a prompt.

    Args:
        prompt: the text.
        tokens: ``(T,)`` texts of its tokens.
        positions: indices of the tokens that the adapter's rule edits.
        edits: views, those that act first, then by how well they fit; at most ``top`` a layer.
        total: how many edits the adapter has.
        acting: ids of all edits that act, shown or not.
    """

    prompt: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    edits: tuple[EditView, ...]
    total: int
    acting: tuple[str, ...]


@torch.no_grad()
def inspect_prompt(editor: BaftEditor, prompt: str, *, top: int = 3) -> Inspection:
    """Look at one prompt through every edit.

    Args:
        editor: with at least one edit; it is left as it was.
        prompt: the text, as it would be given to :meth:`BaftEditor.generate`.
        top: how many edits a layer to show; those that act come first.

    Raises:
        EditError: there is no edit.
        RequestError: an empty prompt, or ``top`` below 1.
    """
    adapter = editor.adapter
    if not adapter.edits:
        raise EditError("there is no edit to inspect; make one with baft edit, or editor.edit(...)")
    if not prompt.strip():
        raise RequestError(f"the prompt {prompt!r} is empty; give some text")
    if top < 1:
        raise RequestError(f"top is {top}; it must be at least 1")
    ids, seen = read_prompt(editor, prompt)
    positions = _edited_positions(adapter, ids)
    views: list[EditView] = []
    acting: list[str] = []
    for layer in adapter.layers:
        subject_score = subject_scores_of(adapter, layer, seen)
        acts, match = _acts_and_match(adapter, layer, seen[layer], positions, subject_score)
        acting += [edit.id for edit, where in zip(adapter.edits, acts, strict=True) if where and edit.id not in acting]
        fit = match.amax(1) if match.numel() else torch.zeros(len(adapter.edits))
        order = sorted(range(len(adapter.edits)), key=lambda e: (not acts[e], -float(fit[e])))
        shown = torch.tensor(order[:top])
        weights = basis_weights(adapter, layer, seen[layer], subject_score, shown).cpu()
        for e, w in zip(shown.tolist(), weights, strict=True):
            rival = next((adapter.edits[i].id for i in order if acts[i]), "")
            views.append(_view(editor, layer, e, ids, positions, seen, w, acts[e], rival))
    tokens = tuple(editor.tokenizer.decode([i]) for i in ids)
    return Inspection(prompt, tokens, tuple(positions), tuple(views), len(adapter.edits), tuple(acting))


@torch.no_grad()
def read_prompt(editor: BaftEditor, prompt: str) -> tuple[list[int], dict[int, Tensor]]:
    """Ids of a prompt, and ``layer -> (T, d)``: what the edits of each layer, and the subject's reader, find there (fp32).

    At an edited block this is the block's output before its own edits are added, those of lower blocks included.
    """
    adapter = editor.adapter
    ids = encode_prompt(editor.tokenizer, prompt)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[layer] = hidden[0].detach().float()

        return hook

    wanted = {*adapter.layers, *([] if adapter.read_layer is None else [adapter.read_layer])}
    # before every other hook: the adapter's own would have changed the output already
    handles = [adapter.blocks[layer].register_forward_hook(keep(layer), prepend=True) for layer in sorted(wanted)]
    device = compute_device(editor.model)
    try:
        with _acting(adapter):
            editor.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ids, seen


def basis_weights(
    adapter: BaftAdapter, layer: int, x: Tensor, subject_score: Tensor | None, index: Tensor | None = None
) -> Tensor:
    """The weights of edits at every token, each as if no other edit were there: ``x (T, d) -> (K, T, r)``.

    Args:
        adapter: with at least one edit.
        layer: an edited block.
        x: representations there, see :func:`read_prompt`.
        subject_score: ``(E,)`` of :func:`subject_scores_of`.
        index: ``(K,)`` which edits; all of them where None.
    """
    weighting = adapter.stack(layer, x.device).weighting
    index = torch.arange(len(adapter.edits)) if index is None else index
    index = index.to(x.device)
    own = x.expand(len(index), *x.shape)
    return weighting.on_own(own, weighting.picked(index), _for_each(subject_score, x.shape[0], index))


def subject_scores_of(adapter: BaftAdapter, layer: int, seen: Mapping[int, Tensor]) -> Tensor | None:
    """Every edit's subject score, the best over the prompt's tokens: ``(E,)``; None for a network that reads no subject."""
    if adapter.read_layer is None:
        return None
    x = seen[adapter.read_layer]
    row, column = torch.zeros(len(x), dtype=torch.long, device=x.device), torch.arange(len(x), device=x.device)
    return adapter.stack(layer, x.device).subject_scores(x, row, column, 1)[:, 0]


def edit_network(adapter: BaftAdapter, layer: int, edit: Edit) -> WeightingNetwork:
    """The weighting network of one edit, on the CPU."""
    own = {n.split(".", 1)[1]: t for n, t in edit.tensors[layer].items() if n not in MAP_TENSORS}
    network = adapter.network(layer)
    network.load_state_dict({**network.state_dict(), **own})
    return network


@contextlib.contextmanager
def _acting(adapter: BaftAdapter) -> Iterator[None]:
    """Inside, the edits are on the model and act; after, as before."""
    attached = adapter.attached
    adapter.attach()
    try:
        with adapter.enabled(True):
            yield
    finally:
        if not attached:
            adapter.detach()


def _for_each(subject_score: Tensor | None, positions: int, index: Tensor | None = None) -> Tensor | None:
    """``(E,) -> (K, positions)``: what was read once a prompt, at each of its positions."""
    if subject_score is None:
        return None
    chosen = subject_score if index is None else subject_score[index]
    return chosen[:, None].expand(len(chosen), positions)


def _edited_positions(adapter: BaftAdapter, ids: Sequence[int]) -> list[int]:
    rule, subjects = adapter.config.rule, adapter.subjects()
    named = None if subjects is None else subjects.mask(torch.tensor([list(ids)]))
    mask = rule.mask(torch.tensor([0]), torch.tensor([len(ids)]), torch.arange(len(ids)), named)
    return mask[0].nonzero().flatten().tolist()


def _acts_and_match(
    adapter: BaftAdapter, layer: int, x: Tensor, positions: Sequence[int], subject_score: Tensor | None
) -> tuple[list[list[int]], Tensor]:
    """For each edit the tokens at which it acts, and ``(E, P)``: how well the P edited tokens fit it."""
    stack, acts = adapter.stack(layer, x.device), [[] for _ in adapter.edits]
    if not positions:
        return acts, torch.empty(len(acts), 0)
    at, each = x[list(positions)], _for_each(subject_score, len(positions))  # (P, d), (E, P)
    weights, winner = stack.weights(at, each)
    if not adapter.routed:  # (E, P, r): the updates of all edits are added up
        for e, p in (weights.amax(-1) > 0).nonzero().tolist():
            acts[e].append(positions[p])
        return acts, weights.mean(-1).cpu()
    for position, e, w in zip(positions, winner.tolist(), weights.amax(-1).tolist(), strict=True):
        if w > 0:
            acts[e].append(position)
    if each is None:
        return acts, stack.weighting.priority(at).cpu()
    return acts, stack.weighting.priority_of(torch.arange(len(acts), device=at.device), at, each).cpu()


def _view(
    editor: BaftEditor,
    layer: int,
    index: int,
    ids: Sequence[int],
    positions: Sequence[int],
    seen: Mapping[int, Tensor],
    weights: Tensor,
    acts: Sequence[int],
    winner: str,
) -> EditView:
    """What one edit's own network says, in numbers and in words."""
    adapter = editor.adapter
    edit = adapter.edits[index]
    network: Any = edit_network(adapter, layer, edit)
    subject = subject_token = relation = rival = match = subject_score = answered = None
    if adapter.read_layer is not None:
        early = seen[adapter.read_layer].cpu()
        each = network.subject_score(early)  # (T,)
        subject_score = network.of_prompt(early)
        if bool((each != 1.0).any()):  # 1 everywhere: the edit names no subject, so every prompt passes
            subject, subject_token = float(subject_score), int(each.argmax())
            behind = network.answer_score(early)[subject_token + 1 :] if network.reads_answer else early.new_empty(0)
            if len(behind) and float(behind.max()) > 0:
                answered = subject_token + 1 + int(behind.argmax())
                subject_score = -behind.max()
    over = 0.0
    related, worded = True, False
    if positions and network.routed:
        at = seen[layer][list(positions)].cpu()  # (P, d)
        fits = network.match(at, None if subject_score is None else subject_score.expand(len(positions)))  # (P,)
        match, best = float(fits.max()), at[fits.argmax()]
        over = float(network.match(best))  # the relation question alone
        related = over > 0
        if hasattr(network, "similarities"):
            own, nearest, template = (float(x) for x in network.similarities(best))
            worded = template > max(nearest, network.same_sentence)
            relation, rival = own, template if worded else nearest if nearest > _NO_RIVAL else None
    token = "" if subject_token is None else editor.tokenizer.decode([ids[subject_token]])
    said = _said(subject, token, relation, rival, over if network.routed and positions else None, worded)
    if answered is not None:
        said["answer"] = f"the answer stands in the prompt already, at {editor.tokenizer.decode([ids[answered]])!r}"
    found = {"subject": subject is None or subject > 0, "answer": answered is None, "relation": related}
    failed = [question for question, right in found.items() if not right]
    if acts:
        where = ", ".join(repr(editor.tokenizer.decode([ids[p]])) for p in acts[:3]) + (", …" if len(acts) > 3 else "")
        reason = _sentence(f"acts on {where}, weight {float(weights[list(acts)].mean()):.2f}", said.values())
    elif not positions:
        reason = f"does not act: the positions {adapter.config.positions!r} find no token in this prompt"
    elif match is not None and match > 0 and winner not in ("", edit.id):
        reason = _sentence(f"does not act, edit {winner!r} fits better", said.values())
    else:  # what failed first
        reason = _sentence("does not act", [said[k] for k in sorted(said, key=lambda k: k not in failed)])
    request = edit.requests[0]
    return EditView(
        edit.id, request.prompt, request.target_new, layer, tuple(tuple(row) for row in weights.tolist()), tuple(acts),
        subject, subject_token, relation, rival, match, reason,
    )  # fmt: skip


def _sentence(verdict: str, said: Iterable[str]) -> str:
    return ": ".join(part for part in (verdict, "; ".join(said)) if part)


def _said(
    subject: float | None, token: str, relation: float | None, rival: float | None, over: float | None, worded: bool
) -> dict[str, str]:
    """What the network answered, in words: ``subject`` and ``relation``, where it asks them.

    ``worded`` says that the rival is the edit's own sentence with another relation in it.
    """
    said = {}
    if subject is not None:
        found = f"subject found at {token!r}" if subject > 0 else f"subject not found, nearest is {token!r}"
        said["subject"] = f"{found} ({subject:+.2f} from the threshold)"
    if over is not None:
        what = f"match {over:+.2f}"
        if relation is not None:
            against = (
                "no rival"
                if rival is None
                else f"{rival:.2f} to {'its own words with another' if worded else 'the nearest other'}"
            )
            what = f"similarity {relation:.2f} to its own relation, {against} ({over:+.2f}"
        said["relation"] = f"{what} from the threshold" + ")" * (relation is not None)
    return said


# ------------------------------------------------------------------------------------------- in a terminal

BLOCKS, ASCII = "·░▒▓█", ".:-=#"  # weight 0, then up to 1/4, 1/2, 3/4, 1
_BASES = 48  # at most so many are drawn in a line


def heat_lines(found: Inspection, view: EditView, *, shades: str = BLOCKS) -> list[tuple[str, bool]]:
    """An edit's heat map for a terminal, one line a token: ``(line, whether the edit acts there)``.

    A star marks the tokens that the adapter edits; elsewhere stands the weight that the edit would have.

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
    for t, (name, row) in enumerate(zip(names, view.weights, strict=True)):
        star = "*" if t in found.positions else " "
        cells = "".join(shades[math.ceil(min(w, 1.0) * 4)] for w in row[:_BASES])
        lines.append((f"  {star} {name[:width]:{width}}  {sum(row) / rank:4.2f}  {cells}", t in view.acts))
    return lines
