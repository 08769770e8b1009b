"""The trade-off that binds every linear update, and measurements of how an edit compares with it.

**The inequality.** LoReFT's update ``u(h) = R^T ((A - R) h + b)`` is affine: ``u(h) = M h + v`` with ``M = R^T (A - R)``. Let
``h0`` be the edited input, ``mu`` and ``C`` mean and covariance of unrelated inputs Q, and ``S = E_P (p - h0)(p - h0)^T`` the
spread of the paraphrases P about it. For every ``k >= 0``, if ``K = C + k S`` is invertible,

    E_Q |u(x)|^2 + k E_P |u(p) - u(h0)|^2  >=  |u(h0)|^2 / (1 + m_k^2),        m_k^2 = (h0 - mu)^T K^-1 (h0 - mu).

*Proof.* As u is affine, ``u(h0) = e + M a`` with ``e = E_Q u`` and ``a = h0 - mu``; ``E_Q |u|^2 = |e|^2 + tr(M C M^T)``; and
``E_P |u(p) - u(h0)|^2 = tr(M S M^T)``. So the left side is ``|e|^2 + |M K^(1/2)|_F^2 = |B|_F^2`` for the matrix
``B = [e, M K^(1/2)]``, while ``u(h0) = B (1, K^(-1/2) a)``, hence ``|u(h0)|^2 <= |B|_F^2 (1 + m_k^2)``.

An update that is large at the edit and steady on its paraphrases therefore cannot be small on unrelated input, unless the
edit is far from it (a large Mahalanobis distance m). Input-aware weights make u non-affine, so the bound does not apply to
them. ``docs/theory/linear.md`` has two more statements, the case of equality, and what this means in practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.functional import update_bound
from ..core.positions import PositionRule
from ..editor.editor import BaftEditor
from ..errors import ConfigError, EditError
from ..gates import FactWeighting
from ..models.chat import chat_marks
from ..models.tokenization import encode_prompt
from ..runtime.adapter import BaftAdapter, Edit
from ..runtime.causal_gate import CausalGate
from ..runtime.edit_stack import WeightingStack
from ..runtime.representations import read_blocks
from .inspection import edit_network, let_read

_POINTS = 128  # points of a set kept for a picture


@dataclass(frozen=True)
class Readings:
    """Representations of inputs in the unedited model.

    Args:
        x: ``(n, d)`` at the edited block.
        rows: ids of each text.
        columns: the columns of each text that ``x`` holds.
        blocks: for a gate that reads tokens, what it reads of each text: ``layer -> (T, d)``; else empty.
    """

    x: Tensor
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    blocks: tuple[dict[int, Tensor], ...]


@dataclass(frozen=True)
class Tension:
    """One edit's update on its paraphrases and on unrelated input, relative to its size at the edit.

    Args:
        id: id of the edit.
        size: ``|u(h0)|``, in units of the residual stream.
        slope: ``|A - R|_2 / |u(h0)|``; without weights, ``u`` changes by at most this per unit of distance.
        paraphrases, unrelated: ``[(|x - h0|, |u(x)| / |u(h0)|)]``; at most 128 unrelated inputs, evenly spaced.
        drift: root mean square of ``|u(p) - u(h0)| / |u(h0)|`` over the paraphrases.
        leak: root mean square of ``|u(x)| / |u(h0)|`` over the unrelated inputs.
        least_leak: lower bound on the leak of any affine update with this drift, see :func:`least_leak`.
    """

    id: str
    size: float
    slope: float
    paraphrases: tuple[tuple[float, float], ...]
    unrelated: tuple[tuple[float, float], ...]
    drift: float
    leak: float
    least_leak: float


def read_texts(editor: BaftEditor, texts: Sequence[str], *, prefixes: bool = False) -> Readings:
    """Representations of texts where the edits of ``editor`` read them, with no edit acting.

    Args:
        editor: the editor; other editors of its model must be detached.
        texts: prompts.
        prefixes: use every beginning of a text as an input (the model is causal), except the first token, whose
            representation is that of any first token; leaves out texts of one token.

    Raises:
        ConfigError: no text is left.
    """
    rows = [encode_prompt(editor.tokenizer, text) for text in texts]
    if prefixes:
        rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(
            f"none of the {len(texts)} texts has {2 if prefixes else 1} tokens; give more, or longer ones"
        )
    columns = [list(range(1, len(row))) if prefixes else [len(row) - 1] for row in rows]
    return read_rows(editor, rows, columns)


def least_leak(edited: Tensor, unrelated: Tensor, paraphrases: Tensor, drift: float) -> float:
    """Lower bound on the leak of every affine update: root mean square of ``|u(x)| / |u(h0)|`` on unrelated input.

    ``max_k sqrt(1 / (1 + m_k^2) - k drift^2)``, the module's inequality solved for the leak. Every ``k`` gives a valid bound;
    this is the best one on a grid. It depends on the inputs alone, not on an update.

    Args:
        edited: ``h0 (d,)``.
        unrelated: ``(N, d)``.
        paraphrases: ``(n, d)``, n may be 0.
        drift: the allowed root mean square of ``|u(p) - u(h0)| / |u(h0)|`` over the paraphrases.

    Raises:
        ConfigError: the unrelated inputs do not span all d dimensions, so an affine update could be 0 on all of them.
    """
    x, h0 = unrelated.double(), edited.double()
    centred = (x - x.mean(0)) / len(x) ** 0.5
    factor, info = torch.linalg.cholesky_ex(centred.mT @ centred)
    if info > 0 or len(x) <= x.shape[1]:
        raise ConfigError(
            f"{len(x)} unrelated inputs do not span the {x.shape[1]} dimensions; give more texts, or longer ones"
        )
    away = torch.linalg.solve_triangular(factor, (h0 - x.mean(0))[:, None], upper=False)  # C^(-1/2) a
    spread = torch.linalg.solve_triangular(factor, (paraphrases.double() - h0).mT, upper=False)  # C^(-1/2) (p - h0)
    # K = C^(1/2) (I + k Z Z^T) C^(1/2)': with singular pairs (s, U) of Z, k shrinks the part of |away|^2 inside U
    directions, s, _ = torch.linalg.svd(spread / max(len(paraphrases), 1) ** 0.5, full_matrices=False)
    inside = (directions.mT @ away)[:, 0].square()  # (n,)
    outside = away.square().sum() - inside.sum()
    k = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 241)]).double()[:, None]  # (G, 1)
    distance = outside.clamp(min=0) + (inside / (1 + k * s.square())).sum(1)  # (G,)
    bound = 1 / (1 + distance) - k[:, 0] * drift**2
    return float(bound.max().clamp(min=0).sqrt())


@torch.no_grad()
def tension(editor: BaftEditor, edit_id: str, paraphrases: Sequence[str], unrelated: Readings) -> Tension:
    """Measure one edit's update at its prompt, on its paraphrases, and on unrelated input.

    Args:
        editor: an editor of one layer, with the default gate or one that acts at the last token.
        edit_id: id of an edit with one request.
        paraphrases: prompts that ask the same in other words, at least one.
        unrelated: from :func:`read_texts` with this editor.

    Raises:
        EditError: there is no such edit, or it changes nothing at its own prompt.
        ConfigError: the editor edits other tokens or layers, or there are no paraphrases or too few unrelated inputs.
    """
    layer = the_layer(editor)
    if not editor.config.reads_tokens and editor.config.rule != PositionRule.parse("last"):
        raise ConfigError(f"positions is {editor.config.positions!r}; the trade-off is measured at 'last'")
    if not paraphrases:
        raise ConfigError(f"edit {edit_id!r} comes without a paraphrase; give at least one")
    edit = next((edit for edit in editor.edits if edit.id == edit_id), None)
    if edit is None:
        raise EditError(f"no edit is called {edit_id!r}; there are {', '.join(repr(e.id) for e in editor.edits)}")
    own, near = read_texts(editor, [edit.requests[0].prompt]), read_texts(editor, paraphrases)
    at_edit, at_near, elsewhere = (edit_update(editor, edit, read) for read in (own, near, unrelated))
    size = float(torch.linalg.vector_norm(at_edit))
    if not size > 0:
        raise EditError(f"edit {edit_id!r} adds nothing at its own prompt; there is no update to compare with")
    tensors = edit.tensors[layer]
    slope, _ = update_bound(tensors["rotation"], tensors["source_weight"], tensors["source_bias"])
    drift = _rms(at_near - at_edit) / size

    def points(read: Readings, update: Tensor) -> tuple[tuple[float, float], ...]:
        some = torch.arange(0, len(read.x), max(1, -(-len(read.x) // _POINTS)))
        distance = torch.linalg.vector_norm(read.x[some] - own.x, dim=-1)
        relative = torch.linalg.vector_norm(update[some], dim=-1) / size
        return tuple(zip(distance.tolist(), relative.tolist(), strict=True))

    return Tension(
        edit_id,
        size,
        float(slope) / size,
        points(near, at_near),
        points(unrelated, elsewhere),
        drift,
        _rms(elsewhere) / size,
        least_leak(own.x[0], unrelated.x, near.x, drift),
    )


def edit_coordinates(editor: BaftEditor, edit: Edit, read: Readings, stages: Tensor | None = None) -> Tensor:
    """``w_k(h) (a_k^T h + b_k - r_k^T h)``, one edit's update along its bases, without other edits: ``(n, r)``.

    Args:
        editor: on one layer.
        edit: one of its edits.
        read: from :func:`read_texts` or :func:`read_rows`.
        stages: ``(n,)``, for the default gate: take its gate as open, after so many tokens of the answer; by default the gate
            decides.
    """
    tensors, weights = edit.tensors[the_layer(editor)], edit_weights(editor, edit, read, stages)
    return weights * (read.x @ (tensors["source_weight"] - tensors["rotation"]).mT + tensors["source_bias"])


def edit_weights(editor: BaftEditor, edit: Edit, read: Readings, stages: Tensor | None = None) -> Tensor:
    """``w (n, r)`` of one edit, without other edits; the arguments are those of :func:`edit_coordinates`."""
    network = edit_network(editor.adapter, the_layer(editor), edit)
    if not isinstance(network, FactWeighting):
        return network(read.x)
    if stages is not None:
        return network(read.x, stages)
    stages = _stages(editor.adapter, edit, read)
    return network(read.x, stages.clamp(min=0)) * (stages >= 0).unsqueeze(-1)


def edit_update(editor: BaftEditor, edit: Edit, read: Readings) -> Tensor:
    """``u(x) = Phi(x) - x`` of one edit, without other edits: ``(n, d)``."""
    return edit_coordinates(editor, edit, read) @ edit.tensors[the_layer(editor)]["rotation"]


def the_layer(editor: BaftEditor) -> int:
    """The edited block.

    Raises:
        ConfigError: there are several.
    """
    if len(editor.adapter.layers) != 1:
        raise ConfigError(f"the edits sit on layers {list(editor.adapter.layers)}; this is measured on one layer")
    return editor.adapter.layers[0]


def read_rows(editor: BaftEditor, rows: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]) -> Readings:
    """:func:`read_texts` for rows of ids at chosen columns."""
    adapter, layer = editor.adapter, the_layer(editor)
    ids = tuple(tuple(row)[: max(at) + 1] for row, at in zip(rows, columns, strict=True))
    every = [range(len(row)) for row in ids] if adapter.reads_tokens else columns
    with editor.enabled(False):
        found = read_blocks(editor.model, editor.tokenizer, ids, every, adapter.read_layers)
    at = tuple(map(tuple, columns))
    if not adapter.reads_tokens:
        return Readings(torch.cat(found[layer]), ids, at, ())
    x = torch.cat([each[list(own)] for each, own in zip(found[layer], at, strict=True)])
    return Readings(x, ids, at, tuple({n: found[n][i] for n in adapter.read_layers} for i in range(len(ids))))


def edit_gate(adapter: BaftAdapter, edit: Edit) -> CausalGate:
    """The gate of one edit alone, on the CPU."""
    network = adapter.network(adapter.layers[0])
    prefix = "weighting."
    tensors = edit.tensors[adapter.layers[0]]
    own = {n.removeprefix(prefix): t.unsqueeze(0) for n, t in tensors.items() if n.startswith(prefix)}
    return CausalGate(WeightingStack(network, own), adapter.tokenizer, chat_marks(adapter.tokenizer)[0], [edit])


def _stages(adapter: BaftAdapter, edit: Edit, read: Readings) -> Tensor:
    """``(n,)``: how many tokens of its answer the edit has said at each input; -1 where it does not act."""
    gate, found = edit_gate(adapter, edit), []
    for row, columns, blocks in zip(read.rows, read.columns, read.blocks, strict=True):
        stage = {a.column: a.stage for a in gate.decide(let_read(gate, adapter, row, blocks))}
        found += [stage.get(column, -1) for column in columns]
    return torch.tensor(found)


def _rms(x: Tensor) -> float:
    """Root mean square of the rows' lengths: ``(n, d)``."""
    return float(x.square().sum(-1).mean().sqrt())
