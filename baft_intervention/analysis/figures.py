"""What an edit does inside: the paper's figures from live runs, and the trade-off of every linear update, measured.

==========================================  ============================================================================
function                                    answers
==========================================  ============================================================================
:func:`redundant_dimensions` (Figure 1)     how many of an edit's bases carry it, and how many can be left out?
:func:`weights_by_position` (Figure 2)      how much does each basis act on edited and on irrelevant prompts, where?
:func:`batched_editing` (Figure 3)          how does success depend on the length of prompt and target, batch by batch?
:func:`tension`                             how large is the update on unrelated input, against what no linear one can undercut?
==========================================  ============================================================================

Each gives a frozen dataclass of plain numbers; :func:`write_json` writes any of them, and :mod:`~.plots` draws it.
The figures' captions are the paper's (arXiv 2503.00306); how the quantities are measured is our reading.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..editor.editor import BaftEditor
from ..errors import ConfigError, EditError
from ..models.tokenization import IGNORE_INDEX, encode_pair, encode_prompt, pad_rows, pad_token_id
from ..requests import EditRequest
from ..runtime.call_state import hook_block
from ..training.encoding import encode_request
from .tension import Tension, edit_coordinates, edit_weights, least_leak, read_rows, read_texts, tension, the_layer

__all__ = [
    "BatchedEditing",
    "LengthScore",
    "RedundantDimensions",
    "Tension",
    "WeightsByPosition",
    "batched_editing",
    "least_leak",
    "read_texts",
    "redundant_dimensions",
    "tension",
    "to_plain",
    "weights_by_position",
    "write_json",
]

# ------------------------------------------------------------------------------------------ Figure 1


@dataclass(frozen=True)
class RedundantDimensions:
    """How an edit's update is spread over its bases.

    Args:
        ids: ``(E,)`` the edits.
        magnitude: ``(E, r)`` size of the update along each basis, ``|w_k (a_k^T h + b_k - r_k^T h)|`` at the edit's own prompt,
            largest first.
        probability: ``(E, r + 1)`` of the target's tokens (geometric mean) when only the j largest bases act, j = 0 … r.
        reached: ``(E, r + 1)`` whether every target token is then the argmax.
    """

    ids: tuple[str, ...]
    magnitude: tuple[tuple[float, ...], ...]
    probability: tuple[tuple[float, ...], ...]
    reached: tuple[tuple[bool, ...], ...]

    def redundant(self, times: float) -> float:
        """Mean number of bases whose update is at least ``times`` times smaller than the largest."""
        return sum(sum(m * times <= row[0] for m in row) for row in self.magnitude) / len(self.magnitude)

    @property
    def needed(self) -> tuple[int, ...]:
        """``(E,)`` how many of the largest bases give the target; r + 1 where not even all of them do."""
        return tuple(row.index(True) if True in row else len(row) for row in self.reached)


@torch.no_grad()
def redundant_dimensions(editor: BaftEditor) -> RedundantDimensions:
    """Figure 1: drop each edit's bases one by one, the smallest first.

    Args:
        editor: with at least one edit, on one layer; every request of an edit is a row.

    Raises:
        EditError: there is no edit.
        ConfigError: more than one edited layer.
    """
    layer = _layer_of_edits(editor)
    block, device = editor.adapter.blocks[layer], next(editor.model.parameters()).device
    ids, magnitude, probability, reached = [], [], [], []
    for edit in editor.edits:
        for request in edit.requests:
            row = encode_request(editor.tokenizer, request, editor.config)
            read = read_rows(editor, [row.ids], [row.positions])
            stages = torch.arange(len(row.positions)) if editor.config.reads_tokens else None  # as it was trained
            coordinates = edit_coordinates(editor, edit, read, stages)  # (P, r)
            size = torch.linalg.vector_norm(coordinates, dim=0)  # (r,)
            order = size.argsort(descending=True)
            steps = coordinates[:, order, None] * edit.tensors[layer]["rotation"][order]  # (P, r, d)
            partial = torch.cat([torch.zeros_like(steps[:, :1]), steps.cumsum(1)], dim=1).transpose(
                0, 1
            )  # (r + 1, P, d)

            def change(hidden: Tensor, partial: Tensor = partial, at: list[int] = row.positions) -> Tensor:
                changed = hidden.clone()
                changed[:, at] += partial.to(hidden)
                return changed

            tokens = torch.tensor([row.ids], device=device).expand(len(partial), -1)
            handle = hook_block(block, change)
            try:
                with editor.enabled(False):
                    logits = editor.model(input_ids=tokens, use_cache=False).logits.float()
            finally:
                handle.remove()
            target = tokens[:, row.prompt_length :]
            before = logits[:, row.prompt_length - 1 : -1]
            likely = before.log_softmax(-1).gather(-1, target[..., None])[..., 0]  # (r + 1, T)
            ids.append(edit.id)
            magnitude.append(tuple(size[order].tolist()))
            probability.append(tuple(likely.mean(-1).exp().tolist()))
            reached.append(tuple((before.argmax(-1) == target).all(-1).tolist()))
    return RedundantDimensions(tuple(ids), tuple(magnitude), tuple(probability), tuple(reached))


# ------------------------------------------------------------------------------------------ Figure 2


@dataclass(frozen=True)
class WeightsByPosition:
    """Basis weights along the prompt, counted from its end.

    Args:
        weight: ``group -> (width, r)``, mean weight of each basis at the tokens ``-width … -1``.
        count: ``group -> (width,)``, prompts that are long enough to have that token.
    """

    weight: Mapping[str, tuple[tuple[float, ...], ...]]
    count: Mapping[str, tuple[int, ...]]


@torch.no_grad()
def weights_by_position(
    editor: BaftEditor, groups: Mapping[str, Sequence[tuple[str, str]]], *, width: int = 8
) -> WeightsByPosition:
    """Figure 2: how much each basis acts, or would act, at the last tokens of prompts.

    With the default gate, a weight is 0 where the gate of its edit alone is closed.

    Args:
        editor: with at least one edit, on one layer.
        groups: ``name -> [(id of an edit, prompt)]``: whose weights, on what.
        width: how many tokens from the end.

    Raises:
        EditError: there is no edit, or none of a given id.
        ConfigError: more than one edited layer.
    """
    _layer_of_edits(editor)
    weight, count = {}, {}
    for name, pairs in groups.items():
        total, n = torch.zeros(width, editor.config.rank), torch.zeros(width)
        for edit_id, prompt in pairs:
            edit = editor.adapter.find(edit_id)
            if edit is None:
                raise EditError(
                    f"no edit is called {edit_id!r}; there are {', '.join(repr(e.id) for e in editor.edits)}"
                )
            ids = encode_prompt(editor.tokenizer, prompt)
            last = edit_weights(editor, edit, read_rows(editor, [ids], [range(len(ids))]))[-width:]  # (<= width, r)
            total[width - len(last) :] += last
            n[width - len(last) :] += 1
        weight[name] = _nested(total / n.clamp(min=1)[:, None])
        count[name] = tuple(int(k) for k in n)
    return WeightsByPosition(weight, count)


# ------------------------------------------------------------------------------------------ Figure 3


@dataclass(frozen=True)
class LengthScore:
    """One edited fact of a batch.

    Args:
        prompt_tokens, target_tokens: lengths.
        edit: share of the target's tokens that are the argmax after the prompt and the target's earlier tokens.
        paraphrases: the same after each paraphrase that the request brings.
    """

    id: str
    prompt_tokens: int
    target_tokens: int
    edit: float
    paraphrases: tuple[float, ...]


@dataclass(frozen=True)
class BatchedEditing:
    """Facts edited ``size`` at a time and asked while their whole batch acts."""

    size: int
    scores: tuple[LengthScore, ...]


def batched_editing(
    editor: BaftEditor, requests: Sequence[EditRequest], size: int, *, progress: bool = False
) -> BatchedEditing:
    """Figure 3: edit ``size`` requests at a time, ask each of them and its paraphrases, take the batch back.

    Args:
        editor: without edits. ``BaftConfig(weighting="constant", allocation="joint")`` is LoReFT: one map for the batch.
        requests: their number is a multiple of ``size``.
        size: requests a batch.

    Raises:
        ConfigError: the editor has edits, or the requests make no whole batches.
    """
    if editor.edits:
        raise ConfigError(f"the editor has {len(editor.edits)} edits; batches are measured from an unedited model")
    if size < 1 or not requests or len(requests) % size:
        raise ConfigError(f"{len(requests)} requests make no whole batches of {size}; give a multiple of the size")
    scores: list[LengthScore] = []
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        editor.edit(batch, progress=progress)
        for request in batch:
            prompts = [request.prompt, *(probe.prompt for probe in request.probes_of("rephrase"))]
            prompt_ids, target_ids = encode_pair(editor.tokenizer, request.prompt, request.target_new)
            hits = _teacher_forced(editor, [(prompt, request.target_new) for prompt in prompts])
            scores.append(LengthScore(request.id, len(prompt_ids), len(target_ids), hits[0], tuple(hits[1:])))
        for edit in editor.edits:
            editor.undo(edit.id)
    return BatchedEditing(size, tuple(scores))


@torch.no_grad()
def _teacher_forced(editor: BaftEditor, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Share of each target's tokens that are the edited model's argmax."""
    encoded = [encode_pair(editor.tokenizer, prompt, target) for prompt, target in pairs]
    ids, mask = pad_rows([p + t for p, t in encoded], pad_token_id(editor.tokenizer))
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, (p, t) in enumerate(encoded):
        labels[i, len(p) : len(p) + len(t)] = torch.tensor(t)
    device = next(editor.model.parameters()).device
    with editor.adapter.prompts([len(p) for p, _ in encoded]):
        logits = editor.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    right = logits[:, :-1].argmax(-1).cpu() == labels[:, 1:]  # an ignored label is no id, so never right
    return (right.sum(1) / (labels != IGNORE_INDEX).sum(1)).tolist()


# ------------------------------------------------------------------------------------------ helpers


def write_json(data: Any, path: str | Path) -> None:
    """Write a result (a dataclass, or mappings and lists of them), numbers to five significant digits."""
    text = json.dumps(to_plain(data), ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def to_plain(value: Any) -> Any:
    """A dataclass, or mappings and lists of them, as what JSON has; numbers to five significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _layer_of_edits(editor: BaftEditor) -> int:
    if not editor.edits:
        raise EditError("there is no edit to look at; make one first")
    return the_layer(editor)


def _nested(x: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x.tolist())
