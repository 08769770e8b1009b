"""Products with frozen fp32 weights on a CPU, by oneDNN.

torch gives fp32 products to MKL, which is made for other machines than most: on an AMD EPYC core it reaches 95
GFLOP/s on large products and 15 on the few rows of a single edit, oneDNN 215 and 30 (torch 2.13). torch has oneDNN built
in and uses it for bf16, but offers it for fp32 to its own compiler alone. The result is fp32 either way and differs by
rounding.

Where anything is different (another device or dtype, a layer that is not a plain linear one, a torch without the
operator) torch's own product is taken.
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


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (..., n) @ weight (m, n)^T + bias (m,)``; differentiable in ``x`` alone."""
    if not _takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return _onednn(x, weight, bias)


@contextlib.contextmanager
def faster_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the linear layers among ``modules`` compute with :func:`product`; their weights must be frozen.

    Only plain layers: those of a subclass, parametrized, wrapped or compiled ones keep their own ``forward``.
    """
    changed = [module for module in modules if type(module) in _FORWARD and "forward" not in module.__dict__]
    try:
        for module in changed:
            module.__dict__["forward"] = functools.partial(_FORWARD[type(module)], module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def layers_to_speed_up(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers of ``blocks`` that :func:`faster_products` would change; none where it would not help."""
    found = [m for block in blocks if getattr(block, "_compiled_call_impl", None) is None for m in block.modules()]
    return [m for m in found if type(m) in _FORWARD and _fits(m.weight)]  # type: ignore[arg-type]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen: it needs no saving
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _onednn(grads[0], ctx.weight.t(), None), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return product(x, module.weight, module.bias)  # type: ignore[arg-type]


def _conv1d(module: nn.Module, x: Tensor) -> Tensor:
    return product(x, module.weight.t(), module.bias)  # type: ignore[operator, arg-type]


_FORWARD: dict[type, Callable[[nn.Module, Tensor], Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}


def _takes(x: Tensor, weight: Tensor) -> bool:
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
    """Whether this torch has the operator, takes a transposed view, and computes with it what ``F.linear`` does."""
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
