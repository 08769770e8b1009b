"""A stack of edits on its way: one step for all of them, and the parting of those that are done."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import BaftConfig
from ..errors import EditError
from ..runtime.distributed import DataParallel
from ..runtime.partial_forward import Suffix
from .engine import Job, TrainedEdit, TrainingContext, check_loss, map_tensors, summed, use_of, watching
from .stacked import Places, StackedMaps

Results = dict[int, TrainedEdit | EditError]
"""What became of jobs, by their numbers."""


class Batch:
    """Edits that are trained together.

    Args:
        jobs: number -> job; their maps are of one :func:`~.stacked.signature`.
        suffix: all their rows, in order.
        config: settings.
        layers: edited blocks.
        around: bank, use of bases, earlier edits.
        spent: seconds that all of them have taken already.
        together: where there is one edit, whose other rows other ranks have.

    Attributes:
        active: numbers of the jobs still in training.
        losses: number -> mean loss (nats) over target tokens that the last step found.
    """

    def __init__(
        self,
        jobs: Mapping[int, Job],
        suffix: Suffix,
        config: BaftConfig,
        layers: Sequence[int],
        context: TrainingContext,
        *,
        spent: float = 0.0,
        data_parallel: DataParallel | None = None,
    ):
        self.jobs, self.suffix, self.config, self.data_parallel = jobs, suffix, config, data_parallel
        bank = {n: context.bank[n] for n in layers if n in context.bank} if config.locality_coefficient else {}
        maps = [job.maps for job in jobs.values()]
        self.maps = StackedMaps(maps, config, suffix.device, used=context.used, bank=bank, earlier=context.earlier)
        self.active = list(jobs)
        self.losses: dict[int, float] = {}
        self._layout = _Layout(list(jobs.values()), suffix)
        self._spent = spent / len(jobs)  # an edit

    def step(self) -> Results:
        """Look at every edit's loss, let those go that are done, and take a step with the others.

        Returns:
            The result of each edit that left: trained, or an error where its loss is not finite.
        """
        begin, config = time.perf_counter(), self.config
        last = self.maps.step == config.steps
        data_parallel, part = self.data_parallel, 1.0 if self.data_parallel is None else self.data_parallel.share
        with torch.set_grad_enabled(not last), watching(data_parallel):
            losses, hits = self.suffix.losses(self.maps.changes(self._layout.places))
            edit = self._layout.sum(losses * self._layout.share)  # (E,)
            total = (part * edit + self.maps.penalties(data_parallel)).sum()
            missed = (~hits).float()
            own = [
                losses.detach() * self._layout.own,
                missed * (self._layout.own > 0),
                missed * (self._layout.share > 0),
            ]
            found = torch.stack([self._layout.sum(each) for each in own])
        # the one time a step that the accelerator is waited for
        values = (found if data_parallel is None else data_parallel.mean([found])[0]).tolist()
        self.losses = dict(zip(self.active, values[0], strict=True))
        leaving: dict[int, tuple[float, bool]] = {}
        for k, (loss, missed, missed_or_open) in enumerate(zip(*values, strict=True)):
            if last or not math.isfinite(loss) or (missed_or_open == 0 and loss < config.loss_target):
                leaving[k] = (loss, missed == 0)
        self._spent += (time.perf_counter() - begin) / len(self.active)
        results = self._part(leaving) if leaving else {}
        begin = time.perf_counter()
        if len(leaving) < len(self.active):
            with watching(data_parallel):
                gradients = self.maps.gradients(total)
            self.maps.update(summed(gradients, data_parallel))
            self._spent += (time.perf_counter() - begin) / len(self.active)
        if leaving:
            self._keep([k for k in range(len(self.active)) if k not in leaving])
        return results

    def _part(self, leaving: Mapping[int, tuple[float, bool]]) -> Results:
        results: Results = {}
        used = {layer: use_of(weights, self.data_parallel).cpu() for layer, weights in self.maps.weights.items()}
        for k, (loss, reached) in leaving.items():
            job = self.jobs[self.active[k]]
            try:
                check_loss(loss, self.maps.step, job, self.config)
            except EditError as error:
                results[self.active[k]] = error
                continue
            self.maps.store(k)
            tensors = {layer: map_tensors(module) for layer, module in job.maps.items()}
            own = {layer: weights[k].clone() for layer, weights in used.items()}
            results[self.active[k]] = TrainedEdit(tensors, own, loss, self.maps.step, self._spent, reached)
        return results

    def _keep(self, staying: Sequence[int]) -> None:
        rows = [row for k in staying for row in self._layout.rows[k]]
        self.active = [self.active[k] for k in staying]
        if staying:
            self.maps.keep(staying)
            self.suffix = self.suffix.select(rows)
            self._layout = _Layout([self.jobs[number] for number in self.active], self.suffix)


class _Layout:
    """Who owns what in a stack: rows, positions and target tokens of each edit.

    Attributes:
        rows: for each edit its rows in the suffix.
        places: where its positions lie.
        share: ``(N,)`` weight of each token in its edit's loss.
        own: ``(N,)`` its weight in the mean over the edit's targets alone.
    """

    def __init__(self, jobs: Sequence[Job], suffix: Suffix):
        counts = [len(job.rows) for job in jobs]
        ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        self.rows = [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        positions = [[suffix.flat(row, c) for row in rows for c in suffix.rows[row].positions] for rows in self.rows]
        self.places = Places(positions, suffix.device)
        edit_of_row = torch.tensor([k for k, rows in enumerate(self.rows) for _ in rows], device=suffix.device)
        self._edit = edit_of_row[suffix.owner]  # (N,)
        self._count = len(counts)
        rows = torch.tensor(counts, device=suffix.device)[self._edit]
        self.share, self.own = suffix.share / rows, suffix.own / rows

    def sum(self, values: Tensor) -> Tensor:
        """``(N,) -> (E,)``: over the target tokens of each edit."""
        return torch.zeros(self._count, device=values.device).index_add(0, self._edit, values)
