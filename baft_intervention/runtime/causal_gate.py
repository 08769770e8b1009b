"""The gate at every token: which edit acts where, decided from a token and those before it alone.

An edit acts at a token if its subject has been named, the text is about to state its relation of this subject, and the edit has
not just said its answer. From there it also acts on the tokens of its own answer, as long as the text says that answer. Nothing
depends on padding, batch, cache or chunking, nor on whether a token was given or generated: what is needed of earlier tokens is
kept with the sequence (:mod:`.token_state`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PositionError
from ..gates import FactWeighting, RelationEncoder
from ..gates.relation_encoder import WINDOW
from ..models.tokenization import answer_spellings
from .edit import Edit
from .edit_stack import WeightingStack
from .subject_index import SubjectIndex
from .token_state import PADDING, TokenState

_MEMORY = "memory"
_AT_ONCE = 1024  # tokens encoded at a time, which bounds the memory that a long prompt takes
_ASKED = math.log(0.1)  # least log q of a subject's token


@dataclass(frozen=True)
class Action:
    """An edit acts at a token.

    Args:
        row, column: of the call's hidden states.
        edit, index: its id, and its place among the adapter's edits.
        stage: 0 where the answer begins, n behind its n-th token.
        score: by how much the threshold was passed; NaN on the answer's own tokens.
    """

    row: int
    column: int
    edit: str
    index: int
    stage: int
    score: float


@dataclass(frozen=True)
class Candidate:
    """A token at which the subjects of some edits have been named.

    Args:
        row, column: of the call's hidden states.
        place: its number among the row's tokens.
        named: edit -> places of the first and last token of its subject's latest mention.
    """

    row: int
    column: int
    place: int
    named: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _Named:
    """Pairs of a candidate and an edit whose subject is named there.

    Args:
        tokens, edits: each pair's candidate, by its number, and edit.
        cosines, thresholds, log_asked: ``(n,)`` ``z . key``, what it must exceed, and how likely the subject is asked about.
    """

    tokens: list[int]
    edits: list[str]
    cosines: Tensor
    thresholds: Tensor
    log_asked: Tensor

    @property
    def asked(self) -> Tensor:
        """``(n,)`` bool: whether the text asks about the subject."""
        return self.log_asked > _ASKED


class Reading:
    """What the gate has read of one call, beside what is kept of the tokens before it.

    Args:
        ids: ``(B, T)`` on the CPU, ``PADDING`` where a column holds no token.
        before: the state of the cached tokens; None if there are none.
    """

    def __init__(self, ids: Tensor, before: TokenState | None):
        self.new, self.before = ids, before
        self.past = 0 if before is None else before.width
        self.ids = ids if before is None else torch.cat([before.ids, ids], 1)
        self._state: TokenState | None = None  # once all pooled blocks have been read
        self._encoded: tuple[Tensor, Tensor, Tensor] | None = None
        valid = self.ids != PADDING
        self._order = (~valid).int().argsort(dim=1, stable=True)  # the columns of each row that hold tokens, in front
        self._count = valid.cumsum(1)  # (B, C) how many tokens up to each column
        self.fires = [list(own) for own in before.fires] if before is not None else [[] for _ in range(len(ids))]
        self.candidates: list[Candidate] = []
        self.memory: Tensor | None = None  # (B, T, heads + m + width), summed over the pooled blocks so far
        self.glances: Tensor | None = None  # (N, k + 1 + m) of the candidates, summed over the late blocks so far
        self.actions: list[Action] | None = None  # once decided

    def row(self, number: int) -> tuple[list[int], list[int], int]:
        """``(ids, columns, cached)`` of a row's tokens; the first ``cached`` of them are in the cache."""
        columns = self._order[number, : int(self._count[number, -1])]
        cached = int(self._count[number, self.past - 1]) if self.past else 0
        return self.ids[number, columns].tolist(), columns.tolist(), cached

    def window(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(columns, age, seen)``, ``(N, WINDOW)`` each: the tokens up to each of ``(rows, columns)``, the nearest first."""
        age = torch.arange(min(WINDOW, self.ids.shape[1]))
        place = self._count[rows, columns].unsqueeze(1) - 1 - age  # (N, W)
        return self._order[rows.unsqueeze(1), place.clamp(min=0)], age.float().expand_as(place), place > 0

    def state(self) -> TokenState | None:
        """What later calls need of all tokens so far; None for a call that ended before it was read.

        It must not be asked for before the last pooled block has been read.
        """
        if self._state is None and self.memory is not None:
            new = TokenState(self.new, {_MEMORY: self.memory.detach()}, ())
            self._state = new if self.before is None else self.before.joined(new)
        if self._state is not None:
            self._state.fires = self.fires
        return self._state

    def encoded(self, encoder: RelationEncoder) -> tuple[Tensor, Tensor, Tensor]:
        """``z (N, k)``, ``s (N,)`` and ``log q (N, W)`` of the N candidates, see :meth:`RelationEncoder.forward`."""
        if self._encoded is None:
            state = self.state()
            assert state is not None
            assert self.glances is not None
            memory = state.tensors[_MEMORY]
            rows = torch.tensor([c.row for c in self.candidates])
            where, age, seen = self.window(rows, torch.tensor([c.column for c in self.candidates]) + self.past)
            found = []
            for piece in torch.arange(len(rows)).split(_AT_ONCE):
                at = rows[piece].unsqueeze(1).to(memory.device), where[piece].to(memory.device)
                glance = self.glances[piece.to(memory.device)]
                found.append(encoder(glance, memory[at], age[piece].to(memory), seen[piece].to(memory.device)))
            z, begins, asked = (torch.cat(parts) for parts in zip(*found, strict=True))
            self._encoded = z, begins, asked
        return self._encoded


class CausalGate:
    """Decides which edits act at which tokens.

    Args:
        weighting: the edits' gates, stacked, with the encoder that they share.
        tokenizer: finds subjects and spells answers.
        header: ids between a user's message and the answer in the tokenizer's chat template; empty without one.
        edits: the edits, in the order of the stack.
    """

    def __init__(self, weighting: WeightingStack, tokenizer: Any, header: Sequence[int], edits: Iterable[Edit] = ()):
        self.weighting, self.tokenizer, self.header = weighting, tokenizer, tuple(header)
        assert isinstance(weighting.network, FactWeighting)
        self.encoder: RelationEncoder = weighting.network.encoder
        self._index = SubjectIndex(tokenizer)
        self._everywhere: dict[str, None] = {}  # edits without a subject, which are asked at every token
        self._answers: dict[str, tuple[tuple[int, ...], ...]] = {}  # edit -> spellings of its targets
        self._places: dict[str, int] = {}  # edit -> its place in the stack
        for edit in edits:
            self.add(edit)

    def add(self, edit: Edit) -> None:
        if subjects := _subjects(edit):
            self._index.add(edit.id, subjects)
        else:
            self._everywhere[edit.id] = None
        spellings = [ids for r in edit.requests for ids in answer_spellings(self.tokenizer, r.target_new)]
        self._answers[edit.id] = tuple(dict.fromkeys(spellings))
        self._places[edit.id] = len(self._places)

    def remove(self, edit: Edit) -> None:
        if subjects := _subjects(edit):
            self._index.remove(edit.id, subjects)
        else:
            del self._everywhere[edit.id]
        del self._answers[edit.id], self._places[edit.id]
        self._places = {name: i for i, name in enumerate(self._places)}

    def begin(self, ids: Tensor | None, before: TokenState | None) -> Reading:
        """Start reading a call, and find the tokens at which edits may act.

        Raises:
            PositionError: the call has embeddings in place of token ids.
        """
        if ids is None:
            raise PositionError(
                "the model was called with inputs_embeds, but the edits find their subjects in token ids; call it with "
                "input_ids, or inside editor.enabled(False)"
            )
        reading = Reading(ids, before)
        for row in range(len(ids)):
            tokens, columns, cached = reading.row(row)
            begin = max(0, cached - WINDOW)  # what was named before is out of reach
            named: dict[str, tuple[int, int]] = {}
            earlier: dict[
                str, tuple[int, int] | None
            ] = {}  # the mention before: the next token may go on with the word
            mentions = self._index.mentions(tokens, begin) if self._index else []
            coming = 0
            for place in range(begin, len(tokens)):
                ended = [edit for edit, span in named.items() if span[1] == place - 1]
                if ended and self._index.continues(tokens[place]):
                    for edit in ended:
                        if (span := earlier[edit]) is None:
                            del named[edit]
                        else:
                            named[edit] = span
                while coming < len(mentions) and mentions[coming][1] == place:
                    first, last, edit = mentions[coming]
                    if edit not in named or named[edit][1] < place:
                        earlier[edit] = named.get(edit)
                    named[edit] = (first, last)
                    coming += 1
                if place < cached or not (named or self._everywhere):
                    continue
                near = {edit: span for edit, span in named.items() if place - span[1] < WINDOW}
                if near or self._everywhere:
                    reading.candidates.append(Candidate(row, columns[place] - reading.past, place, near))
        return reading

    def read(self, reading: Reading, number: int, hidden: Tensor) -> None:
        """Take in the output ``hidden (B, T, d)`` of block ``number`` of those that the encoder reads."""
        encoder = self.encoder
        if number < encoder.pooled:
            part = encoder.memory(number, encoder.standardised(number, hidden))
            reading.memory = part if reading.memory is None else reading.memory + part
        elif reading.candidates:
            rows, columns = [c.row for c in reading.candidates], [c.column for c in reading.candidates]
            part = encoder.glance(number, encoder.standardised(number, hidden[rows, columns]))
            reading.glances = part if reading.glances is None else reading.glances + part

    def decide(self, reading: Reading) -> list[Action]:
        """Where edits act among the call's tokens."""
        opened: dict[tuple[int, int], tuple[str, float]] = {}
        if reading.candidates:
            opened = self._opened(reading)
        return self._actions(reading, opened)

    def _opened(self, reading: Reading) -> dict[tuple[int, int], tuple[str, float]]:
        """``(row, place) -> (edit, score)``: the open gate of the largest score at each candidate that has one."""
        best: dict[tuple[int, int], tuple[str, float]] = {}

        def offer(token: int, edit: str, score: float) -> None:
            place = reading.candidates[token].row, reading.candidates[token].place
            if score > 0 and (place not in best or score > best[place][1]):
                best[place] = edit, score

        z, slots, _ = reading.encoded(self.encoder)
        begins = slots >= self.encoder.least
        named = self._named(reading)
        if named.tokens:
            scores = torch.where(named.asked & begins[named.tokens], named.cosines - named.thresholds, -1.0)
            for token, edit, score in zip(named.tokens, named.edits, scores.tolist(), strict=True):
                offer(token, edit, score)
        if self._everywhere:
            edits = list(self._everywhere)
            keys, thresholds = self._keys(edits)
            scores, winner = (z @ keys.mT - thresholds).max(-1)
            scores = torch.where(begins, scores, -1.0)
            for token, (score, edit) in enumerate(zip(scores.tolist(), winner.tolist(), strict=True)):
                offer(token, edits[edit], score)
        return best

    def _keys(self, edits: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Keys ``(n, k)`` and thresholds ``(n,)`` of edits."""
        keys = self.weighting.state["key"]
        index = torch.tensor([self._places[edit] for edit in edits], dtype=torch.long, device=keys.device)
        return keys[index], self.weighting.state["threshold"][index]

    def _named(self, reading: Reading) -> _Named:
        """Every candidate with every edit whose subject is named there."""
        pairs = [(i, edit, span) for i, c in enumerate(reading.candidates) for edit, span in c.named.items()]
        tokens, edits = [token for token, _, _ in pairs], [edit for _, edit, _ in pairs]
        z, _, places = reading.encoded(self.encoder)
        keys, thresholds = self._keys(edits)
        ages = torch.arange(places.shape[1])
        here = torch.tensor([reading.candidates[token].place for token in tokens], dtype=torch.long)
        first, last = (torch.tensor([span[n] for _, _, span in pairs], dtype=torch.long) for n in (0, 1))
        inside = (ages >= (here - last).unsqueeze(1)) & (ages <= (here - first).unsqueeze(1))  # (pairs, W)
        log_asked = places[tokens].masked_fill(~inside.to(z.device), -torch.inf).logsumexp(-1)
        log_asked = log_asked.masked_fill(
            (last == 0).to(z.device), 0.0
        )  # the encoder does not see a text's first token
        return _Named(tokens, edits, (z[tokens] * keys).sum(-1), thresholds, log_asked)

    def _actions(self, reading: Reading, opened: dict[tuple[int, int], tuple[str, float]]) -> list[Action]:
        found: list[Action] = []
        rows = {row for row, _ in opened} | {row for row, fires in enumerate(reading.fires) if fires}
        for row in sorted(rows):
            ids, columns, cached = reading.row(row)
            active: tuple[str, int] | None = None  # the edit whose answer is under way, and where it began
            if reading.fires[row]:
                column, edit = reading.fires[row][-1]
                active = (edit, columns.index(column)) if edit in self._answers else None
            for place in range(cached, len(ids)):
                column = columns[place]
                if active is not None:
                    edit, begun = active
                    stage, ended = self._stage(edit, ids, begun, place)
                    if stage:
                        index = self._places[edit]
                        found.append(Action(row, column - reading.past, edit, index, stage, math.nan))
                        continue
                    active = None
                    if ended:  # not right behind its own answer
                        continue
                if (row, place) in opened:
                    edit, score = opened[row, place]
                    active = (edit, place)
                    reading.fires[row].append((column, edit))
                    found.append(Action(row, column - reading.past, edit, self._places[edit], 0, score))
        return found

    def _stage(self, edit: str, ids: Sequence[int], begun: int, place: int) -> tuple[int, bool]:
        """``(stage, ended)``: how many tokens of its answer an edit has said, if it acts there; whether it said the whole.

        In chat it acts on the answer's last token too, for it has been taught to end its turn there.
        """
        said, ended = tuple(ids[begun + 1 : place + 1]), False
        for answer in self._answers[edit]:
            if said == answer[: len(said)]:
                if len(said) < len(answer):
                    return len(said), False
                ended = True
        if ended and self.header and tuple(ids[max(0, begun + 1 - len(self.header)) : begun + 1]) == self.header:
            return len(said), True
        return 0, ended

    def explain(self, reading: Reading) -> list[dict[str, tuple[float, float, bool, bool]]]:
        """For each candidate ``edit -> (z . key, asked, begins, open)``, for people.

        ``asked`` is the probability that the text asks about the edit's subject, 1 for an edit without one; ``begins`` says whether
        an answer begins there at all, and ``open`` whether the gate is open.
        """
        found: list[dict[str, tuple[float, float, bool, bool]]] = [{} for _ in reading.candidates]
        if not found:
            return found
        z, slots, _ = reading.encoded(self.encoder)
        begins = (slots >= self.encoder.least).tolist()
        if self._everywhere:
            keys, thresholds = self._keys(list(self._everywhere))
            for i, cosines in enumerate((z @ keys.mT).tolist()):
                for edit, cosine, threshold in zip(self._everywhere, cosines, thresholds.tolist(), strict=True):
                    found[i][edit] = cosine, 1.0, begins[i], cosine > threshold and begins[i]
        named = self._named(reading)
        values = (named.cosines, named.log_asked.exp(), named.asked & (named.cosines > named.thresholds))
        for i, edit, cosine, asked, fits in zip(named.tokens, named.edits, *(v.tolist() for v in values), strict=True):
            found[i][edit] = cosine, asked, begins[i], fits and begins[i]
        return found


def _subjects(edit: Edit) -> list[str]:
    """The edit's subjects; none if one of its requests has none."""
    subjects = [request.subject for request in edit.requests]
    return [s for s in subjects if s] if all(subjects) else []
