"""Draws the README's picture of before and after from a run of the demo.

baft demo --json > demo.json
python docs/images/before_after.py demo.json docs/images/before_after.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LEFT, BEFORE, AFTER, MARK = 0.012, 0.43, 0.69, 0.945  # where the columns begin, as fractions of the width
GOOD, BAD, PLAIN = "#14532d", "#9a3412", "#334155"
FILL = {"edit": "#dbeafe", "paraphrase": "#eff6ff", "neighbour": "#ffffff"}


def first_line(text: str) -> str:
    """An answer's first line; with dots where the demo cut it."""
    line, end, _ = text.strip().partition("\n")
    return line if end or line.endswith(".") else f"{line} …"


def write(axes: Axes, x: float, y: float, text: str, right: float, **style: Any) -> None:
    """Text from ``x`` on, cut at a word where it would reach ``right``."""
    shown = axes.text(x, y, text, va="center", **style)
    words = text.removesuffix(" …").split(" ")
    while len(words) > 1 and axes.transData.inverted().transform(shown.get_window_extent())[1, 0] > right:
        words.pop()
        shown.set_text(" ".join(words) + " …")


def draw(demo: dict, path: Path) -> None:
    rows = [question for fact in demo["facts"] for question in fact["questions"]]
    height = 0.335 * (len(rows) + 2.6)
    figure, axes = plt.subplots(figsize=(10.4, height), dpi=160)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) + 1.5, -1.1)
    axes.axis("off")
    for x, text in ((LEFT, "prompt"), (BEFORE, f"{demo['model']} writes"), (AFTER, "after the edits")):
        axes.text(x, -0.55, text, fontsize=10, color=PLAIN, weight="bold", va="center")
    for i, row in enumerate(rows):
        axes.axhspan(i - 0.03, i + 0.94, color=FILL[row["kind"]], lw=0)
        if row["kind"] == "edit" and i:
            axes.axhline(i - 0.04, color="#94a3b8", lw=0.8)
        weight = "bold" if row["kind"] == "edit" else "normal"
        write(axes, LEFT, i + 0.46, f"{row['prompt']} …", BEFORE, fontsize=10, weight=weight, color="#0f172a")
        write(axes, BEFORE, i + 0.46, first_line(row["before"]), AFTER - 0.01, fontsize=10, color=PLAIN)
        colour = GOOD if row["mark"] in ("ok", "same") else BAD
        write(axes, AFTER, i + 0.46, first_line(row["after"]), MARK, fontsize=10, color=colour, weight=weight)
        axes.text(0.993, i + 0.46, row["mark"], fontsize=8.5, va="center", ha="right", color=colour)
    counts = ", ".join(f"{kind}s {good} of {total}" for kind, (good, total) in demo["counts"].items())
    note = f"blue: edited prompt and its paraphrase; white: neighbours, which must stay.  As wanted: {counts}."
    axes.text(LEFT, len(rows) + 0.6, note, fontsize=8.5, color=PLAIN, va="center")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="what baft demo --json wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    draw(json.loads(args.demo.read_text(encoding="utf-8")), args.picture)


if __name__ == "__main__":
    main()
