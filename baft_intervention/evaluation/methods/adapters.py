"""LoRA and AdaLoRA, with peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError
from ...models.structure import find_blocks
from ...requests import EditRequest
from ..edited import EditCost, EditedModel
from ..fit import Fitting, fit, training_batches
from ..forward import LogitReader
from .base import Method, as_edit_error, register_method, resolve_layer


@register_method("lora")
@dataclass(frozen=True)
class Lora(Method):
    """LoRA (peft) on chosen projections of the upper blocks.

    Args:
        rank, alpha: the update is ``(alpha / rank) B A``.
        target_modules: names of the projections; by default those of queries and values (the LoRA paper's choice), or
            the one matrix that holds them.
        first_layer: lowest block that has an adapter; a fraction counts as a share of the depth.
        learning_rate, steps, loss_target, append_eos: see :class:`~baft_intervention.evaluation.fit.Fitting`.
    """

    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ()
    first_layer: float = 0.67
    learning_rate: float = 1e-3
    steps: int = 60
    loss_target: float = 0.02
    append_eos: bool = False

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        return _PeftModel(self, model, tokenizer)

    def peft_config(self, layers: list[int], targets: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=targets, layers_to_transform=layers,
        )  # fmt: skip


@register_method("adalora")
@dataclass(frozen=True)
class AdaLora(Lora):
    """AdaLoRA (peft): updates in SVD form, whose ranks are reduced during training.

    Args:
        initial_rank: rank of every update at the start; ``rank`` is the mean rank at the end.
        orthogonality: weight of the penalty on ``P^T P - I`` and ``Q Q^T - I``.
    """

    learning_rate: float = 5e-3
    initial_rank: int = 12
    orthogonality: float = 0.1

    def peft_config(self, layers: list[int], targets: list[str]) -> Any:
        from peft import AdaLoraConfig

        total = max(self.steps, 10)
        return AdaLoraConfig(
            init_r=self.initial_rank, target_r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, bias="none",
            task_type="CAUSAL_LM", target_modules=targets, layers_to_transform=layers,
            tinit=total // 5, tfinal=total // 5, total_step=total, deltaT=1, orth_reg_weight=self.orthogonality,
        )  # fmt: skip


_QUERY_VALUE = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("query", "value"), ("Wqkv",))


def target_modules(block: torch.nn.Module, wanted: Sequence[str]) -> list[str]:
    """Names of the adapted projections in a block.

    Raises:
        ConfigError: the block has no projection of that name.
    """
    names = [n for n, m in block.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    last = {n.rsplit(".", 1)[-1] for n in names}
    for choice in (wanted,) if wanted else _QUERY_VALUE:
        if last.issuperset(choice):
            return list(choice)
    raise ConfigError(
        f"no projections {', '.join(wanted) or 'of queries and values'} in {type(block).__name__}; set target_modules to some "
        f"of {', '.join(sorted(last))}"
    )


class _PeftModel(EditedModel):
    def __init__(self, method: Lora, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.method = method
        self.first_changed_block = resolve_layer(model, method.first_layer)
        self.reader = LogitReader(model)
        self.peft: Any = None
        self.step = 0
        self.targets = target_modules(find_blocks(model)[0], method.target_modules)
        try:
            method.peft_config([0], self.targets)
        except ImportError as error:
            raise ConfigError(f"method {method.name!r} needs peft ({error}); pip install 'peft>=0.13'") from error

    def _inject(self) -> None:
        """Put new adapters into the model; their output factor is 0, so they change nothing yet."""
        from peft import get_peft_model

        layers = list(range(self.first_changed_block, len(find_blocks(self.model))))
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        try:
            with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft sets Conv1D's fan_in_fan_out and warns
                torch.manual_seed(self.method.seed)
                self.peft = get_peft_model(self.model, self.method.peft_config(layers, self.targets))
        except ValueError as error:
            raise ConfigError(f"peft cannot adapt this model: {error}; set target_modules") from error
        self.step = 0

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for n, p in self.model.named_parameters() if "lora_" in n and p.is_floating_point()]

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        s = self.method
        fresh = self.peft is None
        required = [(p, p.requires_grad) for p in self.model.parameters()]
        if fresh:
            self._inject()
        trained = [p for n, p in self.model.named_parameters() if "lora_" in n and "ranknum" not in n]
        before = [p.detach().clone() for p in self._parameters()]
        settings = Fitting(s.learning_rate, s.steps, s.loss_target, append_eos=s.append_eos)
        try:
            batches = training_batches(requests, self.model, self.tokenizer, append_eos=s.append_eos)
            steps, loss = fit(
                self.model, self.reader, batches, trained, settings, first_block=self.first_changed_block,
                after_step=self._allocate if isinstance(s, AdaLora) else None,
                penalty=(lambda: _orthogonality(trained, s.orthogonality)) if isinstance(s, AdaLora) else None,
            )  # fmt: skip
        except BaseException as error:
            if fresh:
                self.restore()
            else:
                with torch.no_grad():
                    for p, value in zip(self._parameters(), before, strict=True):
                        p.copy_(value)
            raise as_edit_error(error, requests) from error
        finally:
            for p, flag in required:
                p.requires_grad_(flag)
        numbers = sum(p.numel() for p in trained)
        self.cost = EditCost(steps, loss, numbers, sum(p.numel() * p.element_size() for p in trained))
        return self.cost

    def _allocate(self) -> None:
        self.step += 1
        self.peft.base_model.update_and_allocate(self.step)

    def restore(self) -> None:
        if self.peft is None:
            return
        self.peft.unload()
        self.peft = None
        for name in ("peft_config", "_hf_peft_config_loaded"):
            self.model.__dict__.pop(name, None)


def _orthogonality(parameters: Sequence[torch.nn.Parameter], weight: float) -> torch.Tensor:
    """``weight * mean ||P P^T - I||_F`` over the outer factors, which peft adds to the loss in its own forward."""
    terms = []
    for p in parameters:
        rows, columns = p.shape
        if min(rows, columns) == 1:
            continue  # the singular values
        gram = p @ p.T if rows < columns else p.T @ p
        terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
    return weight * torch.stack(terms).mean()
