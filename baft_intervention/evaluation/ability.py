"""The report's section on general ability: what edits cost a model elsewhere, measured by ``benchmarks/general_ability.py``.

A result is a JSON file with ``method`` (or ``weighting``), ``data`` and ``rows`` of ``{"edits", "accuracy", "unmoved"}``; the
first row is the unedited model. Results of a benchmark folder ``X`` are in ``X/general_ability/``, or beside it in
``general_ability/X.*.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

FOLDER = "general_ability"


def read_abilities(folder: str | Path) -> list[dict[str, Any]]:
    """The results that belong to a folder of benchmark results, ordered by file name.

    Raises:
        DataError: a file is not such a result.
    """
    folder = Path(folder).resolve()
    inside = sorted((folder / FOLDER).glob("*.json"))
    beside = sorted((folder.parent / FOLDER).glob(f"{folder.name}.*.json"))
    found = []
    for path in [*inside, *beside]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [(int(r["edits"]), float(r["accuracy"]), int(r["unmoved"])) for r in data["rows"]]
            name = data.get("method") or data["weighting"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not a result of benchmarks/general_ability.py: {error!r}; delete it or run it again"
            ) from None
        if not rows or rows[0][0] != 0:
            raise DataError(f"{path} has no row before the first edit; run benchmarks/general_ability.py again")
        found.append({"method": str(name), "data": str(data.get("data", "")), "rows": rows})
    return found


def ability_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the Markdown section; none without results."""
    if not results:
        return []
    lines = [
        "## General ability",
        "",
        "lm-evaluation-harness on everyday questions with four choices, none of them edited, before and after the edits; "
        "*same*: answers whose log-likelihood equals the unedited model's to the last bit.",
        "",
        "| method | edits of | edits | accuracy | change | same |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        _, before, answers = result["rows"][0]
        for edits, accuracy, unmoved in result["rows"]:
            change = f"{100 * (accuracy - before):+.1f}" if edits else "–"
            lines.append(
                f"| {result['method']} | {result['data']} | {edits:,} | {100 * accuracy:.1f} | {change} | {unmoved} of {answers} |"
            )
    return [*lines, ""]
