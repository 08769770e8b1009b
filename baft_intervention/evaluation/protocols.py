"""The four protocols: when edits are applied, and when their records are scored.

=========================  ==============================================================================================
``single``                 apply one edit (or one MQuAKE case), score it, remove it; then the next
``batched``                apply ``batch_size`` edits, score all, remove all; then the next batch
``sequential_immediate``   add one edit after another to the same model, and score each right after it is made
``sequential_final``       add one edit after another, and score the first ``T`` after ``T`` edits, for each checkpoint ``T``
                           in one pass and for all edits at the end
=========================  ==============================================================================================

(EasyEdit's ``sequential_edit`` meant the fourth until June 2026, and means the third since.)

Results go to ``records.jsonl`` group by group, times to ``timings.jsonl``. An interrupted run resumes: ``single`` and
``batched`` with the next group; the sequential protocols first *apply the earlier edits again* without scoring them, which
gives the same model because edits are deterministic.

Several processes divide a run into units, which go to the ranks in turn; rank 0 writes the files in the order of one
process. In ``single`` and ``batched`` a unit is a stage. In the sequential protocols it is a group of records to score, and
every rank makes all edits itself. A run may resume with another number of processes.

A failed edit is part of the result: its record has the reason under ``error``, and is scored on the model without the edit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..data.load import case_indices
from ..errors import BaftError, ConfigError, EditError
from ..models.chat import render_request
from ..requests import EditRequest
from ..runtime import distributed
from .edited import EditedModel
from .methods import Method
from .queries import Question, RecordQueries
from .record_metrics import record_metrics
from .records import RecordFile, dump_line
from .scoring import QueryScore, Scorer

logger = logging.getLogger(__name__)

ProtocolName = Literal["single", "batched", "sequential_immediate", "sequential_final"]
PROTOCOLS: tuple[str, ...] = get_args(ProtocolName)
DEFAULT_CHECKPOINTS = (1, 10, 100, 1000)
_GROUP = 16  # records that are scored together
_TURNS = 4  # units of each process between two writes: a kill loses at most these, and no rank waits long


@dataclass(frozen=True)
class Generation:
    """Which texts to generate after each edit.

    Args:
        answers: whether to generate answers to the edit's prompt, rephrases and multi-hop questions.
        margin: an answer is generated to the length of its longest alias plus this many tokens.
        max_new_tokens: upper limit of that length.
        fluency_tokens: length of the sampled text whose fluency is measured; 0 measures none.
        fluency_every: measure fluency on every n-th record only.
    """

    answers: bool = True
    margin: int = 4
    max_new_tokens: int = 64
    fluency_tokens: int = 32
    fluency_every: int = 1


@dataclass(frozen=True)
class ProtocolSettings:
    """A protocol and its settings.

    Args:
        name: one of :data:`PROTOCOLS`.
        batch_size: number of edits in a batch, for ``batched``.
        checkpoints: for ``sequential_final``; the number of all edits is always one too.
        seed: seed of sampled texts (the method has its own).
        generation: see :class:`Generation`.
    """

    name: ProtocolName = "single"
    batch_size: int = 10
    checkpoints: tuple[int, ...] = DEFAULT_CHECKPOINTS
    seed: int = 0
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise ConfigError(f"protocol is {self.name!r}; it must be one of {', '.join(PROTOCOLS)}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
        if any(t < 1 for t in self.checkpoints):
            raise ConfigError(f"checkpoints are {list(self.checkpoints)}; each must be at least 1")


@dataclass(frozen=True)
class Stage:
    """Edits that are applied one after another, and the records that are scored afterwards.

    Args:
        fresh: remove all earlier edits first.
        batches: indices of the requests of each call of ``apply``.
        asked: indices of the requests that are then scored.
        checkpoint: number of edits in the model, for ``sequential_final``.
    """

    fresh: bool
    batches: tuple[tuple[int, ...], ...]
    asked: tuple[int, ...]
    checkpoint: int | None = None


def stages_of(requests: Sequence[EditRequest], protocol: ProtocolSettings) -> list[Stage]:
    """The stages of a whole run, in order."""
    cases = case_indices(requests)
    if protocol.name in ("single", "sequential_immediate"):
        return [Stage(protocol.name == "single", (case,), case) for case in cases]
    if protocol.name == "batched":
        batches: list[list[int]] = [[]]
        for case in cases:
            if batches[-1] and len(batches[-1]) + len(case) > protocol.batch_size:
                batches.append([])
            batches[-1].extend(case)
        return [Stage(True, (tuple(b),), tuple(b)) for b in batches if b]
    stages, waiting, done = [], [], 0
    marks = sorted({t for t in protocol.checkpoints if t < len(requests)})
    for case in cases:
        waiting.append(case)
        done += len(case)
        if done == len(requests) or (marks and done >= marks[0]):
            stages.append(Stage(False, tuple(waiting), tuple(range(done)), done))
            waiting, marks = [], [t for t in marks if t > done]
    return stages


def run_protocol(
    scorer: Scorer,
    method: Method,
    requests: Sequence[EditRequest],
    protocol: ProtocolSettings,
    folder: str | Path,
    *,
    progress: bool = True,
) -> None:
    """Run a protocol, or resume it, and write the results to ``folder/records.jsonl``.

    Args:
        scorer: scorer of the base model, which must be unedited.
        method: the editing method.
        requests: the edits.
        protocol: the protocol and its settings.
        folder: folder of the results; files of an interrupted run with the same settings are continued.
        progress: show a bar with the time left.
    """
    requests = [render_request(scorer.tokenizer, request) for request in requests]
    stages = stages_of(requests, protocol)
    order = [[stage.checkpoint, i] for stage in stages for i in stage.asked]
    folder = Path(folder)
    with contextlib.ExitStack() as kept:
        files: list[RecordFile] = []  # one on rank 0, none on others

        def opened() -> int:
            file = RecordFile(folder / "records.jsonl", order, lambda r: [r.get("checkpoint"), r.get("index")])
            files.append(kept.enter_context(file))
            file.truncate(_whole_groups(stages, len(file)))
            return len(file)

        written = distributed.from_main(opened)
        if written < len(order):
            _Run(scorer, method, requests, protocol, folder).go(stages, files, written, progress)


@dataclass(frozen=True)
class _Unit:
    """Work of one rank: groups of records to score, after the stage's edits if ``apply`` is set."""

    stage: Stage
    groups: tuple[tuple[int, ...], ...]
    apply: bool

    @property
    def asked(self) -> list[int]:
        return [i for group in self.groups for i in group]


def _units(stages: Sequence[Stage], written: int) -> list[_Unit]:
    """The units that remain when ``written`` records are in the file."""
    units, seen = [], 0
    for stage in stages:
        left = []
        for group in _groups(stage):
            seen += len(group)
            left += [group] if seen > written else []
        if stage.fresh:
            units += [_Unit(stage, tuple(left), True)] if left else []
        else:  # the next stage needs the edits of this one even if its records are scored already
            units.append(_Unit(stage, tuple(left[:1]), True))
            units += [_Unit(stage, (group,), False) for group in left[1:]]
    return units


def _groups(stage: Stage) -> Iterator[tuple[int, ...]]:
    """Records of one stage that are scored and written together."""
    for start in range(0, len(stage.asked), _GROUP):
        yield stage.asked[start : start + _GROUP]


def _whole_groups(stages: Sequence[Stage], lines: int) -> int:
    """Number of lines in complete groups."""
    total = 0
    for stage in stages:
        for group in _groups(stage):
            if total + len(group) > lines:
                return total
            total += len(group)
    return total


class _Run:
    def __init__(
        self, scorer: Scorer, method: Method, requests: Sequence[EditRequest], protocol: ProtocolSettings, folder: Path
    ) -> None:
        self.scorer, self.method, self.requests, self.protocol, self.folder = scorer, method, requests, protocol, folder
        self.outcome: dict[int, dict[str, Any]] = {}
        self.times: list[dict[str, Any]] = []  # not written yet
        self.first = distributed.is_main()

    def go(self, stages: Sequence[Stage], files: Sequence[RecordFile], written: int, progress: bool) -> None:
        """Run the remaining units; ``files`` holds the record file on rank 0, and is empty on others."""
        from tqdm.auto import tqdm

        units = _units(stages, written)
        ranks = distributed.world_size()
        whose = {id(unit): n % ranks for n, unit in enumerate(u for u in units if u.groups)}
        own = {id(unit) for unit in units if whose.get(id(unit)) == distributed.rank()}
        begin = time.perf_counter()
        if not stages[0].fresh:  # the model is unedited only now
            self.scorer.prepare([self.requests[i] for i in sorted({i for u in units if id(u) in own for i in u.asked})])
        edited = self.method.attach(self.scorer.model, self.scorer.tokenizer)
        self._time(setup_seconds=time.perf_counter() - begin)
        bar = tqdm(
            total=sum(len(s.asked) for s in stages), initial=written, desc=f"{self.method.name} {self.protocol.name}",
            unit="record", disable=not progress or not distributed.is_main(), dynamic_ncols=True,
        )  # fmt: skip
        size = ranks * _TURNS if ranks > 1 else 1
        try:
            for first in range(0, len(units), size):
                turn = units[first : first + size]
                parts = distributed.gather(lambda turn=turn: self._turn(edited, turn, own))
                lines = {n: found for part, _ in parts for n, found in part.items()}
                done = [line for n in sorted(lines) for line in lines[n]]
                times = [values for _, part in parts for values in part]
                distributed.from_main(lambda done=done, times=times: self._write(files[0], done, times))
                bar.update(len(done))
        finally:
            bar.close()
            edited.restore()

    def _turn(self, edited: EditedModel, turn: Sequence[_Unit], own: set[int]) -> tuple[dict, list]:
        """``({number in the turn: lines}, times)`` of this rank."""
        found = {}
        with distributed.alone():  # each rank edits by itself
            for number, unit in enumerate(turn):
                mine = id(unit) in own
                if unit.apply and (mine or not unit.stage.fresh):
                    self._begin(edited, unit)
                if mine:
                    found[number] = [line for group in unit.groups for line in self._ask(edited, unit.stage, group)]
        times, self.times = self.times, []
        return found, times

    def _begin(self, edited: EditedModel, unit: _Unit) -> None:
        """Apply the edits of a unit's stage."""
        if unit.stage.fresh:
            edited.reset()
            self.outcome.clear()
            begin = time.perf_counter()
            self.scorer.prepare([self.requests[i] for i in unit.stage.asked])
            self._time(prior_seconds=time.perf_counter() - begin, records=len(unit.stage.asked))
        self._apply(edited, unit.stage, again=not unit.groups)

    def _write(self, file: RecordFile, lines: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> None:
        """Append records, and write times to their own file, since they differ from run to run."""
        file.append(lines)
        with open(self.folder / "timings.jsonl", "ab") as side:
            side.writelines(dump_line(values) for values in times)

    def _apply(self, edited: EditedModel, stage: Stage, *, again: bool) -> None:
        for batch in stage.batches:
            begin = time.perf_counter()
            try:
                cost = edited.apply([self.requests[i] for i in batch])
                outcome: dict[str, Any] = {"error": None, "steps": cost.steps, "final_loss": cost.final_loss}
                outcome |= {"trained_parameters": cost.trained_parameters, "adapter_bytes": cost.adapter_bytes}
            except BaftError as error:
                logger.warning("%s", error)
                outcome = {"error": f"{type(error).__name__}: {error}", "steps": 0, "final_loss": None}
                outcome |= {"trained_parameters": 0, "adapter_bytes": edited.cost.adapter_bytes}
            seconds = time.perf_counter() - begin
            if stage.fresh or self.first:  # what every rank does is counted once
                self._time(edit_seconds=seconds, edits=len(batch), again=again)
            self.outcome |= dict.fromkeys(batch, outcome)

    def _ask(self, edited: EditedModel, stage: Stage, group: Sequence[int]) -> list[dict[str, Any]]:
        requests = [self.requests[i] for i in group]
        records = [self.scorer.queries(r) for r in requests]
        begin = time.perf_counter()
        try:
            scores = self.scorer.score(edited, requests)
            middle = time.perf_counter()
            texts, samples = self._generate(edited, records, scores, group)
        except EditError as error:
            logger.warning("%s", error)
            return [self._line(stage, i, {}, [], {}, f"{type(error).__name__}: {error}") for i in group]
        self._time(score_seconds=middle - begin, generate_seconds=time.perf_counter() - middle, records=len(group))
        lines = []
        for k, i in enumerate(group):
            own = {p: texts[k, p] for p in [q.prompt for q in records[k].questions] if (k, p) in texts}
            metrics, probes = record_metrics(records[k], scores[k], own, samples.get(k))
            lines.append(self._line(stage, i, metrics, probes, own, self.outcome[i]["error"]))
        return lines

    def _line(self, stage: Stage, i: int, metrics: Any, probes: Any, texts: Any, error: str | None) -> dict[str, Any]:
        line = {
            "index": i,
            "id": self.requests[i].id,
            "checkpoint": stage.checkpoint,
            "metrics": metrics,
            "probes": probes,
        }
        return line | {"generated": texts} | self.outcome[i] | {"error": error}

    def _generate(
        self,
        edited: EditedModel,
        records: Sequence[RecordQueries],
        scores: Sequence[Sequence[QueryScore]],
        group: Sequence[int],
    ) -> tuple[dict[tuple[int, str], str], dict[int, str]]:
        """Answers by (index in the group, prompt), and sampled texts by index, all generated in one batch."""
        settings = self.protocol.generation
        jobs: list[tuple[int, str | None, str, int, list[int], torch.Generator | None]] = []
        for k, (record, found) in enumerate(zip(records, scores, strict=True)):
            asked: set[str] = set()
            for question in record.questions if settings.answers else ():
                if question.prompt in asked or not _is_generated(question):
                    continue
                asked.add(question.prompt)
                limit = min(settings.max_new_tokens, settings.margin + self._longest(question.answers))
                jobs.append((k, question.prompt, question.prompt, limit, _known(found[question.wanted[0]]), None))
            if settings.fluency_tokens and group[k] % settings.fluency_every == 0:
                sampler = _sampler(self.protocol.seed, record.request.id)
                jobs.append((k, None, record.request.prompt, settings.fluency_tokens, [], sampler))
        if not jobs:
            return {}, {}
        texts = edited.generate(
            [j[2] for j in jobs], [j[3] for j in jobs], known=[j[4] for j in jobs], samplers=[j[5] for j in jobs],
            reader=self.scorer.reader,
        )  # fmt: skip
        answers = {(j[0], j[1]): t for j, t in zip(jobs, texts, strict=True) if j[1] is not None}
        samples = {j[0]: t for j, t in zip(jobs, texts, strict=True) if j[1] is None}
        return answers, samples

    def _longest(self, answers: Sequence[str]) -> int:
        return max(len(self.scorer.tokenizer(" " + a, add_special_tokens=False)["input_ids"]) for a in answers)

    def _time(self, **values: Any) -> None:
        self.times.append(values)


def _is_generated(question: Question) -> bool:
    if not question.answers or not question.wanted:
        return False
    return question.kind in ("edit", "rephrase") or question.group == "multi_hop"


def _known(score: QueryScore) -> list[int]:
    """The beginning of the greedy answer that teacher forcing shows: up to and including the first token off the target."""
    known = []
    for predicted, target in zip(score.predicted, score.query.target_ids, strict=True):
        known.append(predicted)
        if predicted != target:
            break
    return known


def _sampler(seed: int, name: str) -> torch.Generator:
    key = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") % 2**63)
