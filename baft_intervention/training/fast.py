"""The fast engine: many edits in one batch, and no computation that cannot change from one step to the next.

A step runs the blocks above the lowest edited one, on the columns from the first edited token on, forward and backward
to the activations, and computes logits at target tokens only (see :mod:`~..runtime.partial_forward`). No parameter of
the model is trained, so E edits are E groups of rows of one batch; their maps are stacked (see :mod:`.stacked`), and an
edit that reaches its loss leaves the batch.

The engine trusts no shortcut. Before the first step it disturbs a hidden state at random and compares the loss of its own
path with the model's. Where they disagree it logs why and tries the next slower path: the upper blocks alone
(:class:`~..runtime.replayed_blocks.ReplayedBlocks`), the model without its lower blocks
(:class:`~..runtime.partial_forward.WholeModel`), and last :class:`~.reference.ReferenceEngine`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import BaftConfig
from ..core.basis_map import BasisWeightedMap
from ..errors import BaftError, EditError
from ..models.structure import find_blocks
from ..models.tokenization import IGNORE_INDEX, pad_token_id
from ..runtime.adapter import Edit
from ..runtime.block_stubs import CannotSkip, foreign_hook, hooked_blocks
from ..runtime.distributed import DataParallel
from ..runtime.edit_stack import is_shared
from ..runtime.output_head import OutputHead
from ..runtime.partial_forward import CachedStates, PartialForward, WholeModel, cache_states, tolerance, used_width
from ..runtime.replayed_blocks import ReplayedBlocks
from .batch import Batch, OneProcess, Results, frozen
from .maps import Maps
from .memory import edit_bytes, free_bytes, out_of_memory
from .reference import ReferenceEngine
from .stacked import StackedMaps, signature
from .types import Job, TrainingContext, TrainingRow

logger = logging.getLogger(__name__)

_PATHS = ("replayed_blocks", "whole_model", "reference")
_MOST = {"cpu": 32, "cuda": 256}  # larger stacks gain nothing: a CPU's cores are busy and its caches full by then
_WINDOW = 4  # stacks whose edits are sorted together; finished results wait for the others of their window
_MEMORY_SHARE = 0.5  # of the free memory


class FastEngine:
    """Trains edits in stacks, by the fastest path that agrees with the model.

    Args:
        model, tokenizer: the base model; its weights, flags and hooks come back as they were.
        config: settings.
        layers: resolved block numbers.
        most: the largest stack; by default as many edits as fit, up to 32 on a CPU and 256 on a GPU.
        strict: raise where a shortcut fails, instead of taking a slower path.

    Attributes:
        path: how the last stack was trained: ``replayed_blocks``, ``whole_model`` or ``reference``; None before the first.
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
        model = getattr(model, "_orig_mod", model)  # the module that torch.compile wraps: stubs would break its guards
        self.model, self.tokenizer, self.config, self.layers = model, tokenizer, config, tuple(sorted(layers))
        self.blocks = find_blocks(model)
        self.device = next(model.parameters()).device
        self.most = most or _MOST.get(self.device.type, 32)
        self.strict = strict
        self.path: str | None = None
        self._pad_id = pad_token_id(tokenizer)
        self._first_path = 0  # the first of _PATHS that has not failed
        self._checked: set[tuple] = set()  # kinds of batches that agreed with the model
        self._head: OutputHead | None = None
        self._reference = ReferenceEngine(model, tokenizer, config, self.layers)

    # ------------------------------------------------------------------------------------------ many edits

    def train_many(self, jobs: Sequence[Job], context: TrainingContext) -> Iterator[Edit]:
        """Train independent jobs in stacks of similar length and yield their results in order.

        Raises:
            EditError: the loss of a job is not finite; raised at the job's turn.
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
                    logger.warning("memory ran out with %d edits in a stack; continuing with %d", len(stack), half)
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

    def train(self, job: Job, context: TrainingContext) -> Edit:
        """Train one edit."""
        return next(self.train_many([job], context))

    def train_data_parallel(self, job: Job, context: TrainingContext) -> Edit:
        """Train one edit on all ranks of the process group at once; every rank gets the same result.

        Raises:
            EditError: the loss is not finite, or another rank failed.
        """
        parallel, rows = DataParallel.of(job.rows)
        results: Results = {}
        self._train_stack({0: dataclasses.replace(job, rows=tuple(rows))}, context, results, parallel)
        if isinstance(results[0], EditError):
            raise results[0]
        return results[0]

    def _stack_size(self, jobs: Sequence[Job]) -> int:
        """How many edits of the size of the largest job fit into half of the free memory; at least one."""
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
        self, jobs: Mapping[int, Job], context: TrainingContext, results: Results, parallel: DataParallel | None = None
    ) -> None:
        """Train ``jobs``, by their numbers, and enter the outcome of each in ``results``."""
        begin = time.perf_counter()
        with frozen(self.model):
            forward, ranks = None, parallel or OneProcess()
            if all(stackable(job.maps) for job in jobs.values()):
                with ranks.watched():
                    forward = self.prepare([row for job in jobs.values() for row in job.rows])
            if ranks.all(forward is not None) and forward is not None:  # a path is taken on every rank or on none
                try:
                    maps = StackedMaps([job.maps for job in jobs.values()], self.config, context, forward.device)
                    spent = time.perf_counter() - begin
                    batch = Batch(jobs, forward, maps, self.config, spent=spent, parallel=parallel)
                    while batch.active:
                        results.update(batch.step())
                except Exception as error:
                    if out_of_memory(error) or isinstance(error, BaftError) or self.strict:
                        raise
                    self._log("a weighting network or an earlier edit cannot be stacked", error)
                    self.path = "reference"
        for i, job in jobs.items():
            if i not in results:
                try:
                    results[i] = self._reference.train(job, context, parallel)
                except EditError as error:
                    results[i] = error

    # ------------------------------------------------------------------------------------------ which path

    def prepare(self, rows: Sequence[TrainingRow]) -> PartialForward | None:
        """The fastest path that is exact for ``rows``; None where only the reference is."""
        paths: list[Callable[[Sequence[TrainingRow]], PartialForward]] = [self._replayed_blocks, self._whole_model]
        for number in range(self._first_path, len(paths)):
            try:
                forward = paths[number](rows)
                self._compare(forward, _PATHS[number])
            except Exception as error:
                if out_of_memory(error) or (self.strict and number == 0):
                    raise
                self._log(("its blocks are not run alone", "its lower blocks are not skipped")[number], error)
                self._first_path = number + 1
            else:
                self.path = _PATHS[number]
                return forward
        self.path = "reference"
        return None

    def _log(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s (%s: %s)", type(self.model).__name__, what, type(error).__name__, error)

    def _replayed_blocks(self, rows: Sequence[TrainingRow]) -> ReplayedBlocks:
        module = foreign_hook(self.model, self.blocks, self.layers[0])
        if module is not None:
            raise CannotSkip(f"{module} carries a hook that expects whole rows")
        states = self._states(rows)
        if states.changed is not None:
            raise CannotSkip(f"a hook changes the output of block {states.changed}; disable the other adapter")
        if self._head is None:
            self._head = OutputHead(self.model, self.blocks, states.extras, states.last[0])
        return ReplayedBlocks(self.model, self.blocks, self._head, states, rows)

    def _whole_model(self, rows: Sequence[TrainingRow]) -> WholeModel:
        return WholeModel(self.model, self.blocks, rows, self._pad_id, self._states(rows))

    def _states(self, rows: Sequence[TrainingRow]) -> CachedStates:
        return cache_states(self.model, self.blocks, rows, self.layers[0], self._pad_id)

    @torch.no_grad()
    def _compare(self, forward: PartialForward, path: str) -> None:
        """Check that a disturbance at the first row's edited positions changes the loss as it does in the model.

        It is checked once for each kind of batch.

        Raises:
            CannotSkip: it changes the loss otherwise.
        """
        kind = (path, getattr(forward, "past", 0) > 0, len(forward.rows) > 1)
        if kind in self._checked:
            return
        row, lowest = forward.rows[0], self.layers[0]
        start = forward.start()
        index = torch.tensor([forward.flat_index(0, c) for c in row.positions], device=start.device)
        hidden = start[index]
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
        size = 0.5 * hidden.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        noise = (noise * size).to(hidden)

        def on_flat(hidden: Tensor) -> Tensor:
            return hidden.index_put((index,), hidden[index] + noise)

        def on_row(hidden: Tensor) -> Tensor:
            columns = torch.tensor(row.positions, device=hidden.device)
            return hidden.index_put((torch.zeros_like(columns), columns), hidden[0, columns] + noise)

        losses, _ = forward.losses({lowest: on_flat})
        found = losses[forward.owner == 0]
        ids = torch.tensor([row.ids], device=start.device)
        with hooked_blocks(self.blocks, {lowest: on_row}):
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        labels = torch.tensor(row.labels[1:], device=start.device)
        expected = F.cross_entropy(logits[:-1].float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
        expected = expected[labels != IGNORE_INDEX]
        off = ((found - expected).abs() / (1.0 + expected.abs())).max()
        if not float(off) <= tolerance(hidden.dtype):
            raise CannotSkip(f"with a changed hidden state its loss is off by {float(off):.1e}")
        self._checked.add(kind)


def _extent(job: Job) -> tuple[int, int]:
    """The widest computed part and the widest prefix of a job's rows: its cost in a batch."""
    firsts = [min(row.positions) for row in job.rows]
    widths = [used_width(row) - first for row, first in zip(job.rows, firsts, strict=True)]
    return max(widths), max(firsts)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def stackable(maps: Maps) -> bool:
    """Whether the maps are plain :class:`BasisWeightedMap` modules and nothing that all edits share is trained."""
    for module in maps.values():
        if type(module) is not BasisWeightedMap:
            return False
        if any(p.requires_grad and is_shared(module.weighting, n) for n, p in module.weighting.named_parameters()):
            return False
    return True
