"""Linear layers with frozen fp32 weights on a CPU, computed by oneDNN.

torch computes fp32 products with MKL. On an AMD EPYC core MKL reaches 95 GFLOP/s on large products and 15 on the few rows
of a single edit; oneDNN reaches 215 and 30 (torch 2.13). torch contains oneDNN and uses it for bf16, but for fp32 only its
own compiler calls it. Both results are fp32 and differ by rounding.

Everything else (another device or dtype, a layer that is not a plain linear one, a torch without the operator) uses
torch's own product.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (..., n) @ weight (m, n)^T + bias (m,)``; differentiable in ``x`` alone."""
    if not _usable(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


@contextlib.contextmanager
def onednn_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the linear layers among ``modules`` compute with :func:`linear`; their weights must be frozen.

    Subclasses of linear layers, and parametrized, wrapped or compiled ones, keep their own ``forward``.
    """
    changed = [module for module in modules if type(module) in _FORWARD and "forward" not in module.__dict__]
    try:
        for module in changed:
            module.__dict__["forward"] = functools.partial(_FORWARD[type(module)], module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def linear_layers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers of ``blocks`` that :func:`onednn_products` speeds up."""
    found = [m for block in blocks if getattr(block, "_compiled_call_impl", None) is None for m in block.modules()]
    return [m for m in found if type(m) in _FORWARD and _fits(m.weight)]  # type: ignore[arg-type]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, so it need not be saved
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _onednn(grads[0], ctx.weight.t(), None), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)  # type: ignore[arg-type]


def _conv1d(module: nn.Module, x: Tensor) -> Tensor:
    return linear(x, module.weight.t(), module.bias)  # type: ignore[operator, arg-type]


_FORWARD: dict[type, Callable[[nn.Module, Tensor], Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}


def _usable(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and _fits(weight)


def _fits(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and torch.backends.mkldnn.enabled
        and _available()
    )


@functools.cache
def _available() -> bool:
    """Whether torch has the operator, and it takes a transposed view and agrees with ``F.linear``."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    bias = torch.randn(5, generator=generator)
    try:
        there, back = _onednn(x, weight, bias), _onednn(torch.ones(3, 5), weight.t(), None)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    expected = torch.ones(3, 5) @ weight
    return torch.allclose(there, F.linear(x, weight, bias), atol=1e-5) and torch.allclose(back, expected, atol=1e-5)
