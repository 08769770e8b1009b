"""From the last block's output to the loss of target tokens: the final norm, the output matrix, cross entropy.

The output matrix holds a fifth of a small model's parameters or more, and an edit needs it at a few positions only. Two
plain products (the logits, then their gradient) read it from memory twice and keep ``(N, V)`` logits in between.
:func:`chunked_cross_entropy` reads it once, in slices of the vocabulary that fit into the cache, and keeps running sums
instead of logits (the online softmax): one pass gives the loss, the argmax and the gradient.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.structure import text_config
from .block_stubs import skipped_blocks
from .onednn_linear import linear

logger = logging.getLogger(__name__)

# logits in a slice: on a CPU as many as stay in a core's cache (measured with SmolLM2 at 1 to 300 positions), on an
# accelerator so many that they need little memory beside the weights
_CPU_SLICE, _DEVICE_SLICE = 400_000, 64 << 20


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, and whether its label is the argmax, without keeping ``(N, V)`` logits.

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
    """Rows of ``weight`` in one slice, for ``n`` rows of input."""
    rows = (_CPU_SLICE if weight.device.type == "cpu" else _DEVICE_SLICE) // max(n, 1)
    return max(256, min(rows, weight.shape[0]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        n, wanted = hidden.shape[0], hidden.requires_grad
        top = hidden.new_full((n,), -torch.inf, dtype=torch.float32)  # running maximum
        # the sums leave out the label's own term: p - 1 would lose all its digits where p is near 1
        others, own, slope = torch.zeros_like(top), torch.zeros_like(top), torch.ones_like(top)
        best = torch.full_like(labels, -1)
        exact = hidden.dtype in (torch.float32, torch.float64)  # no two logits are equal
        pull = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        bent = None
        for begin in range(0, weight.shape[0], rows):
            part = weight[begin : begin + rows]
            logits = linear(hidden, part, None if bias is None else bias[begin : begin + rows]).float()  # (n, C)
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
                best = torch.where(value > top, index + begin, best)  # the first of equal ones, as argmax does
            higher = torch.maximum(top, value)
            shrink = torch.exp(top - higher)
            mass = logits.sub_(higher.unsqueeze(1)).exp_()
            mass.scatter_(1, at, torch.where(inside.unsqueeze(1), 0.0, mass.gather(1, at)))
            others = others * shrink + mass.sum(1)
            if wanted:
                if bent is not None:
                    mass = mass * (1.0 - bent * bent)
                    slope = torch.where(inside, 1.0 - bent.gather(1, at).squeeze(1).square(), slope)
                pull = pull.mul_(shrink.unsqueeze(1)).add_(linear(mass.to(part.dtype), part.t()))
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


class OutputHead:
    """What a model computes behind its last block, at chosen positions.

    One watched call of the model finds the modules that run there: a chain that starts at the last block's output and ends
    in a plain linear layer. Where that chain, with the soft cap of the model's config or without, gives the model's own
    logits, :meth:`losses` applies it; elsewhere it calls the model with its blocks skipped.

    Args:
        model, blocks: the model and its decoder blocks.
        extras: the form of a block's output, see :func:`~.block_stubs.as_output`.
        sample: ``(n, d)`` outputs of the last block to try the chain with.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, extras: int | None, sample: Tensor):
        self.model, self.blocks, self.extras = model, blocks, extras
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
        """The model's own logits ``(N, V)`` for outputs ``(N, d)`` of its last block."""
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        with skipped_blocks(self.blocks, len(self.blocks) - 1, hidden.unsqueeze(1), self.extras):
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
            logger.info(
                "the output matrix of %s is not a plain linear layer; its own code runs", type(self.model).__name__
            )
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
        logger.info("%s does more to its logits than a linear layer; its own code runs", type(self.model).__name__)


_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
