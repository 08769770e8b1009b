"""The training loop: edits that take their steps together, and leave when they are done."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..core.losses import output_loss
from ..errors import EditError
from ..models.tokenization import IGNORE_INDEX
from ..runtime.adapter import Edit
from ..runtime.distributed import DataParallel
from ..runtime.partial_forward import PartialForward, WholeModel
from .maps import EditedPositions, EditMaps, map_tensors
from .types import Job, TrainingRow

Results = dict[int, Edit | EditError]
"""The outcome of jobs, by their numbers."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` requires a gradient and the model is in eval mode; afterwards all flags are back."""
    # by name: offloading makes new objects of the parameters at each call
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(m, m.training) for m in model.modules()]  # one by one: a user may keep some in eval mode
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        for module, mode in modes:
            module.training = mode


class OneProcess(DataParallel):
    """:class:`DataParallel` where one process has all rows: nothing is sent."""

    def __init__(self) -> None:
        super().__init__(share=1.0)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def use(self, weights: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        return weights, used

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        yield


class OutputLoss:
    """How far an edit moves the model's output on unrelated texts, see :func:`~..core.losses.output_loss`.

    Args:
        model, blocks: the unedited model and its decoder blocks.
        texts: ids of unrelated texts.
        pad_id: fills up short rows.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, texts: Sequence[Sequence[int]], pad_id: int):
        rows = [TrainingRow(list(text), [IGNORE_INDEX] * len(text), [len(text) - 1]) for text in texts]
        self._forward = WholeModel(model, blocks, rows, pad_id)
        last = [self._forward.flat_index(i, len(text) - 1) for i, text in enumerate(texts)]
        self._index = torch.tensor(last, device=self._forward.device)
        self._positions = EditedPositions([last], self._forward.device)
        with torch.no_grad():
            self._before = self._forward.logits({}, self._index).float().log_softmax(-1)  # (N, V)

    def __call__(self, maps: EditMaps) -> Tensor:
        return output_loss(self._forward.logits(maps.changes(self._positions)[0], self._index), self._before)


class Batch:
    """Edits that are trained together.

    Args:
        jobs: number -> job.
        forward: of all their rows, in order.
        maps: of the jobs, in order.
        config: settings.
        penalty: a further term of the loss.
        spent: seconds that the jobs have taken so far.
        parallel: the ranks that train the one job of this batch, each on some of its rows.

    Attributes:
        active: numbers of the jobs in training.
        losses: number -> mean loss (nats) over the target tokens at the last step.
    """

    def __init__(
        self,
        jobs: Mapping[int, Job],
        forward: PartialForward,
        maps: EditMaps,
        config: BaftConfig,
        *,
        penalty: Callable[[EditMaps], Tensor] | None = None,
        spent: float = 0.0,
        parallel: DataParallel | None = None,
    ):
        self.jobs, self.forward, self.maps, self.config, self.penalty = jobs, forward, maps, config, penalty
        self.parallel = parallel or OneProcess()
        self.active = list(jobs)
        self.losses: dict[int, float] = {}
        self._layout = _Layout(list(jobs.values()), forward)
        self._spent = spent / len(jobs)  # an edit

    def run(self) -> Results:
        """Train all jobs to their end."""
        results: Results = {}
        while self.active:
            results.update(self.step())
        return results

    def step(self) -> Results:
        """Compute every edit's loss, let those leave that are done, and take a step with the others.

        Returns:
            The outcome of each edit that left: trained, or an error where its loss is not finite.
        """
        begin, config, layout, parallel = time.perf_counter(), self.config, self._layout, self.parallel
        last = self.maps.step == config.steps
        with torch.set_grad_enabled(not last), parallel.watched():
            changes, weights = self.maps.changes(layout.positions)
            tokens, hits = self.forward.losses(changes)  # (N,) (N,)
            losses = layout.sum(tokens * layout.weights)  # (E,)
            missed = (~hits).float()
            target_loss = layout.sum(tokens.detach() * layout.mean)
            target_missed, all_missed = (layout.sum(missed * (each > 0)) for each in (layout.mean, layout.weights))
        # the only point of a step that waits for the accelerator
        values = parallel.mean([torch.stack([target_loss, target_missed, all_missed])])[0].tolist()
        self.losses = dict(zip(self.active, values[0], strict=True))
        leaving: dict[int, tuple[float, bool]] = {}
        for k, (loss, target, everything) in enumerate(zip(*values, strict=True)):
            if last or not math.isfinite(loss) or (everything == 0 and loss < config.loss_target):
                leaving[k] = (loss, target == 0)
        self._spent += (time.perf_counter() - begin) / len(self.active)
        results = self._finish(leaving, weights) if leaving else {}
        begin = time.perf_counter()
        if len(leaving) < len(self.active):
            with torch.enable_grad(), parallel.watched():
                total = parallel.share * losses + self.maps.penalties(weights, parallel, losses.device)
                if self.penalty is not None:
                    total = total + parallel.share * config.output_coefficient * self.penalty(self.maps).to(
                        total.device
                    )
                gradients = self.maps.gradients(total.sum())
            self.maps.update(_summed(gradients, parallel))
            self._spent += (time.perf_counter() - begin) / len(self.active)
        if leaving:
            self._keep([k for k in range(len(self.active)) if k not in leaving])
        return results

    def _finish(self, leaving: Mapping[int, tuple[float, bool]], weights: Mapping[int, Tensor]) -> Results:
        results: Results = {}
        used = {layer: self.parallel.total(each).cpu() for layer, each in weights.items()}  # (E, r)
        for k, (loss, reached) in leaving.items():
            number, job = self.active[k], self.jobs[self.active[k]]
            try:
                check_loss(loss, self.maps.step, job, self.config)
            except EditError as error:
                results[number] = error
                continue
            tensors = {layer: map_tensors(module) for layer, module in self.maps.store(k).items()}
            own = {layer: each[k].clone() for layer, each in used.items()}
            first = job.requests[0].id
            results[number] = Edit(first, job.requests, tensors, own, loss, self.maps.step, self._spent, reached)
        return results

    def _keep(self, staying: Sequence[int]) -> None:
        rows = [row for k in staying for row in self._layout.rows[k]]
        self.active = [self.active[k] for k in staying]
        if staying:
            self.maps.keep(staying)
            self.forward = self.forward.select(rows)
            self._layout = _Layout([self.jobs[number] for number in self.active], self.forward)


class _Layout:
    """Which rows, positions and target tokens of a forward belong to which edit.

    Attributes:
        rows: the rows of each edit.
        positions: where each edit acts.
        weights: ``(N,)``, the weight of each token in its edit's loss.
        mean: ``(N,)``, its weight in the mean over the edit's targets alone.
    """

    def __init__(self, jobs: Sequence[Job], forward: PartialForward):
        counts, device = [len(job.rows) for job in jobs], forward.device
        ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        self.rows = [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        positions = [[forward.flat_index(i, c) for i in rows for c in forward.rows[i].positions] for rows in self.rows]
        stages = [[stage for row in job.rows for stage in row.stages] for job in jobs]
        self.positions = EditedPositions(positions, device, stages)
        edit_of_row = torch.tensor([k for k, rows in enumerate(self.rows) for _ in rows], device=device)
        self._edit, self._count = edit_of_row[forward.owner], len(counts)  # (N,)
        per_row: list[tuple[Any, Any]] = [row.token_weights() for job in jobs for row in job.rows]
        rows_of_edit = torch.tensor(counts, device=device)[self._edit]
        self.weights, self.mean = (
            torch.tensor([w for each in which for w in each], device=device) / rows_of_edit
            for which in zip(*per_row, strict=True)
        )

    def sum(self, values: Tensor) -> Tensor:
        """``(N,) -> (E,)``, over the target tokens of each edit."""
        return torch.zeros(self._count, device=values.device).index_add(0, self._edit, values)


def check_loss(loss: float, step: int, job: Job, config: BaftConfig) -> None:
    """Raise :class:`EditError` where the loss is not finite."""
    if not math.isfinite(loss):
        raise EditError(
            f"{job.requests[0].where}: the loss is {loss} at step {step}; nothing was changed. "
            f"Lower learning_rate (now {config.learning_rate:g}), or load the model in float32 or bfloat16"
        )


def _summed(gradients: Sequence[Tensor | None], parallel: DataParallel) -> list[Tensor | None]:
    """The gradient of an edit from those of its ranks; one that is None is None on every rank."""
    found = iter(parallel.sum([g for g in gradients if g is not None]))
    return [None if g is None else next(found) for g in gradients]
