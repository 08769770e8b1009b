"""The reference engine: the whole model, forward and backward, at each step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..config import BaftConfig
from ..errors import EditError
from ..models.structure import compute_device, find_blocks
from ..models.tokenization import pad_token_id
from ..runtime.adapter import Edit
from ..runtime.distributed import DataParallel
from ..runtime.partial_forward import WholeModel
from .batch import Batch, OutputLoss, frozen
from .maps import ModuleMaps
from .types import Job, TrainingContext


class ReferenceEngine:
    """Trains one edit at a time by calling the model as a user does. Every other path must agree with it.

    Args:
        model, tokenizer: the base model; its weights and flags come back as they were.
        config: settings.
        layers: resolved block numbers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: BaftConfig, layers: Sequence[int]):
        self.model, self.tokenizer, self.config, self.layers = model, tokenizer, config, tuple(layers)
        self.blocks = find_blocks(model)

    def train_many(self, jobs: Sequence[Job], context: TrainingContext) -> Iterator[Edit]:
        """Train independent jobs and yield their results in order."""
        for job in jobs:
            yield self.train(job, context)

    def train_data_parallel(self, job: Job, context: TrainingContext) -> Edit:
        """Train one edit on all ranks of the process group at once; every rank gets the same result.

        Raises:
            EditError: the loss is not finite, or another rank failed.
        """
        parallel, rows = DataParallel.of(job.rows)
        return self.train(dataclasses.replace(job, rows=tuple(rows)), context, parallel)

    def train(self, job: Job, context: TrainingContext, parallel: DataParallel | None = None) -> Edit:
        """Train one edit; with ``parallel``, on this rank's rows of it.

        Raises:
            EditError: the loss is not finite.
        """
        begin, pad_id = time.perf_counter(), pad_token_id(self.tokenizer)
        # each layer's map lives where its block does
        devices = {layer: compute_device(self.blocks[layer]) for layer in self.layers}
        with frozen(self.model):
            forward = WholeModel(self.model, self.blocks, job.rows, pad_id)
            maps = ModuleMaps(job.maps, self.config, context, devices)
            penalty = None
            if self.config.output_coefficient:
                penalty = OutputLoss(self.model, self.blocks, context.texts, pad_id)
            spent = time.perf_counter() - begin
            [result] = (
                Batch({0: job}, forward, maps, self.config, penalty=penalty, spent=spent, parallel=parallel)
                .run()
                .values()
            )
        if isinstance(result, EditError):
            raise result
        return result
