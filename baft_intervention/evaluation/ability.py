"""What edits cost a model elsewhere, as the report tells it: the tables of ``benchmarks/general_ability.py``'s results.

A result is a JSON file with ``method`` (or ``weighting``), ``data`` and ``rows``: ``{"edits", "accuracy", "unmoved"}`` after so
many edits, the first of them before any. For a folder of benchmark results ``X`` they lie in ``X/general_ability/``, or beside it
in ``general_ability/X.*.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

FOLDER = "general_ability"


def read_abilities(folder: str | Path) -> list[dict[str, Any]]:
    """The results that belong to a folder of benchmark results, ordered by file name; empty where there are none.

    Raises:
        DataError: a file that is no such result.
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
                f"{path} is no result of benchmarks/general_ability.py: {error!r}; delete it or run it again"
            ) from None
        if not rows or rows[0][0] != 0:
            raise DataError(f"{path} has no row before the first edit; run benchmarks/general_ability.py again")
        found.append({"method": str(name), "data": str(data.get("data", "")), "rows": rows})
    return found


def ability_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown section; no lines where there are no results."""
    if not results:
        return []
    lines = [
        "## General ability",
        "",
        "lm-evaluation-harness on everyday questions of four choices, of which nothing was edited, before and after so many "
        "edits; *same*: answers whose log-likelihood is the unedited model's to the last bit.",
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
