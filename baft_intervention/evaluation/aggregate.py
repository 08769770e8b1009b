"""Means over records, as in EasyEdit, with bootstrap intervals.

The mean of a metric is the *mean over records of each record's mean*, so a record with ten locality questions counts as
much as a record with one. A record without a value (no rephrase in the data, say) counts neither in the mean nor in ``n``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import mean

MetricTable = Mapping[str, float | None]
GEOMETRIC = ("perplexity",)  # averaged as logarithms: one record with 1e6 would dominate an arithmetic mean


def column(records: Sequence[MetricTable], name: str) -> list[float]:
    """The values of one metric, in the order of the records that have it."""
    return [float(v) for r in records if (v := r.get(name)) is not None]


def aggregate(records: Sequence[MetricTable], *, seed: int = 0, resamples: int = 1000) -> dict[str, dict[str, Any]]:
    """Every metric's ``{"mean", "n", "ci_low", "ci_high"}``, ordered by name; :data:`GEOMETRIC` ones as geometric means.

    The interval is the 95 % percentile bootstrap over records. Each metric draws from its own stream, seeded by ``seed`` and
    its name, so adding a metric does not change another's interval.
    """
    result = {}
    for name in sorted({name for r in records for name in r}):
        values = column(records, name)
        if name in GEOMETRIC:
            values = [math.log(v) for v in values]
        low, high = bootstrap_interval(values, seed=seed, stream=name, resamples=resamples)
        row = {"mean": mean(values), "ci_low": low, "ci_high": high}
        if name in GEOMETRIC:
            row = {k: None if v is None else math.exp(v) for k, v in row.items()}
        result[name] = {"mean": row["mean"], "n": len(values), "ci_low": row["ci_low"], "ci_high": row["ci_high"]}
    return result


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, stream: str = "", resamples: int = 1000, level: float = 0.95
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of the mean; ``(None, None)`` for fewer than two values."""
    if len(values) < 2:
        return None, None
    key = int.from_bytes(hashlib.sha256(f"{seed}:{stream}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(key)
    data = np.asarray(values, dtype=np.float64)
    means = data[rng.integers(0, len(data), size=(resamples, len(data)))].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
