"""The trainable map of one edit at one layer, as a plain ``nn.Module``."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..gates import WeightingNetwork, make_weighting
from .functional import baft_update
from .orthonormal import orthonormal_rows, random_orthonormal


class BasisWeightedMap(nn.Module):
    """``Phi(h) = h + R^T diag(w(h)) (A h + b - R h)``, ``w(h)`` from a weighting network.

    Parameters are fp32 and the arithmetic is fp32 whatever the dtype of ``h``; the result has the dtype of ``h``.
    Train and eval mode are the same.

    Args:
        embed_dim: d, the size of the representation.
        low_rank_dimension: r, the number of bases, 1 <= r <= d.
        weighting: name of a registered weighting network, or a network already built.
        weighting_options: keyword arguments of that network, when given by name.
        init: ``identity`` starts at ``A = R, b = 0``, so the map does nothing until trained; ``random`` starts
            ``A`` and ``b`` as a linear layer, as pyreft's LoReFT does.

    Attributes:
        basis: the raw parameter ``V (r, d)``; the orthonormal ``R`` is :attr:`rotation`.
        source_weight, source_bias: ``A (r, d)`` and ``b (r,)``.
        last_weights: detached ``w(h) (..., r)`` of the last call, for plots and statistics.

    Raises:
        ConfigError: r out of range, an unknown weighting or option.
    """

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        *,
        weighting: str | WeightingNetwork = "linear",
        weighting_options: dict[str, Any] | None = None,
        init: Literal["identity", "random"] = "identity",
    ):
        super().__init__()
        if isinstance(low_rank_dimension, bool) or not isinstance(low_rank_dimension, int):
            raise ConfigError(f"low_rank_dimension is {low_rank_dimension!r}; it must be a whole number")
        if init not in ("identity", "random"):
            raise ConfigError(f"init is {init!r}; it must be 'identity' or 'random'")
        self.basis = nn.Parameter(random_orthonormal(low_rank_dimension, embed_dim))
        self.source_weight = nn.Parameter(self.basis.detach().clone())
        self.source_bias = nn.Parameter(torch.zeros(low_rank_dimension))
        if init == "random":
            linear = nn.Linear(embed_dim, low_rank_dimension)
            self.source_weight.data, self.source_bias.data = linear.weight.data, linear.bias.data
        if isinstance(weighting, WeightingNetwork):
            if weighting_options:
                raise ConfigError(
                    "weighting_options are given beside a network that is built already; give one of them"
                )
            if (weighting.embed_dim, weighting.rank) != (embed_dim, low_rank_dimension):
                raise ConfigError(
                    f"the weighting network is for d = {weighting.embed_dim}, r = {weighting.rank}; "
                    f"this map has d = {embed_dim}, r = {low_rank_dimension}"
                )
            self.weighting = weighting
        else:
            self.weighting = make_weighting(weighting, embed_dim, low_rank_dimension, **(weighting_options or {}))
        # kept in the state, because pyvene's load forgets constructor arguments
        self.weighting_spec = (
            {"name": weighting, "options": weighting_options or {}} if isinstance(weighting, str) else None
        )
        self.last_weights: Tensor | None = None
        self._rotation_cache: tuple[Tensor, Tensor] | None = None

    @property
    def rotation(self) -> Tensor:
        """``R (r, d)``, orthonormal rows, fp32; differentiable where gradients are enabled, cached where not."""
        if torch.is_grad_enabled() and self.basis.requires_grad:
            return orthonormal_rows(self.basis)
        with torch.inference_mode(False):  # a tensor of inference mode could not enter a later graph
            value = self.basis.detach()
            if self._rotation_cache is None or not torch.equal(self._rotation_cache[0], value):
                self._rotation_cache = (value.clone(), orthonormal_rows(value))
        return self._rotation_cache[1]

    def _apply(self, fn: Any, recurse: bool = True) -> BasisWeightedMap:
        """Follow a move to another device, and stay fp32 where the model around is cast to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == torch.float32
            return tensor.to(moved.device) if half else moved

        self._rotation_cache = self.last_weights = None
        return super()._apply(move, recurse)

    def update(self, h: Tensor, stage: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(Phi(h) - h, w(h))`` in fp32 with their graph: ``(..., d)`` and ``(..., r)``.

        ``stage (...)`` is for a weighting network that reads tokens.
        """
        # under bf16 autocast the products below would be rounded to bf16: the contract is fp32 throughout
        with torch.autocast(h.device.type, enabled=False):
            x = h.float()
            weights = self.weighting(x) if stage is None else self.weighting(x, stage)
            delta = baft_update(x, self.rotation, self.source_weight.float(), self.source_bias.float(), weights)
        return delta, weights

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(self.weighting_spec).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Read by :meth:`_load_from_state_dict`, before the tensors are."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        packed = state_dict.get(prefix + "_extra_state")
        spec = json.loads(bytes(packed.cpu().tolist())) if packed is not None else None
        if spec is not None and spec != json.loads(json.dumps(self.weighting_spec)):  # a tuple comes back as a list
            network = make_weighting(spec["name"], self.basis.shape[1], self.basis.shape[0], **spec["options"])
            self.weighting, self.weighting_spec = network.to(self.basis.device), spec
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, h: Tensor) -> Tensor:
        delta, weights = self.update(h)
        self.last_weights = weights.detach()
        return (h + delta).to(h.dtype)
