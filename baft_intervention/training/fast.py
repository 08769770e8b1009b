"""The fast engine: an edit for what it must cost, and many edits in one batch.

Of a step of the reference only that is done which can differ from the last one (see :mod:`.suffix`): the blocks above
the lowest edited one, at the columns from the first edited token on, forward and backward to the activations; the
logits at target tokens only (see :mod:`.head`). Since nothing of the model is trained, E edits are E groups of rows of
one batch, whose maps are stacked tensors with a loss, a clipping and an optimiser state each (see :mod:`.stacked`). An
edit that reaches its loss leaves the batch.

No shortcut is taken on trust. Before the first step the engine disturbs a hidden state at random and compares the loss
of its own path with the model's; what does not agree is not used, the log says why, and the next slower way is tried:
the blocks alone (:class:`.suffix.Replay`), the model with its lower blocks skipped (:class:`.suffix.Through`), and last
:class:`.engine.ReferenceEngine`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import BaftConfig
from ..core.basis_map import BasisWeightedMap
from ..errors import BaftError, EditError
from ..models.structure import find_blocks
from ..models.tokenization import IGNORE_INDEX, pad_token_id
from ..runtime.block_stubs import Unsafe, foreign_hooks
from ..runtime.call_state import hook_block
from ..runtime.distributed import DataParallel
from ..runtime.edit_stack import is_shared
from ..runtime.output_head import Head
from ..runtime.partial_forward import Reading, Replay, Suffix, Through, read, tolerance, used_width
from .batch import Batch, Results
from .engine import Job, ReferenceEngine, Row, TrainedEdit, TrainingContext, frozen, watching
from .memory import edit_bytes, free_bytes, out_of_memory
from .stacked import signature

logger = logging.getLogger(__name__)

_WAYS = ("replay", "through", "reference")
_MOST = {"cpu": 32, "cuda": 256}  # a CPU's cores are busy by then, and its caches full
_WINDOW = 4  # stacks that are sorted together: so many results wait for their turn at most
_MEMORY_SHARE = 0.5  # of what is free


class FastEngine:
    """Trains edits in stacks; see the module.

    Args:
        model, tokenizer: the base model; its weights, flags and hooks come back as they were.
        config: settings.
        layers: resolved block numbers.
        most: most edits in a stack; by default as many as fit, up to 32 on a CPU and 256 on a GPU.
        strict: raise where a shortcut cannot be taken, in place of taking a slower way.

    Attributes:
        way: ``replay``, ``through`` or ``reference``: how the last stack was trained; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: BaftConfig,
        layers: Sequence[int],
        *,
        most: int | None = None,
        strict: bool = False,
    ):
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; stand-ins would break its guards
        self.model, self.tokenizer, self.config, self.layers = model, tokenizer, config, tuple(sorted(layers))
        self.blocks = find_blocks(model)
        self.device = next(model.parameters()).device
        self.most = most or _MOST.get(self.device.type, 32)
        self.strict = strict
        self.way: str | None = None
        self._from = 0  # the first of _WAYS that has not failed
        self._trusted: set[tuple] = set()  # kinds of batches that were compared with the model
        self._head: Head | None = None
        self._reference = ReferenceEngine(model, tokenizer, config, self.layers)

    # ------------------------------------------------------------------------------------------ many edits

    def train_many(self, jobs: Sequence[Job], context: TrainingContext) -> Iterator[TrainedEdit]:
        """Train independent jobs in stacks of similar length and yield their results in order.

        Raises:
            EditError: a loss that is not finite, at the job's turn.
        """
        begin = turn = 0
        while begin < len(jobs):
            size = self._stack_size(jobs[begin:])
            window = range(begin, min(begin + _WINDOW * size, len(jobs)))
            waiting: Results = {}
            stacks = self._stacks(jobs, window, size)
            while stacks:
                stack = stacks.pop(0)
                try:
                    self._train_stack({i: jobs[i] for i in stack}, context, waiting)
                except Exception as error:
                    if not out_of_memory(error) or len(stack) == 1:
                        raise
                    error.__traceback__ = None  # its frames would keep the tensors of the failed stack
                    half = len(stack) // 2
                    self.most = min(self.most, half)
                    logger.warning("memory ran out with %d edits in a stack; going on with %d", len(stack), half)
                    left = [i for i in stack if i not in waiting]
                    stacks = [part for old in (left, *stacks) for part in _cut(old, half)]
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                while turn in waiting:
                    result = waiting.pop(turn)
                    if isinstance(result, EditError):
                        raise result
                    yield result
                    turn += 1
            begin = window.stop

    def train(self, job: Job, context: TrainingContext) -> TrainedEdit:
        """Train one edit."""
        return next(self.train_many([job], context))

    def train_data_parallel(self, job: Job, context: TrainingContext) -> TrainedEdit:
        """Train one edit on all ranks of the process group at once; every rank gets the same result.

        Raises:
            EditError: a loss that is not finite, or another rank that failed.
        """
        data_parallel, rows = DataParallel.of(job.rows)
        results: Results = {}
        self._train_stack({0: dataclasses.replace(job, rows=tuple(rows))}, context, results, data_parallel)
        if isinstance(results[0], EditError):
            raise results[0]
        return results[0]

    def _stack_size(self, jobs: Sequence[Job]) -> int:
        """Edits of the size of the largest of ``jobs`` that fit into half of the free memory, at least one."""
        largest = max(jobs[: _WINDOW * self.most], key=lambda job: sum(len(row.ids) for row in job.rows))
        numbers = sum(p.numel() for m in largest.maps.values() for p in m.parameters() if p.requires_grad)
        each = edit_bytes(self.model, largest.rows, len(self.blocks) - 1 - self.layers[0], numbers)
        return int(max(1, min(self.most, _MEMORY_SHARE * free_bytes(self.device) // each)))

    def _stacks(self, jobs: Sequence[Job], window: range, size: int) -> list[list[int]]:
        groups: dict[tuple, list[int]] = {}
        for i in window:
            groups.setdefault(signature(jobs[i].maps), []).append(i)
        stacks = []
        for group in groups.values():
            group.sort(key=lambda i: _extent(jobs[i]))
            stacks += _cut(group, size)
        return stacks

    # ------------------------------------------------------------------------------------------ one stack

    def _train_stack(
        self,
        jobs: Mapping[int, Job],
        context: TrainingContext,
        results: Results,
        data_parallel: DataParallel | None = None,
    ) -> None:
        """Train ``jobs``, by their numbers, and enter what comes of each in ``results``."""
        begin = time.perf_counter()
        with frozen(self.model):
            suffix = None
            if all(stackable(job.maps) for job in jobs.values()):
                with watching(data_parallel):
                    suffix = self.prepare([row for job in jobs.values() for row in job.rows])
            if data_parallel is not None and not data_parallel.all(suffix is not None):
                suffix = None  # what one rank cannot do, none does
            if suffix is not None:
                try:
                    spent = time.perf_counter() - begin
                    batch = Batch(
                        jobs, suffix, self.config, self.layers, context, spent=spent, data_parallel=data_parallel
                    )
                    while batch.active:
                        results.update(batch.step())
                except Exception as error:
                    if out_of_memory(error) or isinstance(error, BaftError) or self.strict:
                        raise
                    self._note("a weighting network or an earlier edit cannot be stacked", error)
                    self.way = "reference"
        for i, job in jobs.items():
            if i not in results:
                try:
                    results[i] = self._reference.train(job, context, data_parallel)
                except EditError as error:
                    results[i] = error

    # ------------------------------------------------------------------------------------------ which way

    def prepare(self, rows: Sequence[Row]) -> Suffix | None:
        """The fastest way that holds for ``rows``; None for the reference."""
        for number in range(self._from, 2):
            try:
                suffix = self._replay(rows) if number == 0 else self._through(rows)
                self._compare(suffix, _WAYS[number])
            except Exception as error:
                if out_of_memory(error) or (self.strict and number == 0):
                    raise
                self._note(("its blocks are not run alone", "its lower blocks are not skipped")[number], error)
                self._from = number + 1
            else:
                self.way = _WAYS[number]
                return suffix
        self.way = "reference"
        return None

    def _note(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s (%s: %s)", type(self.model).__name__, what, type(error).__name__, error)

    def _replay(self, rows: Sequence[Row]) -> Replay:
        module = foreign_hooks(self.model, self.blocks, self.layers[0])
        if module is not None:
            raise Unsafe(f"{module} carries a hook that expects whole rows")
        reading = self._read(rows)
        if reading.changed is not None:
            raise Unsafe(f"a hook changes the output of block {reading.changed}; disable the other adapter")
        if self._head is None:
            self._head = Head(self.model, self.blocks, reading.extras, reading.last[0])
        return Replay(self.model, self.blocks, self._head, reading, rows)

    def _through(self, rows: Sequence[Row]) -> Through:
        return Through(self.model, self.blocks, self._read(rows), rows)

    def _read(self, rows: Sequence[Row]) -> Reading:
        return read(self.model, self.blocks, rows, self.layers[0], pad_token_id(self.tokenizer))

    @torch.no_grad()
    def _compare(self, suffix: Suffix, way: str) -> None:
        """Once for each kind of batch: that a disturbance at an edited position does to the loss what it does in the model.

        Raises:
            Unsafe: it does something else.
        """
        kind = (way, getattr(suffix, "past", 0) > 0, len(suffix.rows) > 1)
        if kind in self._trusted:
            return
        row, lowest = suffix.rows[0], self.layers[0]
        generator = torch.Generator().manual_seed(0)
        start = suffix.representations()
        places = torch.tensor([suffix.flat(0, c) for c in row.positions], device=start.device)
        here = start[places]
        shove = torch.randn(here.shape, generator=generator).to(here.device)
        shove = (shove * (0.5 * here.float().norm(dim=-1, keepdim=True) / shove.norm(dim=-1, keepdim=True))).to(here)

        def in_place(hidden: Tensor) -> Tensor:
            return hidden.index_put((places,), hidden[places] + shove)

        def in_model(hidden: Tensor) -> Tensor:
            columns = torch.tensor(row.positions, device=hidden.device)
            return hidden.index_put((torch.zeros_like(columns), columns), hidden[0, columns] + shove)

        losses, _ = suffix.losses({lowest: in_place})
        found = losses[suffix.owner == 0]
        ids = torch.tensor([row.ids], device=start.device)
        handle = hook_block(self.blocks[lowest], in_model)
        try:
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        finally:
            handle.remove()
        labels = torch.tensor(row.labels[1:], device=start.device)
        expected = F.cross_entropy(logits[:-1].float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
        expected = expected[labels != IGNORE_INDEX]
        off = ((found - expected).abs() / (1.0 + expected.abs())).max()
        if not float(off) <= tolerance(here.dtype):
            raise Unsafe(f"with a changed hidden state its loss is off by {float(off):.1e}")
        self._trusted.add(kind)


def _extent(job: Job) -> tuple[int, int]:
    """Widest suffix and prefix of a job's rows: what it costs in a batch."""
    firsts = [min(row.positions) for row in job.rows]
    widths = [used_width(row) - first for row, first in zip(job.rows, firsts, strict=True)]
    return max(widths), max(firsts)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def stackable(maps: Mapping[int, BasisWeightedMap]) -> bool:
    """Whether the maps are of this library's own kind, and nothing that all edits share is trained."""
    for module in maps.values():
        if type(module) is not BasisWeightedMap:
            return False
        if any(p.requires_grad and is_shared(module.weighting, n) for n, p in module.weighting.named_parameters()):
            return False
    return True
