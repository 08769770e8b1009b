"""The unedited model's outputs: computed once, kept on disk, never used when stale.

Locality, KL divergence and ConvSent's score compare with the model before the edit. Its outputs depend on the parameters,
the exact ids, how they are batched, this code and the libraries. The key of a file is a hash of all of these, and the
file repeats it, so a stale output is never found. Each record has one file, written under a temporary name and renamed:
parallel runs may share a folder, and a killed run leaves no incomplete file.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..environment import cache_folder
from .queries import Query, TokenRow

logger = logging.getLogger(__name__)


@dataclass
class BaselineOutputs:
    """The unedited model on one record's queries.

    Args:
        predicted: argmax ids of each query.
        log_probs: log-probability of each target token of each query.
        states: hidden states before the output head, ``(sum of widths of divergence queries, d)``; log-probabilities
            ``(..., V)`` if the head cannot be run by itself.
        block_inputs: ``block -> (sum of row lengths, d)``, inputs of the blocks at which edited models may resume.
        as_tuple: whether the model's blocks return tuples.
    """

    predicted: list[list[int]]
    log_probs: list[list[float]]
    states: torch.Tensor
    block_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    as_tuple: bool = False


def baseline_key(queries: list[Query], rows: list[TokenRow], settings: dict[str, Any]) -> str:
    """sha256 (hex) of everything that the outputs depend on.

    Args:
        queries, rows: those of one record.
        settings: model fingerprint, code and library versions, batching, device, threads, resume block.
    """
    content = {
        "queries": [[q.prompt_ids, q.target_ids, q.divergence] for q in queries],
        "rows": [[r.prompt_length, r.ids, r.width] for r in rows],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """A hash of the modules that compute the outputs."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for name in ("queries", "baseline_outputs", "scoring", "forward"):
        digest.update((package / "evaluation" / f"{name}.py").read_bytes())
    digest.update((package / "runtime" / "block_stubs.py").read_bytes())
    return digest.hexdigest()[:16]


class BaselineCache:
    """Baseline outputs by key, in a folder or in memory.

    Args:
        folder: folder of the files, created at the first use; None keeps the outputs in memory.
        blocks_in_memory: how many outputs in memory keep their block inputs, which are most of the size. An edited model
            computes all its blocks for the others.
    """

    def __init__(self, folder: str | Path | None, *, blocks_in_memory: int = 256) -> None:
        self.folder = Path(folder) if folder else None
        self._memory: dict[str, BaselineOutputs] = {}
        self._with_blocks: collections.deque[str] = collections.deque()
        self._blocks_in_memory = blocks_in_memory

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, queries: list[Query], *, blocks: Sequence[int] = ()) -> BaselineOutputs | None:
        """The outputs under a key; None if there are none or the file is damaged.

        Args:
            key: from :func:`baseline_key`.
            queries: the record's queries, for their widths.
            blocks: the blocks whose inputs to read.
        """
        if key in self._memory or self.folder is None:
            return self._memory.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                names = ["predicted", "log_probs", "states", *(f"block.{b}" for b in blocks)]
                tensors = {name: file.get_tensor(name) for name in names}
            if meta.get("key") != key:
                raise ValueError(f"the file says key {meta.get('key')!r}")
            widths = [q.width for q in queries]
            predicted = [list(t) for t in tensors["predicted"].split(widths)]
            log_probs = [list(t) for t in tensors["log_probs"].split([len(q.target_ids) for q in queries])]
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            logger.warning("%s cannot be used and is computed again: %s", path, error)
            return None
        return BaselineOutputs(
            [[int(i) for i in row] for row in predicted],
            [[float(x) for x in row] for row in log_probs],
            tensors["states"],
            {b: tensors[f"block.{b}"] for b in blocks},
            meta.get("as_tuple") == "true",
        )

    def put(self, key: str, baseline: BaselineOutputs) -> None:
        """Store outputs under their key."""
        if self.folder is None:
            self._memory[key] = baseline
            self._with_blocks.append(key)
            if len(self._with_blocks) > self._blocks_in_memory:
                self._memory[self._with_blocks.popleft()].block_inputs.clear()
            return
        from safetensors.torch import save

        tensors = {
            "predicted": torch.tensor([i for row in baseline.predicted for i in row], dtype=torch.int64),
            "log_probs": torch.tensor([x for row in baseline.log_probs for x in row], dtype=torch.float32),
            "states": baseline.states.contiguous(),
        }
        for block, hidden in baseline.block_inputs.items():
            tensors[f"block.{block}"] = hidden.contiguous()
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save(tensors, {"key": key, "as_tuple": "true" if baseline.as_tuple else "false"})
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def default_cache_folder() -> Path:
    """The command line's folder, inside :func:`~baft_intervention.environment.cache_folder`."""
    return cache_folder() / "priors"
