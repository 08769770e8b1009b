"""From the last block's output to the loss of target tokens: the final norm, the output matrix, cross entropy.

The output matrix of a small model is a fifth of its parameters or more, and an edit asks it for a few positions only.
Two plain products (logits, then their gradient) read it from memory twice and keep ``(N, V)`` logits between them.
:func:`chunked_cross_entropy` reads it once, a slice of the vocabulary at a time while that lies in the cache, and
keeps running sums in place of logits (the online softmax): loss, argmax and the gradient come out of one pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.structure import text_config
from .block_stubs import as_output, stubbed_blocks
from .onednn_linear import product

logger = logging.getLogger(__name__)

# logits at a time: on a CPU as many as stay in a core's cache (measured: SmolLM2, 1 to 300 positions), on an
# accelerator so that they are little beside the weights
_SLICE = {"cpu": 400_000}
_DEVICE_SLICE = 64 << 20


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and whether its label is the argmax, without the ``(N, V)`` logits.

    Args:
        hidden: ``(N, d)``, what the output matrix is applied to.
        weight: ``(V, d)``, frozen.
        bias: ``(V,)`` or None, frozen.
        labels: ``(N,)``.
        cap: logits are ``cap * tanh(z / cap)`` of the products ``z`` (Gemma's soft cap); None for ``z``.

    Returns:
        ``(loss (N,) fp32 in nats, differentiable in hidden; hit (N,) bool)``.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, cap, slice_rows(weight, hidden.shape[0]))


def slice_rows(weight: Tensor, n: int) -> int:
    """Rows of ``weight`` that are taken at a time for ``n`` rows of input."""
    rows = _SLICE.get(weight.device.type, _DEVICE_SLICE) // max(n, 1)
    return max(256, min(rows, weight.shape[0]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        n, wanted = hidden.shape[0], hidden.requires_grad
        top = hidden.new_full((n,), -torch.inf, dtype=torch.float32)  # running maximum
        # the label's own term is kept out of the sums: p - 1 would lose all its digits where p is near 1
        others, own, slope = torch.zeros_like(top), torch.zeros_like(top), torch.ones_like(top)
        best = torch.full_like(labels, -1)
        exact = hidden.dtype in (torch.float32, torch.float64)  # two logits are never equal
        pull = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        bent = None
        for begin in range(0, weight.shape[0], rows):
            part = weight[begin : begin + rows]
            logits = product(hidden, part, None if bias is None else bias[begin : begin + rows]).float()  # (n, C)
            if cap is not None:
                bent = torch.tanh(logits / cap)
                logits = bent * cap
            at = labels - begin
            inside = (at >= 0) & (at < part.shape[0])
            at = at.clamp(0, part.shape[0] - 1).unsqueeze(1)
            own = torch.where(inside, logits.gather(1, at).squeeze(1), own)
            if exact:
                value = logits.amax(1)  # ten times as fast as with the index
            else:
                value, index = logits.max(1)
                best = torch.where(value > top, index + begin, best)  # the first of equal ones, as argmax takes it
            higher = torch.maximum(top, value)
            shrink = torch.exp(top - higher)
            mass = logits.sub_(higher.unsqueeze(1)).exp_()
            mass.scatter_(1, at, torch.where(inside.unsqueeze(1), 0.0, mass.gather(1, at)))
            others = others * shrink + mass.sum(1)
            if wanted:
                if bent is not None:
                    mass = mass * (1.0 - bent * bent)
                    slope = torch.where(inside, 1.0 - bent.gather(1, at).squeeze(1).square(), slope)
                pull = pull.mul_(shrink.unsqueeze(1)).add_(product(mass.to(part.dtype), part.t()))
            top = higher
        total = others + torch.exp(own - top)
        if wanted:
            push = weight[labels].float() * (others * slope).unsqueeze(1)
            ctx.save_for_backward((pull - push) / total.unsqueeze(1))
            ctx.dtype = hidden.dtype
        hit = own >= top if exact else best == labels
        ctx.mark_non_differentiable(hit)
        return top + total.log() - own, hit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (pull,) = ctx.saved_tensors
        return (pull * grads[0].unsqueeze(1)).to(ctx.dtype), None, None, None, None, None


class Head:
    """What a model does behind its last block, at chosen positions.

    The modules that it runs there are found by watching one call: those that take each other's output, beginning with
    the last block's and ending in a plain linear layer. Where applying them by hand gives the model's own logits, with
    the soft cap of its config or without, that is done; else the model is called with stand-ins for its blocks.

    Args:
        model, blocks: the model and its blocks.
        extras: what each block's output is, see :func:`~.standing.as_output`.
        sample: ``(n, d)`` outputs of the last block to try it with.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, extras: Sequence[int | None], sample: Tensor):
        self.model, self.blocks, self.extras = model, blocks, list(extras)
        self.before: list[nn.Module] = []
        self.linear: nn.Linear | None = None
        self.cap: float | None = None
        self._find(sample)

    def losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden (N, d)`` of the last block, ``labels (N,)`` -> ``(loss (N,) in nats, hit (N,) bool)``."""
        if self.linear is None:
            logits = self.call(hidden).float()
            return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels
        hidden = hidden.unsqueeze(1)
        for module in self.before:
            hidden = module(hidden)
        return chunked_cross_entropy(hidden.squeeze(1), self.linear.weight, self.linear.bias, labels, cap=self.cap)

    def call(self, hidden: Tensor) -> Tensor:
        """The model's own logits ``(N, V)`` where its last block gives ``hidden (N, d)``."""
        count, last = hidden.shape[0], len(self.blocks) - 1

        def answer(number: int) -> Callable[[tuple, dict], Any]:
            return lambda _args, _kwargs: as_output(hidden.unsqueeze(1), self.extras[number])

        ids = torch.zeros(count, 1, dtype=torch.long, device=hidden.device)
        with stubbed_blocks(self.blocks, {n: answer(n) for n in range(last + 1)}):
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return out.logits[:, 0]

    @torch.no_grad()
    def _find(self, sample: Tensor) -> None:
        inside = {id(m) for block in self.blocks for m in block.modules()}
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def watch(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.append((module, args[0], output))

        handles = [m.register_forward_hook(watch) for m in self.model.modules() if id(m) not in inside]
        try:
            expected = self.call(sample).float()
        finally:
            for handle in handles:
                handle.remove()
        chain, current = [], sample
        for module, given, output in seen:
            if given.data_ptr() == current.data_ptr() and given.numel() == current.numel():
                chain.append(module)
                current = output
        if not chain or type(chain[-1]) is not nn.Linear or hasattr(chain[-1], "parametrizations"):
            logger.info("the output matrix of %s is not a plain one; its own code is called", type(self.model).__name__)
            return
        hidden = sample.unsqueeze(1)
        for module in chain:
            hidden = module(hidden)
        logits = hidden[:, 0].float()
        capped = getattr(text_config(self.model), "final_logit_softcapping", None)
        for cap in (None, capped):
            found = logits if cap is None else torch.tanh(logits / cap) * cap
            if torch.allclose(found, expected, rtol=_CLOSE[sample.dtype], atol=_CLOSE[sample.dtype]):
                self.before, self.linear, self.cap = chain[:-1], chain[-1], cap
                return
        logger.info("%s does more to its logits than a linear layer; its own code is called", type(self.model).__name__)


_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
