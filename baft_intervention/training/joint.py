"""One set of bases for many requests: depth-first, one request after another, or breadth-first, in mini-batches over epochs.

Edits with bases of their own do not need it: trained alone or side by side, one after another or all at once, each is the same.
Requests that share bases do. *Depth-first* is a stream whose later requests nobody knows yet: each is trained to its end in the
bases that the earlier ones have left, with a fresh optimiser, and none is looked at again; the later ones cost the earlier ones
their answers. *Breadth-first* all requests are at hand: they are dealt into mini-batches once, by the edit's seed, and an epoch
is a step on each of them, in an order of its own. Without mini-batches all requests are in every step; that is the engines' own
work.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.basis_map import BasisWeightedMap
from ..core.losses import balance_loss, locality_loss, output_loss
from ..models.structure import compute_device
from ..models.tokenization import pad_rows, pad_token_id
from ..runtime.call_state import hook_block
from ..runtime.partial_forward import Changes, Suffix
from .engine import Job, ReferenceEngine, Row, TrainedEdit, TrainingContext, check_loss, edit_seed, frozen, map_tensors

_KEPT = 1024  # rows whose unedited part is kept from one epoch to the next; of more it is computed again
_AT_ONCE = 32  # rows that are looked at together


class JointEngine:
    """Trains joint edits in the order that ``engine.config`` names; see the module.

    Args:
        engine: of either kind; it takes the steps of depth-first training, and of breadth-first what lies below the edit.
    """

    def __init__(self, engine: Any):
        self.engine, self.config, self.layers = engine, engine.config, engine.layers

    def train_many(self, jobs: Sequence[Job], context: TrainingContext) -> Any:
        """Train one job after another and yield their results in order."""
        for job in jobs:
            yield self.train(job, context)

    def train_data_parallel(self, job: Job, context: TrainingContext) -> TrainedEdit:
        """The same on each rank of a process group: every step depends on the one before it."""
        return self.train(job, context)

    def train(self, job: Job, context: TrainingContext) -> TrainedEdit:
        """Train one joint group of requests.

        Raises:
            EditError: a loss that is not finite.
        """
        begin = time.perf_counter()
        with frozen(self.engine.model):
            steps = self._depth(job, context) if self.config.order == "depth" else self._breadth(job, context)
            loss, reached, _, used = self._look(job, self._pieces(job, self.config.mini_batch or _AT_ONCE), context)
            check_loss(loss, steps, job, self.config)
        tensors = {layer: map_tensors(module) for layer, module in job.maps.items()}
        return TrainedEdit(tensors, used, loss, steps, time.perf_counter() - begin, reached)

    def _depth(self, job: Job, context: TrainingContext) -> int:
        """Each request, with its augmentations, to its end; the steps of all."""
        steps, plain = 0, [i for i, request in enumerate(job.requests) if not request.messages]
        more = (len(job.rows) - len(job.requests)) // max(1, len(plain))
        owners = [*range(len(job.requests)), *(i for i in plain for _ in range(more))]
        for i, request in enumerate(job.requests):
            own = tuple(row for row, owner in zip(job.rows, owners, strict=True) if owner == i)
            steps += self.engine.train(Job((request,), own, job.maps), context).steps  # the maps are trained in place
        return steps

    def _breadth(self, job: Job, context: TrainingContext) -> int:
        generator = torch.Generator().manual_seed(edit_seed(self.config.seed, job.requests))
        pieces = self._pieces(job, self.config.mini_batch, generator)
        most = self.config.epochs * len(pieces) or self.config.steps
        config = dataclasses.replace(self.config, steps=most)  # the rate falls over all of them
        parameters = [p for m in job.maps.values() for p in m.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        outside = self.engine.outside(context) if config.output_coefficient else None  # a reference engine, then
        step = 0
        while step < most:
            total, all_hit = 0.0, True
            for number in torch.randperm(len(pieces), generator=generator).tolist()[: most - step]:
                with torch.enable_grad():
                    piece = pieces[number]()
                    loss, own, hits, weights = self._loss(job, piece, context)
                    penalty = self._penalty(job, weights, context)
                    if outside is not None:
                        moved = output_loss(self.engine.at_the_end(outside, job.maps, context), outside.before)
                        penalty = penalty + config.output_coefficient * moved
                check_loss(float(loss.detach()), step, job, config)
                gradients = torch.autograd.grad(loss + penalty, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimiser.param_groups[0]["lr"] = config.rate_at(step)
                optimiser.step()
                step += 1
                total, all_hit = total + own / len(pieces), all_hit and bool(hits[piece[0].share > 0].all())
            if all_hit and total < config.loss_target:
                own, _, ended, _ = self._look(job, pieces, context)  # what was seen was seen before its step
                if ended and own < config.loss_target:
                    break
        return step

    # ------------------------------------------------------------------------------------------ looking

    def _pieces(
        self, job: Job, size: int, generator: torch.Generator | None = None
    ) -> list[Callable[[], tuple[Suffix, list[int]]]]:
        """Mini-batches of rows, dealt by ``generator`` or in their order: each gives its suffix and the rows' numbers."""
        count = len(job.rows)
        dealt = list(range(count)) if generator is None else torch.randperm(count, generator=generator).tolist()
        parts = [dealt[i : i + size] for i in range(0, count, size)]
        kept: dict[int, Suffix] = {}

        def piece(number: int) -> tuple[Suffix, list[int]]:
            suffix = kept.get(number) or self._suffix([job.rows[i] for i in parts[number]])
            if count <= _KEPT:
                kept[number] = suffix
            return suffix, parts[number]

        return [lambda number=number: piece(number) for number in range(len(parts))]

    def _suffix(self, rows: Sequence[Row]) -> Suffix:
        found = None if isinstance(self.engine, ReferenceEngine) else self.engine.prepare(rows)
        return _Whole(self.engine, rows) if found is None else found

    def _loss(
        self, job: Job, piece: tuple[Suffix, list[int]], context: TrainingContext
    ) -> tuple[Tensor, float, Tensor, dict[int, Tensor]]:
        """Mean loss over the rows of a piece, that of the targets alone, which target tokens are hit, and ``layer -> w (n, r)``."""
        suffix, weights = piece[0], {}
        places = [suffix.flat(i, c) for i, row in enumerate(suffix.rows) for c in row.positions]
        index = torch.tensor(places, device=suffix.device)

        def change(layer: int, module: BasisWeightedMap) -> Callable[[Tensor], Tensor]:
            def apply(hidden: Tensor) -> Tensor:
                here = index.to(hidden.device)
                x = hidden[here].float()
                delta, weights[layer] = module.to(hidden.device).update(x)
                if layer in context.earlier:
                    delta = delta + context.earlier[layer](x)
                return hidden.index_put((here,), (x + delta).to(hidden.dtype))

            return apply

        losses, hits = suffix.losses({layer: change(layer, module) for layer, module in job.maps.items()})
        own = float((losses.detach() * suffix.own).sum()) / len(suffix.rows)
        return (losses * suffix.share).sum() / len(suffix.rows), own, hits, weights

    def _penalty(self, job: Job, weights: dict[int, Tensor], context: TrainingContext) -> Tensor | float:
        config, total, device = self.config, 0.0, compute_device(self.engine.model)
        for layer, module in job.maps.items():
            if config.locality_coefficient and layer in context.bank:
                bank = context.bank[layer].to(weights[layer].device)
                total = total + config.locality_coefficient * locality_loss(module.weighting(bank)).to(device)
            if config.balance_coefficient:
                used = context.used.get(layer, torch.zeros(config.rank)).to(weights[layer].device)
                total = total + config.balance_coefficient * balance_loss(weights[layer], used).to(device)
        return total

    @torch.no_grad()
    def _look(
        self, job: Job, pieces: Sequence[Callable], context: TrainingContext
    ) -> tuple[float, bool, bool, dict[int, Tensor]]:
        """Mean loss over all targets, whether they are reached, and they and what ends them, and the use of the bases.

        No step is taken.
        """
        total, reached, ended = 0.0, True, True
        used = {layer: torch.zeros(self.config.rank) for layer in job.maps}
        for piece in pieces:
            suffix, rows = piece()
            _, own, hits, weights = self._loss(job, (suffix, rows), context)
            total += own * len(rows) / len(job.rows)
            reached, ended = reached and bool(hits[suffix.own > 0].all()), ended and bool(hits[suffix.share > 0].all())
            used = {layer: own + weights[layer].sum(0).cpu() for layer, own in used.items()}
        return total if math.isfinite(total) else math.nan, reached, ended, used


class _Whole(Suffix):
    """The whole model at each step, as :class:`~.engine.ReferenceEngine` runs it."""

    def __init__(self, engine: Any, rows: Sequence[Row]):
        model, tokenizer = engine.model, engine.tokenizer
        ids, mask = pad_rows([row.ids for row in rows], pad_token_id(tokenizer))
        super().__init__(rows, ids.shape[1], compute_device(model))
        self.model, self.blocks = model, engine.blocks
        self.batch = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}

    def flat(self, row: int, column: int) -> int:
        return row * self.width + column

    def losses(self, changes: Changes) -> tuple[Tensor, Tensor]:
        def on(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: change(hidden.flatten(0, 1)).view_as(hidden)

        handles = [hook_block(self.blocks[layer], on(change)) for layer, change in changes.items()]
        try:
            logits = self.model(**self.batch).logits
        finally:
            for handle in handles:
                handle.remove()
        chosen = logits.flatten(0, 1)[self.targets].float()  # (N, V)
        return F.cross_entropy(chosen, self.labels, reduction="none"), chosen.argmax(-1) == self.labels
