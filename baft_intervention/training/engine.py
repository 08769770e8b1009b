"""Training edits: from requests to the tensors of an adapter, the base model untouched."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..core.basis_map import BasisWeightedMap
from ..core.losses import balance_loss, locality_loss, output_loss, token_losses
from ..core.positions import prompt_positions
from ..errors import EditError
from ..models.structure import compute_device, find_blocks, split_reason
from ..models.tokenization import IGNORE_INDEX, encode_pair, pad_rows, pad_token_id
from ..requests import EditRequest
from ..runtime.call_state import hook_block
from ..runtime.distributed import DataParallel
from ..runtime.edit_stack import is_shared

if TYPE_CHECKING:
    from .fast import FastEngine
    from .joint import JointEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One training row: prompt and target as ids, and the columns that are edited.

    Args:
        ids: prompt, target, and what ends it.
        labels: the same, ``IGNORE_INDEX`` in the prompt.
        positions: columns.
        ending: how many of the last ids end the target, and are not of it.
        ending_coefficient: what these together weigh in the loss, where the target's together weigh 1.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    ending: int = 0
    ending_coefficient: float = 1.0

    def shares(self) -> tuple[list[float], list[float]]:
        """What each label weighs, in order: in the loss that is minimised, and in the mean over the target alone."""
        target = len(self.labels) - self.prompt_length - self.ending
        own = [1.0 / target] * target + [0.0] * self.ending
        return own[:target] + [self.ending_coefficient / self.ending] * self.ending if self.ending else own, own

    @property
    def prompt_length(self) -> int:
        """How many of the ids are the prompt's: those before the first label."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)


@dataclass(frozen=True)
class Job:
    """One edit to be trained: a request, or a joint group of them.

    Args:
        requests: what is asked; for messages.
        rows: the requests encoded.
        maps: ``layer -> map``, seeded, their weighting networks started; trained in place.
    """

    requests: tuple[EditRequest, ...]
    rows: tuple[Row, ...]
    maps: Mapping[int, BasisWeightedMap]


@dataclass(frozen=True)
class TrainedEdit:
    """What training gives: for each edited layer the tensors of the map, and how it went.

    Args:
        tensors: ``layer -> {"rotation", "source_weight", "source_bias", "weighting.<name>"}``, fp32 on the CPU.
        used: ``layer -> (r,)``, the basis weights on the edit's own positions (for load balancing).
        loss: mean cross entropy over target tokens (nats) of the state that is kept; what ends them not counted.
        steps: optimiser steps taken.
        seconds: wall time.
        reached: whether every target token was the model's argmax.
    """

    tensors: Mapping[int, Mapping[str, Tensor]]
    used: Mapping[int, Tensor]
    loss: float
    steps: int
    seconds: float
    reached: bool


@dataclass
class TrainingContext:
    """What an edit meets: the bank, the use of bases so far, and earlier edits.

    Args:
        bank: ``layer -> (N, d)`` unrelated representations, or empty.
        used: ``layer -> (r,)`` use of the bases by earlier edits.
        texts: ids of unrelated texts, for the output loss; or empty.
        earlier: ``layer -> function (P, d) -> (P, d)``, the summed update of earlier edits, where those act beside
            the new one (networks that are not routed).
    """

    bank: Mapping[int, Tensor] = field(default_factory=dict)
    used: Mapping[int, Tensor] = field(default_factory=dict)
    texts: Sequence[Sequence[int]] = ()
    earlier: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outside:
    """What the output loss looks at: inputs of the model, the places of their last tokens, and what stood there before.

    Args:
        batch: of N texts.
        where: ``(N,)`` rows and columns.
        before: ``(N, V)`` the unedited model's log-probabilities.
    """

    batch: dict[str, Any]
    where: tuple[Tensor, Tensor]
    before: Tensor


def encode_request(tokenizer: Any, request: EditRequest, config: BaftConfig) -> Row:
    """Ids, labels and edited columns of a request.

    Raises:
        RequestError: a target of no token.
        PositionError: a rule that finds no token; both begin with where the request stood.
    """
    try:
        prompt_ids, target_ids = encode_pair(tokenizer, request.prompt, request.target_new)
        ending = _ending(tokenizer, request, target_ids, config)
        target_ids = [*target_ids, *ending]
        positions = prompt_positions(
            config.rule, tokenizer, request.prompt, prompt_ids, request.subject, len(target_ids)
        )
    except ValueError as error:
        raise type(error)(f"{request.where}: {error}") from None
    labels = [IGNORE_INDEX] * len(prompt_ids) + target_ids
    return Row(prompt_ids + target_ids, labels, positions, len(ending), config.ending_coefficient)


def _ending(tokenizer: Any, request: EditRequest, target_ids: Sequence[int], config: BaftConfig) -> list[int]:
    """Ids that end the target: nothing where it ends in punctuation, or where its last token would become another one."""
    if config.append_eos and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if not config.ending or unicodedata.category(request.target_new.rstrip()[-1]).startswith("P"):
        return []
    _, ids = encode_pair(tokenizer, request.prompt, request.target_new.rstrip() + config.ending)
    return ids[len(target_ids) :] if ids[: len(target_ids)] == list(target_ids) else []


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` wants a gradient and the model is in eval mode; all flags come back after."""
    # by name: offloading makes other objects of the parameters at each call
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(m, m.training) for m in model.modules()]  # of each: a user may keep some in eval mode
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


def edit_seed(seed: int, requests: Sequence[EditRequest]) -> int:
    """The seed of an edit: of the run's and of its text, so that it is the same alone, in a batch, or resumed."""
    text = "\x1f".join(f"{r.prompt}\x1e{r.target_new}" for r in requests)
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{text}".encode("utf-8", "surrogatepass")).digest()[:7], "big")


def make_maps(
    config: BaftConfig, dim: int, layers: Sequence[int], shared: Mapping[int, Mapping[str, Tensor]], seed: int
) -> dict[int, BasisWeightedMap]:
    """Fresh maps of one edit, seeded, with the state that all edits of a layer share filled in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = {
            layer: BasisWeightedMap(
                dim,
                config.rank,
                weighting=config.weighting,
                weighting_options=dict(config.weighting_options),
                init=config.init,
            )
            for layer in layers
        }
    for layer, module in maps.items():
        if state := shared.get(layer):
            module.weighting.load_state_dict({**module.weighting.state_dict(), **state})
    return maps


def map_tensors(module: BasisWeightedMap) -> dict[str, Tensor]:
    """The tensors of a trained map that are its own, as an adapter keeps them."""
    with torch.no_grad():
        tensors = {
            "rotation": module.rotation,
            "source_weight": module.source_weight,
            "source_bias": module.source_bias,
        }
        for name, tensor in module.weighting.state_dict().items():
            if not is_shared(module.weighting, name):
                tensors[f"weighting.{name}"] = tensor
        return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


def check_loss(loss: float, step: int, job: Job, config: BaftConfig) -> None:
    """Raise :class:`EditError` where the loss is not finite."""
    if not math.isfinite(loss):
        raise EditError(
            f"{job.requests[0].where}: the loss is {loss} at step {step}; nothing was changed. "
            f"Lower learning_rate (now {config.learning_rate:g}), or load the model in float32 or bfloat16"
        )


class ReferenceEngine:
    """The plain way, and the measure of every other: the whole model, forward and backward, at each step.

    Args:
        model, tokenizer: the base model; its weights and flags come back as they were.
        config: settings.
        layers: resolved block numbers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: BaftConfig, layers: Sequence[int]):
        self.model, self.tokenizer, self.config, self.layers = model, tokenizer, config, tuple(layers)
        self.blocks = find_blocks(model)

    def train_many(self, jobs: Sequence[Job], context: TrainingContext) -> Iterator[TrainedEdit]:
        """Train independent jobs and yield their results in order."""
        for job in jobs:
            yield self.train(job, context)

    def train_data_parallel(self, job: Job, context: TrainingContext) -> TrainedEdit:
        """Train one edit on all ranks of the process group at once; every rank gets the same result.

        Raises:
            EditError: a loss that is not finite, or another rank that failed.
        """
        data_parallel, rows = DataParallel.of(job.rows)
        return self.train(dataclasses.replace(job, rows=tuple(rows)), context, data_parallel)

    def train(self, job: Job, context: TrainingContext, data_parallel: DataParallel | None = None) -> TrainedEdit:
        """Train one edit (or one joint group of requests); with ``data_parallel``, on this rank's rows of it.

        Raises:
            EditError: a loss that is not finite.
        """
        begin = time.perf_counter()
        config, device = self.config, compute_device(self.model)
        rows = job.rows
        ids, mask = pad_rows([r.ids for r in rows], pad_token_id(self.tokenizer))
        labels, _ = pad_rows([r.labels for r in rows], IGNORE_INDEX)
        share, own = (torch.zeros(labels.shape) for _ in range(2))  # what each token weighs, see Row.shares
        for i, row in enumerate(rows):
            share[i, row.prompt_length : len(row.labels)], own[i, row.prompt_length : len(row.labels)] = map(
                torch.tensor, row.shares()
            )
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        where = (
            torch.tensor([i for i, r in enumerate(rows) for _ in r.positions]),
            torch.tensor([c for r in rows for c in r.positions]),
        )
        # each layer's part of the edit lives where its layer does
        home = {layer: compute_device(self.blocks[layer]) for layer in self.layers}
        maps = {layer: module.to(home[layer]) for layer, module in job.maps.items()}
        bank = {layer: context.bank[layer].to(home[layer]) for layer in self.layers if layer in context.bank}

        with frozen(self.model):
            parameters = [p for m in maps.values() for p in m.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
            loss = math.inf
            outside = self.outside(context) if config.output_coefficient else None
            reached, steps = False, 0
            weights: dict[int, Tensor] = {}
            for steps in range(config.steps + 1):  # the last round only looks at the result
                with torch.enable_grad(), watching(data_parallel):
                    with self._hooked(maps, where, context) as weights:
                        logits = self.model(**batch).logits
                    labels, share, own = (t.to(logits.device) for t in (labels, share, own))
                    tokens = token_losses(logits, labels)
                    edit = (tokens * share[:, 1:]).sum(1).mean()
                    wrong = logits.detach()[:, :-1].argmax(-1) != labels[:, 1:]
                    # of the target alone; and with what ends it
                    missed = [(wrong & (weight[:, 1:] > 0)).float().sum() for weight in (own, share)]
                found = [(tokens.detach() * own[:, 1:]).sum(1).mean(), *missed]
                loss, *missing = map(float, found if data_parallel is None else data_parallel.mean(found))
                reached = missing[0] == 0
                check_loss(loss, steps, job, config)
                if steps == config.steps or (missing[1] == 0 and loss < config.loss_target):
                    break
                optimiser.zero_grad(set_to_none=True)
                with torch.enable_grad(), watching(data_parallel):
                    part = 1.0 if data_parallel is None else data_parallel.share
                    total = part * edit + self._regularisation(maps, weights, context, bank, data_parallel)
                    if outside is not None:
                        moved = output_loss(self.at_the_end(outside, maps, context), outside.before)
                        total = total + part * config.output_coefficient * moved.to(total.device)
                    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, summed(gradients, data_parallel), strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimiser.param_groups[0]["lr"] = config.rate_at(steps)
                optimiser.step()
        used = {layer: use_of(weights[layer], data_parallel).cpu() for layer in self.layers}
        tensors = {layer: map_tensors(module) for layer, module in maps.items()}
        return TrainedEdit(tensors, used, loss, steps, time.perf_counter() - begin, reached)

    def outside(self, context: TrainingContext) -> Outside:
        """What the output loss looks at, from the texts of ``context``."""
        device = compute_device(self.model)
        ids, mask = pad_rows(context.texts, pad_token_id(self.tokenizer))
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        where = (torch.arange(len(ids)), mask.sum(1) - 1)
        with torch.no_grad():
            logits = self.model(**batch).logits
            before = logits[tuple(index.to(logits.device) for index in where)].float().log_softmax(-1)
        return Outside(batch, where, before)

    def at_the_end(self, outside: Outside, maps: Mapping[int, BasisWeightedMap], context: TrainingContext) -> Tensor:
        """The edited model's logits ``(N, V)`` at the texts' last tokens."""
        with self._hooked(maps, outside.where, context):
            logits = self.model(**outside.batch).logits
        return logits[tuple(index.to(logits.device) for index in outside.where)]

    @contextlib.contextmanager
    def _hooked(
        self, maps: Mapping[int, BasisWeightedMap], where: tuple, context: TrainingContext
    ) -> Iterator[dict[int, Tensor]]:
        weights: dict[int, Tensor] = {}

        def change(layer: int) -> Callable[[Tensor], Tensor]:
            def apply(hidden: Tensor) -> Tensor:
                here = tuple(index.to(hidden.device) for index in where)
                x = hidden[here].float()
                delta, weights[layer] = maps[layer].update(x)
                if layer in context.earlier:
                    delta = delta + context.earlier[layer](x)
                return hidden.index_put(here, (x + delta).to(hidden.dtype))

            return apply

        handles = [hook_block(self.blocks[layer], change(layer)) for layer in self.layers]
        try:
            yield weights
        finally:
            for handle in handles:
                handle.remove()

    def _regularisation(
        self,
        maps: Mapping,
        weights: Mapping[int, Tensor],
        context: TrainingContext,
        bank: Mapping,
        data_parallel: DataParallel | None = None,
    ) -> Tensor | float:
        config, total = self.config, 0.0
        device = compute_device(self.model)
        for layer, module in maps.items():
            if config.locality_coefficient and layer in bank:
                part = 1.0 if data_parallel is None else data_parallel.share
                total = total + part * config.locality_coefficient * locality_loss(module.weighting(bank[layer])).to(
                    device
                )
            if config.balance_coefficient:
                own = weights[layer]
                used = context.used.get(layer, torch.zeros(config.rank)).to(own.device)
                if data_parallel is not None:
                    own, used = data_parallel.use(own, used)
                total = total + config.balance_coefficient * balance_loss(own, used).to(device)
        return total


def watching(data_parallel: DataParallel | None) -> contextlib.AbstractContextManager[None]:
    """Inside, an error reaches the ranks that train the same edit; see :meth:`DataParallel.watched`."""
    return contextlib.nullcontext() if data_parallel is None else data_parallel.watched()


def summed(gradients: Sequence[Tensor | None], data_parallel: DataParallel | None) -> list[Tensor | None]:
    """The gradient of an edit from those of its parts; None stays None, it is so on every rank."""
    if data_parallel is None:
        return list(gradients)
    found = iter(data_parallel.sum([g for g in gradients if g is not None]))
    return [None if g is None else next(found) for g in gradients]


def use_of(weights: Tensor, data_parallel: DataParallel | None) -> Tensor:
    """Use of the bases ``(..., r)`` by an edit with the weights ``(..., n, r)``, on all ranks together."""
    return weights.detach().sum(-2) if data_parallel is None else data_parallel.total(weights)


def make_engine(
    model: nn.Module, tokenizer: Any, config: BaftConfig, layers: Sequence[int]
) -> ReferenceEngine | FastEngine | JointEngine:
    """The engine that ``config.engine`` names: ``reference``, or for ``auto`` the fast one where it can be.

    A model that is not in one piece on one device is trained by the reference, which calls it as a user would, and so is an edit
    whose loss looks at the model's outputs elsewhere. Joint requests
    in an order, or in mini-batches, have an engine of their own above it.
    """
    from .fast import FastEngine  # they build on this module
    from .joint import JointEngine

    reason = "" if config.engine == "reference" else split_reason(model)
    if reason:
        logger.warning("%s: %s; edits are trained by whole calls of it, not by the fast engine", _name(model), reason)
    whole = reason or config.engine == "reference" or config.output_coefficient
    kind = ReferenceEngine if whole else FastEngine
    engine = kind(model, tokenizer, config, layers)
    in_order = config.allocation == "joint" and (config.order == "depth" or config.mini_batch)
    return JointEngine(engine) if in_order else engine


def _name(model: nn.Module) -> str:
    return type(model).__name__
