"""A trainer for BaFT, derived from pyreft's ReftTrainer, for transformers 4.45.1 to 5.x."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pyreft import ReftTrainer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..core.basis_map import BasisWeightedMap
from ..core.losses import balance_loss, locality_loss
from ..errors import ConfigError
from ..gates import WeightingNetwork
from ..models.tokenization import IGNORE_INDEX
from .checkpoint import load_interventions, save_interventions
from .data_module import COLUMNS
from .intervention import BasisWeightedLoReFTIntervention

logger = logging.getLogger(__name__)

FOLDER = "intervenable_model"  # pyreft's name, inside an output or checkpoint folder
_INIT = inspect.signature(Trainer.__init__).parameters
_STEP = inspect.signature(Trainer.training_step).parameters


class BaftTrainer(ReftTrainer):
    """Trains the interventions of a ``pyreft.ReftModel``; the base model stays unchanged.

        loss = mean over target tokens + locality_coefficient * locality + balance_coefficient * balance

    Improvements over pyreft's own trainer:

    - ``compute_loss`` works with transformers 4.46 and later, and evaluation works.
    - A checkpoint is safetensors and JSON. It overwrites an earlier one, resumes exactly, and loads without unpickling
      foreign code.
    - Weight decay works. The Trainer selects parameters by names that pyreft's do not match, and so decays none of them.
    - The gradient does not depend on how a batch is split for accumulation, in transformers 4.45.1 too.
    - Position ids are right under left padding.

    Under ``torchrun`` or ``accelerate launch``, the processes divide each batch (``DistributedDataParallel``). A step then
    equals that of one process whose ``per_device_train_batch_size`` is multiplied by the number of processes; every target
    token counts equally. A data set that does not divide evenly is extended with its first rows, as the Trainer does.

    Example::

        args = TrainingArguments("out", num_train_epochs=20, learning_rate=1e-2, per_device_train_batch_size=8)
        module = make_edit_data_module(tokenizer, requests, positions="last", num_interventions=1)
        BaftTrainer(model=reft_model, tokenizer=tokenizer, args=args, **module).train()

    Args:
        model: from ``pyreft.get_reft_model``.
        args: the Trainer's arguments. ``remove_unused_columns`` has no effect. A ``report_to`` that lists everything
            installed, the default of transformers 4, counts as not set.
        tokenizer, processing_class: two names for one argument; either works in every version.
        bank: ``layer -> (N, d)`` unrelated representations, e.g. ``get_bank(...).unrelated`` of
            :mod:`baft_intervention.training.bank`. Weighting networks that are initialised from data (``cosine``) use it
            before the first step.
        used: ``layer -> (r,)`` how much earlier edits use each basis, for load balancing.
        locality_coefficient, balance_coefficient: weights of the losses in :mod:`baft_intervention.core.losses`; evaluation
            ignores them. Over accumulation steps and processes, both losses are averaged over micro-batches, weighted
            by their tokens.
        report_to: integrations to report to; overrides ``args``. A name, several names, ``"all"`` or ``"none"``.
        **kwargs: other arguments of the Trainer: ``train_dataset``, ``eval_dataset``, ``data_collator``, ``callbacks``, …

    Raises:
        ConfigError: a coefficient is negative, a required bank is missing, or the weighting reads tokens.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        bank: Mapping[int, Tensor] | None = None,
        used: Mapping[int, Tensor] | None = None,
        locality_coefficient: float = 0.0,
        balance_coefficient: float = 0.0,
        report_to: str | Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ConfigError("tokenizer and processing_class are two names for one argument; give only one of them")
        for name, value in (("locality", locality_coefficient), ("balance", balance_coefficient)):
            if isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}_coefficient is {value!r}; it must be a number of at least 0")
        args = TrainingArguments("tmp_trainer", report_to="none") if args is None else copy.copy(args)
        args.report_to = _reporting(args.report_to, report_to)
        kwargs["processing_class" if "processing_class" in _INIT else "tokenizer"] = tokenizer or processing_class
        super().__init__(model=model, args=args, **kwargs)
        # transformers 4.46 and later then pass compute_loss the number of target tokens in an accumulated batch
        self.model_accepts_loss_kwargs = True
        if self.args.world_size > 1 and hasattr(self.args, "average_tokens_across_devices"):
            self.args.average_tokens_across_devices = True  # the gradient of one process on all the data
        self.locality_coefficient, self.balance_coefficient = float(locality_coefficient), float(balance_coefficient)
        self._maps = {
            key: module.map
            for key, module in self._reft.interventions.items()
            if isinstance(module, BasisWeightedLoReFTIntervention)
        }
        self._bank, self._used = self._by_key(bank), self._by_key(used)
        for key, module in self._maps.items():
            if module.weighting.reads_tokens:
                raise ConfigError(
                    f"the weighting {type(module.weighting).__name__} reads tokens and several layers, but a pyreft "
                    "intervention sees one layer; use BaftEditor, or the weighting 'cosine' or 'linear'"
                )
            reason = "locality_coefficient > 0" if locality_coefficient else ""
            if module.weighting.needs_bank:
                reason = f"the weighting {type(module.weighting).__name__}"
            if reason and key not in self._bank:
                raise ConfigError(
                    f"{reason} needs unrelated representations of layer {self._reft.representations[key].layer}; "
                    "give bank={layer: (N, d)}, e.g. from baft_intervention.training.bank.get_bank"
                )
        self._share, self._window = 1.0, (0, torch.zeros(()))

    @property
    def _reft(self) -> Any:
        """The unwrapped ``ReftModel``."""
        return self.model

    def _by_key(self, per_layer: Mapping[int, Tensor] | None) -> dict[str, Tensor]:
        representations = self._reft.representations
        found = {key: (per_layer or {}).get(representations[key].layer) for key in self._maps}
        return {key: value.to(self.args.device) for key, value in found.items() if value is not None}

    # ------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; afterwards, every module of the model is in eval mode."""
        try:
            if not resume_from_checkpoint:
                self._start_weightings()
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for module in self._reft.modules():  # pyvene's own eval() reaches only the base model
                module.training = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if "num_items_in_batch" in _STEP:
            return super().training_step(model, inputs, *args, **kwargs)
        # Before 4.46, the number of tokens in an accumulated batch is not known in advance: keep the gradient the mean
        # over the tokens so far. The share also undoes the Trainer's division by the number of accumulation steps.
        counted = inputs["labels"].ne(IGNORE_INDEX).sum()
        everywhere: Any = self.accelerator.gather(counted.to(self.args.device).view(1))
        own, new = int(counted), int(everywhere.sum())
        gradients = [p.grad for _, p in self._reft.named_parameters() if p.grad is not None]
        seen, mean = self._window if gradients else (0, torch.zeros((), device=self.args.device))
        for gradient in gradients:
            gradient.mul_(seen / (seen + new))
        self._share = self.args.gradient_accumulation_steps * self.args.world_size * own / (seen + new)
        try:
            so_far = mean * (seen / (seen + new)) + super().training_step(model, inputs)
        finally:
            self._share = 1.0
        self._window = (seen + new, so_far)
        return so_far - mean

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        intervenable: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, or ``(loss, {"loss", "logits"})`` with ``return_outputs``. Evaluation adds no regularisation.

        Raises:
            ConfigError: the locations are for a different number of interventions than the model has.
        """
        training = torch.is_grad_enabled()
        with self._observed_weights(enabled=training and self.balance_coefficient > 0) as weights:
            output = self._forward(intervenable, inputs, labels=inputs["labels"])
        loss = output.loss
        if training:
            share = self._share
            if num_items_in_batch is not None:
                share = inputs["labels"].ne(IGNORE_INDEX).sum() / num_items_in_batch
                if getattr(self.args, "average_tokens_across_devices", False):
                    share = share * self.accelerator.num_processes
            loss = (loss + self._regularisation(weights, inputs)) * share
        return (loss, {"loss": loss, "logits": output.logits}) if return_outputs else loss

    def _forward(self, intervenable: Any, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
        locations, mask = inputs["intervention_locations"], inputs["attention_mask"]
        count = len(self._reft.interventions)
        if locations.ndim != 3 or locations.shape[1] != count:
            raise ConfigError(
                f"intervention_locations have shape {tuple(locations.shape)}, but the model has {count} interventions and "
                f"needs (batch, {count}, positions); pass num_interventions={count} to make_edit_data_module"
            )
        base = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        if not mask[:, 0].all():  # left padding: absolute positions must count from the text's first token
            base["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        # lists, never integers: an integer makes pyvene use one row's positions for the whole batch, from then on
        where = {"sources->base": (None, locations.permute(1, 0, 2).tolist())}
        return intervenable(base, unit_locations=where, use_cache=False, **kwargs)[1]

    def _regularisation(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for key, module in self._maps.items():
            if self.locality_coefficient:
                total = total + self.locality_coefficient * locality_loss(module.weighting(self._bank[key]))
            if self.balance_coefficient:
                own = weights[key][self._edited(key, inputs)]  # (n, r)
                used = self._used.get(key, torch.zeros(own.shape[-1], device=own.device))
                total = total + self.balance_coefficient * balance_loss(own, used)
        return total

    def _edited(self, key: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B, P)`` bool: locations that are text, not the collator's filler."""
        index = list(self._reft.sorted_keys).index(key)
        return inputs["attention_mask"].gather(1, inputs["intervention_locations"][:, index]) != 0

    @contextlib.contextmanager
    def _observed_weights(self, *, enabled: bool) -> Iterator[dict[str, Tensor]]:
        """Context that records the basis weights ``(B, P, r)`` of a forward pass per intervention, with their graph."""
        seen: dict[str, Tensor] = {}
        handles = [
            module.weighting.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
            for key, module in (self._maps if enabled else {}).items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _start_weightings(self) -> None:
        """Initialise the networks that start from data with the bank and the training set's representations."""
        default = WeightingNetwork.initialise
        starting = {k: m for k, m in self._maps.items() if type(m.weighting).initialise is not default}
        if not starting:
            return
        seen: dict[str, list[Tensor]] = {key: [] for key in starting}

        def collect(module: BasisWeightedMap, key: str) -> Any:
            # the hook returns the map's input, so the model runs unedited
            return module.register_forward_hook(lambda _m, given, _o: (seen[key].append(given[0]), given[0])[1])

        handles = [collect(module, key) for key, module in self._maps.items() if key in starting]
        data: Any = self.train_dataset
        rows = list(data)
        batches = [rows[i : i + self.args.eval_batch_size] for i in range(0, len(rows), self.args.eval_batch_size)]
        try:
            self._reft.eval()
            for batch in batches:
                inputs: Any = self._prepare_inputs(self.data_collator(batch))
                self._forward(self._reft, inputs)
                for key in starting:
                    seen[key][-1] = seen[key][-1][self._edited(key, inputs)].float()
        finally:
            for handle in handles:
                handle.remove()
        for key, module in starting.items():
            bank = self._bank.get(key)
            if bank is not None:
                module.weighting.fit_shared(bank)
            module.weighting.initialise(torch.cat(seen[key]), bank)

    # ------------------------------------------------------------------------------------------ the Trainer's hooks

    def get_decay_parameter_names(self, model: Any, *_: Any) -> list[str]:
        return [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)  # pyvene's forward does not name these columns

    # ------------------------------------------------------------------------------------------ saving and loading

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False) -> None:
        """Write the interventions to ``output_dir/intervenable_model``, replacing an earlier save."""
        if self.args.should_save:
            save_interventions(self._reft, Path(output_dir or str(self.args.output_dir)) / FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_interventions(self._reft, Path(resume_from_checkpoint) / FOLDER)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info("loading the best model from %s (score: %s)", best, self.state.best_metric)
        load_interventions(self._reft, Path(str(best)) / FOLDER)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _safe_torch_load():
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _safe_torch_load():
            super()._load_optimizer_and_scheduler(checkpoint)


def _reporting(of_args: Any, asked: str | Sequence[str] | None) -> list[str]:
    """The integrations that the user asked to report to; none by default."""
    if asked is not None:
        names: list[str] = [asked] if isinstance(asked, str) else list(asked)
        everything: list[str] = get_available_reporting_integrations()
        return everything if names == ["all"] else [name for name in names if name != "none"]
    names = [of_args] if isinstance(of_args, str) else list(of_args or ())
    by_default = int(transformers.__version__.split(".")[0]) < 5 and names == get_available_reporting_integrations()
    if names and by_default:
        logger.warning("not reporting to %s; give BaftTrainer(report_to=...) to do so", ", ".join(names))
        return []
    return names


@contextlib.contextmanager
def _safe_torch_load() -> Iterator[None]:
    """Context in which ``torch.load`` reads only tensors and numpy's generator state, and never runs code.

    The Trainer's optimiser, scheduler and generator files are pickles. On torch before 2.6, transformers 4.45.1 reads
    them without restriction. On later versions, it cannot read the generator state, which contains a numpy array.
    """
    core = np.core if np.__version__.startswith("1.") else np._core  # pyright: ignore[reportAttributeAccessIssue]
    numpy_types = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # pyright: ignore[reportAttributeAccessIssue]
    allowed, forced = torch.serialization.get_safe_globals(), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    torch.serialization.add_safe_globals(numpy_types)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced
