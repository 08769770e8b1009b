"""Memory: how much is free, how much training an edit takes, and which errors mean that it ran out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..models.structure import hidden_size, text_config
from .types import TrainingRow

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """The free memory of ``device``: within a container's limit, and including what torch holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _available()
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no such group; only the machine limits
    return max(free, 0)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (OSError, ValueError, AttributeError):
        return 4 << 30


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory ran out, on a CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def edit_bytes(model: nn.Module, rows: Sequence[TrainingRow], above: int, numbers: int) -> int:
    """A generous estimate of the peak memory of training one edit, in bytes.

    Args:
        model: the base model.
        rows: the rows of the largest edit.
        above: blocks above the lowest edited one.
        numbers: trained numbers of an edit.
    """
    config, d = text_config(model), hidden_size(model)
    first = next(model.parameters())
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or max(d // 64, 1)
    total = 0
    for row in rows:
        length, width = len(row.ids), len(row.ids) - min(row.positions)
        reading = length * (4 * d + 2 * inner + 2 * above * d) + heads * length * length
        graph = above * (width * (14 * d + 5 * inner) + 3 * heads * width * length)
        total += (reading + graph) * max(first.element_size(), 2) + 8 * width * d * 4
    # values, two moments, gradient, the update's temporaries, and the decomposition's: fp32
    return total + 14 * numbers * 4
