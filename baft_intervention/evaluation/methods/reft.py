"""LoReFT and DiReFT: pyreft's own intervention modules, in a plain forward hook.

The modules are pyreft's classes, unchanged, but without pyvene's model around them: it removes every forward hook at each
call, runs the whole model at each step, and edits wrong rows if prompts differ in length. A test shows that module and hook
give the same as pyreft's ``ReftModel``.

Settings follow pyreft's own examples for one layer: fp32, no dropout (pyreft applies it to the whole residual stream, even
after ``eval()``), no weight decay (one step turns R into 0 under torch's orthogonal parametrisation), last prompt token,
rank 12 as in the paper's Figure 1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError
from ...models.structure import find_blocks, hidden_size
from ...requests import EditRequest
from ...runtime.call_state import hook_block
from ..edited import EditCost, EditedModel
from ..fit import Fitting, fit, training_batches
from ..forward import LogitReader
from .base import Method, as_edit_error, register_method, resolve_layer


@register_method("loreft")
@dataclass(frozen=True)
class Loreft(Method):
    """LoReFT (pyreft's LoreftIntervention): one layer's output at the last prompt token.

    Args:
        layer: block whose output is edited; a fraction counts as a share of the depth.
        rank: dimension of the edited subspace.
        learning_rate, steps, loss_target, append_eos: see :class:`~baft_intervention.evaluation.fit.Fitting`.
    """

    intervention = "LoreftIntervention"
    layer: float = 0.9
    rank: int = 12
    learning_rate: float = 5e-3
    steps: int = 60
    loss_target: float = 0.02
    append_eos: bool = False

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        return _ReftModel(self, model, tokenizer)


@register_method("direft")
@dataclass(frozen=True)
class Direft(Loreft):
    """DiReFT (pyreft's DireftIntervention): ``h + R^T (W h + b)`` at the last prompt token."""

    intervention = "DireftIntervention"


def make_intervention(name: str, width: int, rank: int, seed: int) -> Any:
    """One of pyreft's intervention modules in fp32, without dropout, initialised from ``seed``.

    Raises:
        ConfigError: pyreft is not installed, or the rank is too large.
    """
    if not 1 <= rank <= width:
        raise ConfigError(f"rank is {rank}; it must be from 1 to the hidden size {width}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pyvene prints at import
            import pyreft
    except ImportError as error:
        raise ConfigError(
            f"methods loreft and direft need pyreft ({error}); pip install --no-deps pyreft==0.1.0 pyvene==0.1.8"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(pyreft, name)(embed_dim=width, low_rank_dimension=rank, dtype=torch.float32, dropout=0.0)


class _ReftModel(EditedModel):
    def __init__(self, method: Loreft, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.method = method
        self.layer = resolve_layer(model, method.layer)
        self.first_changed_block = self.layer + 1
        self.reader = LogitReader(model)
        self.module: Any = None
        self._lengths: list[int] | None = None
        self._handle: Any = None

        self._fresh_module()  # raises now, not at the first edit, for a bad rank or a missing pyreft

    def _fresh_module(self) -> Any:
        s = self.method
        module = make_intervention(s.intervention, hidden_size(self.model), s.rank, s.seed)
        return module.to(self.model.get_input_embeddings().weight.device)

    @contextlib.contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        before, self._lengths = self._lengths, list(lengths)
        try:
            yield
        finally:
            self._lengths = before

    def _change(self, hidden: torch.Tensor) -> torch.Tensor | None:
        if self._lengths is None:
            return None  # outside prompts(): a decoding step, or the unedited model
        rows = torch.arange(len(self._lengths), device=hidden.device)
        last = torch.tensor(self._lengths, device=hidden.device) - 1
        x = hidden[rows, last].float()  # (B, d)
        return hidden.index_put((rows, last), self.module(x).to(hidden.dtype))

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        s = self.method
        fresh = self.module is None
        if fresh:
            self.module = self._fresh_module()
            self._handle = hook_block(find_blocks(self.model)[self.layer], self._change)
        trained = list(self.module.parameters())
        before = [p.detach().clone() for p in trained]
        settings = Fitting(s.learning_rate, s.steps, s.loss_target, append_eos=s.append_eos)
        try:
            batches = training_batches(requests, self.model, self.tokenizer, append_eos=s.append_eos)
            block = min(self.first_changed_block, len(find_blocks(self.model)) - 1)
            steps, loss = fit(
                self.model, self.reader, batches, trained, settings, first_block=block, at_prompt=self.prompts
            )
        except BaseException as error:
            if fresh:
                self.restore()
            else:
                with torch.no_grad():
                    for p, value in zip(trained, before, strict=True):
                        p.copy_(value)
            raise as_edit_error(error, requests) from error
        numbers = sum(p.numel() for p in trained)
        self.cost = EditCost(steps, loss, numbers, 4 * numbers)  # R, W and b in fp32
        return self.cost

    def restore(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self.module = None
