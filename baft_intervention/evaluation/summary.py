"""The summary of a run: every metric with its ``n`` and interval, costs, and everything that the numbers depend on.

``summary.json`` has short keys for tables (``method, task, protocol, n, reliability, generality, locality, unrelated,
portability, generation_em, fluency, seconds_per_edit, trained_parameters, peak_memory_mib``), all metrics under
``metrics``, and under ``run`` what must be equal to get the same numbers.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from .aggregate import aggregate
from .metrics import mean
from .records import read_lines

SHORT = ("reliability", "generality", "locality", "unrelated", "portability", "generation_em", "fluency")


def make_summary(
    run: Mapping[str, Any], folder: str | Path, *, machine: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        run: contents of ``run.json``.
        folder: folder of ``records.jsonl`` and ``timings.jsonl``.
        machine: facts about the machine of the run; by default this one.

    Raises:
        DataError: a record cannot be read, or there is none.
    """
    folder = Path(folder)
    records = list(read_lines(folder / "records.jsonl"))
    if not records:
        raise DataError(f"{folder / 'records.jsonl'} holds no records; run the evaluation again")
    checkpoints = sorted({r["checkpoint"] for r in records if r["checkpoint"] is not None})
    last = [r for r in records if not checkpoints or r["checkpoint"] == checkpoints[-1]]
    metrics = aggregate([r["metrics"] for r in last], seed=run["seed"])
    costs = costs_of(folder, last)
    summary: dict[str, Any] = {"method": run["label"], "task": run["task"], "protocol": run["protocol"], "n": len(last)}
    summary |= {name: metrics.get(name, {}).get("mean") for name in SHORT}
    summary |= {k: costs[k] for k in ("seconds_per_edit", "trained_parameters", "peak_memory_mib")}
    summary |= {"failed": sum(r["error"] is not None for r in last), "errors": _errors(last)}
    summary |= {"metrics": metrics, "costs": costs, "model": run["model"], "seed": run["seed"]}
    if checkpoints:
        summary["checkpoints"] = {
            str(t): aggregate([r["metrics"] for r in records if r["checkpoint"] == t], seed=run["seed"])
            for t in checkpoints
        }
    return summary | {"run": dict(run), "machine": dict(machine or machine_facts())}


def costs_of(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds per edit for training and for evaluation, and the size of the edits.

    Edits that a resumed run applied again do not count. The unedited model's outputs (``prior_seconds_per_record``) cost
    nothing if they were on disk.
    """
    times = list(read_lines(folder / "timings.jsonl")) if (folder / "timings.jsonl").is_file() else []
    edits = [t for t in times if "edit_seconds" in t and not t["again"]]
    asked = [t for t in times if "score_seconds" in t]
    baselines = [t for t in times if "prior_seconds" in t]

    def per(values: Sequence[Mapping[str, Any]], seconds: str, count: str) -> float | None:
        total = sum(v[count] for v in values)
        return sum(v[seconds] for v in values) / total if total else None

    return {
        "seconds_per_edit": per(edits, "edit_seconds", "edits"),
        "seconds_per_edit_median": statistics.median(t["edit_seconds"] / t["edits"] for t in edits) if edits else None,
        "score_seconds_per_record": per(asked, "score_seconds", "records"),
        "generate_seconds_per_record": per(asked, "generate_seconds", "records"),
        "prior_seconds_per_record": per(baselines, "prior_seconds", "records"),
        "setup_seconds": max((t["setup_seconds"] for t in times if "setup_seconds" in t), default=None),
        "steps": mean(r["steps"] for r in records),
        "final_loss": mean(r["final_loss"] for r in records),
        "trained_parameters": max((r["trained_parameters"] for r in records), default=0),
        "adapter_bytes": max((r["adapter_bytes"] for r in records), default=0),
        "peak_memory_mib": max((t["peak_memory_mib"] for t in times if "peak_memory_mib" in t), default=None),
    }


def _errors(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of failures of each kind."""
    found: dict[str, int] = {}
    for record in records:
        if record["error"]:
            kind = record["error"].split(":", 1)[0]
            found[kind] = found.get(kind, 0) + 1
    return found


def peak_memory_mib() -> float:
    """Peak memory of this process so far; that of the GPU if one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        import psutil

        return psutil.Process().memory_info().rss / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def machine_facts() -> dict[str, Any]:
    """Facts about the machine that timings depend on, without host or user names."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
