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

    def all_memory(self) -> Tensor:
        """``(B, C, heads + m + width)`` of cached and new tokens."""
        assert self.memory is not None
        if self.before is None:
            return self.memory
        return torch.cat([self.before.tensors[_MEMORY].to(self.memory), self.memory], 1)

    def state(self) -> TokenState | None:
        """What later calls need of all tokens so far; None for a call that ended before it was read."""
        if self.memory is None:
            return None
        return TokenState(self.ids, {_MEMORY: self.all_memory().detach()}, self.fires)


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
            ] = {}  # the mention before, in case the next token goes on with the word
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

    def relations(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """``z (N, k)``, ``s (N,)`` and ``log q (N, W)`` of the candidates, see :meth:`RelationEncoder.forward`."""
        assert reading.glances is not None
        rows = torch.tensor([c.row for c in reading.candidates])
        columns = torch.tensor([c.column for c in reading.candidates]) + reading.past
        where, age, seen = reading.window(rows, columns)
        memory = reading.all_memory()
        found = []
        for piece in torch.arange(len(rows)).split(_AT_ONCE):
            at = rows[piece].unsqueeze(1).to(memory.device), where[piece].to(memory.device)
            glance = reading.glances[piece.to(memory.device)]
            found.append(self.encoder(glance, memory[at], age[piece].to(memory), seen[piece].to(memory.device)))
        z, begins, asked = (torch.cat(parts) for parts in zip(*found, strict=True))
        return z, begins, asked

    def decide(self, reading: Reading) -> list[Action]:
        """Where edits act among the call's tokens."""
        opened: dict[tuple[int, int], tuple[str, float]] = {}
        if reading.candidates:
            opened = self._opened(reading, *self.relations(reading))
        return self._actions(reading, opened)

    def _opened(
        self, reading: Reading, z: Tensor, begins: Tensor, asked: Tensor
    ) -> dict[tuple[int, int], tuple[str, float]]:
        """``(row, place) -> (edit, score)``: the open gate of the largest score at each candidate that has one."""
        keys, thresholds = self.weighting.state["key"], self.weighting.state["threshold"]
        tokens, edits, spans = [], [], []
        for i, candidate in enumerate(reading.candidates):
            for edit, (first, last) in candidate.named.items():
                tokens.append(i)
                edits.append(self._places[edit])
                spans.append((candidate.place - last, candidate.place - first))
        best: dict[tuple[int, int], tuple[str, float]] = {}
        names = list(self._places)

        def offer(token: int, edit: int, score: float) -> None:
            candidate = reading.candidates[token]
            place = (candidate.row, candidate.place)
            if place not in best or score > best[place][1]:
                best[place] = (names[edit], score)

        if tokens:
            t, e = torch.tensor(tokens, device=z.device), torch.tensor(edits, device=z.device)
            scores = (z[t] * keys[e]).sum(-1) - thresholds[e]
            ages = torch.arange(asked.shape[1])
            near = torch.tensor([s[0] for s in spans]).unsqueeze(1)
            far = torch.tensor([s[1] for s in spans]).unsqueeze(1)
            inside = ((ages >= near) & (ages <= far)).to(z.device)  # (pairs, W)
            place = asked[t].masked_fill(~inside, -torch.inf).logsumexp(-1)
            first = torch.tensor([reading.candidates[i].place == s[0] for i, s in zip(tokens, spans, strict=True)])
            place = place.masked_fill(first.to(z.device), 0.0)  # the encoder does not see a text's first token
            scores = torch.where((place > _ASKED) & (begins >= self.encoder.least)[t], scores, -1.0)
            for pair, score in enumerate(scores.tolist()):
                if score > 0:
                    offer(tokens[pair], edits[pair], score)
        if self._everywhere:
            index = torch.tensor([self._places[edit] for edit in self._everywhere], device=z.device)
            scores, winner = (z @ keys[index].mT - thresholds[index]).max(-1)
            scores = torch.where(begins >= self.encoder.least, scores, -1.0)
            for token, (score, edit) in enumerate(zip(scores.tolist(), index[winner].tolist(), strict=True)):
                if score > 0:
                    offer(token, edit, score)
        return best

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
        """For each candidate ``edit -> (z . key, asked, begins, open)``, for people; :meth:`decide` works it out faster.

        ``asked`` is the probability that the text asks about the edit's subject, 1 for an edit without one; ``begins`` says whether
        an answer begins there at all, and ``open`` whether the gate is open.
        """
        if not reading.candidates:
            return []
        z, slots, places = (tensor.float().cpu() for tensor in self.relations(reading))
        begins = (slots >= float(self.encoder.least)).tolist()
        keys, thresholds = (self.weighting.state[name].cpu() for name in ("key", "threshold"))
        found = []
        for i, candidate in enumerate(reading.candidates):
            spans: dict[str, tuple[int, int] | None] = {**dict.fromkeys(self._everywhere), **candidate.named}
            own: dict[str, tuple[float, float, bool, bool]] = {}
            for edit, span in spans.items():
                index, log_asked = self._places[edit], 0.0
                if span is not None:
                    ages = slice(candidate.place - span[1], candidate.place - span[0] + 1)
                    log_asked = float(places[i, ages].logsumexp(-1)) if span[1] else 0.0
                cosine = float(z[i] @ keys[index])
                fits = cosine > float(thresholds[index]) and log_asked > _ASKED
                own[edit] = cosine, math.exp(log_asked), begins[i], fits and begins[i]
            found.append(own)
        return found


def _subjects(edit: Edit) -> list[str]:
    """The edit's subjects; none if one of its requests has none."""
    subjects = [request.subject for request in edit.requests]
    return [s for s in subjects if s] if all(subjects) else []
