"""Plots of the results of :mod:`~baft_intervention.analysis.figures` and :mod:`~baft_intervention.analysis.inspection`.

Each function returns a matplotlib figure, which a notebook shows and :func:`save` writes as a PNG.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .figures import BatchedEditing, LengthScore, RedundantDimensions, Tension, WeightsByPosition
from .inspection import Inspection

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise ConfigError("pictures need matplotlib; install it with: pip install 'baft_intervention[eval]'") from None

# distinct for the colour-blind (Okabe and Ito); LoReFT first, BaFT second
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
INK, PALE = "#334155", "#94a3b8"
_HEAT = "Blues"


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; the same figure gives the same bytes.

    Raises:
        ConfigError: the name does not end in ``.png``, or the file cannot be written.
    """
    path = png_path(path)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def png_path(path: str | Path) -> Path:
    """Check, before the work, that a PNG can be written to this path, and return it.

    Raises:
        ConfigError: the suffix is another one, the path is a folder, or its folder does not exist.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} does not end in .png; pictures are written as PNG")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
    return path


def draw_inspection(found: Inspection) -> Figure:
    """Heat maps of basis weights, one panel per edit, with a row per token and a column per basis."""
    tokens = [_literal(repr(token)[1:-1]) for token in found.tokens]
    height = 0.25 * len(tokens) + 1.6
    figure = Figure(figsize=(9.0, height * len(found.edits)), layout="constrained")
    for view, axes in zip(found.edits, figure.subplots(len(found.edits), 1, squeeze=False)[:, 0], strict=True):
        image = axes.imshow(view.weights, cmap=_HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        _bare(axes)
        rank = len(view.weights[0])
        bases = range(0, rank, 1 if rank <= 24 else 8)
        axes.set_xticks(bases, [str(k + 1) for k in bases], fontsize=8)
        axes.set_yticks(
            range(len(tokens)),
            [f"{n}  ▸" if t in found.positions or t in view.acts else n for t, n in enumerate(tokens)],
        )
        for t, label in enumerate(axes.get_yticklabels()):
            label.set(fontsize=9, color=COLOURS[1] if t in view.acts else INK)
            label.set_fontweight("bold" if t in view.acts else "normal")
            axes.axhline(t + 0.5, color="white", lw=1.5)
        for k in bases:
            axes.axvline(k + 0.5, color="white", lw=0.5)
        axes.set_xlabel(f"basis (▸ edited token, block {view.layer})", fontsize=9, color=INK)
        reason = _wrapped(_literal(view.reason))
        pad = 10 + 12 * (1 + reason.count("\n"))
        title = _literal(f"{view.prompt} → {view.target}")
        axes.set_title(title, fontsize=11, loc="left", fontweight="bold", color=INK, pad=pad)
        axes.text(0, 1.02, reason, transform=axes.transAxes, fontsize=8.5, color=INK, va="bottom")
        figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015).ax.set_title("w", fontsize=9, color=INK)
    return figure


def draw_redundant_dimensions(found: Mapping[str, RedundantDimensions]) -> Figure:
    """Figure 1: the size of the update along each basis, and the target's probability when bases are dropped.

    Args:
        found: ``method -> dimensions``; lines are means over edits, bands reach from the 10th to the 90th percentile.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, marker, (name, data) in zip(
        itertools.cycle(COLOURS), itertools.cycle("os^D"), found.items(), strict=False
    ):
        relative = [[m / row[0] for m in row] for row in data.magnitude]
        ranks = list(range(1, len(relative[0]) + 1))
        _band(left, ranks, relative, colour, marker, name)
        _band(right, [0, *ranks], data.probability, colour, marker, name)
        needed = sorted(data.needed)
        middle = needed[len(needed) // 2]
        right.axvline(middle, color=colour, lw=1, ls=":")
    left.set_xlabel("basis, by the size of its update")
    left.set_ylabel("update along it / largest")
    _title(left, "Size of the update along each basis")
    right.set_xlabel("bases kept, largest first")
    right.set_ylabel("probability of the target")
    _title(right, "What is left when the others are dropped")
    right.text(
        0.98,
        0.04,
        "dotted: bases that the median edit needs",
        transform=right.transAxes,
        ha="right",
        fontsize=8,
        color=INK,
    )
    left.set_ylim(0, 1.03)
    right.set_ylim(0, 1.03)
    _style(left, right)
    left.legend(frameon=False, fontsize=9)
    return figure


def draw_weights_by_position(found: Mapping[str, WeightsByPosition], edited: str, irrelevant: str) -> Figure:
    """Figure 2: heat maps of basis weights on edited and irrelevant prompts, and the mean over bases for every group.

    Args:
        found: ``network -> weights``, one row of panels each.
        edited, irrelevant: names of the two groups with a heat map.
    """
    figure = Figure(figsize=(11.4, 3.0 * len(found)), layout="constrained")
    grid: Any = figure.subplots(len(found), 3, squeeze=False, width_ratios=(1, 1, 1.25))
    image: Any = None
    for (name, data), row in zip(found.items(), grid, strict=True):
        width = len(data.weight[edited])
        positions = list(range(-width, 0))
        for axes, group in zip(row[:2], (edited, irrelevant), strict=True):
            bases = list(zip(*data.weight[group], strict=True))  # (r, width)
            image = axes.imshow(bases, cmap=_HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_xticks(range(width), [str(p) for p in positions])
            axes.set_yticks([0, len(bases) - 1], ["1", str(len(bases))])
            axes.set_ylabel("basis")
            _title(axes, f"{name}: {group}")
            _bare(axes)
        figure.colorbar(image, ax=row[1], shrink=0.9, pad=0.02).ax.set_title("w", fontsize=9, color=INK)
        for colour, marker, (group, weight) in zip(
            itertools.cycle(("#0072b2", "#56b4e9", "#cc79a7", "#e69f00", "#009e73")), itertools.cycle("os^Dv"),
            data.weight.items(), strict=False,
        ):  # fmt: skip
            mean = [sum(w) / len(w) for w in weight]
            row[2].plot(positions, mean, color=colour, marker=marker, ms=4, lw=1.6, label=group)
        row[2].axvspan(-1.3, -0.7, color="#e2e8f0", lw=0, zorder=0)
        row[2].set_ylim(-0.03, 1.03)
        _title(row[2], f"{name}: mean over bases (grey: the edited token)")
        _style(row[2])
    for axes in grid[-1]:
        axes.set_xlabel("token, counted from the prompt's end", color=INK)
    grid[0][2].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def draw_batched_editing(found: Mapping[str, Sequence[BatchedEditing]]) -> Figure:
    """Figure 3: success by the length of the prompt (above) and of the target (below), with a column per batch size.

    Args:
        found: ``method -> one result per batch size``, with the same facts and sizes for every method.
    """
    sizes = [batch.size for batch in next(iter(found.values()))]
    figure = Figure(figsize=(4.8 * len(sizes), 6.4), layout="constrained")
    grid: Any = figure.subplots(2, len(sizes), squeeze=False, sharey=True)
    lowest = 0.5
    for i, (colour, marker, (name, batches)) in enumerate(zip(COLOURS, "osD^v", found.items(), strict=False)):
        for column, batch in enumerate(batches):
            for axes, length in zip(grid[:, column], ("prompt_tokens", "target_tokens"), strict=True):
                groups = by_length(batch.scores, length)
                axes.set_xticks(range(len(groups)), [f"{label}\nn = {len(g)}" for label, g in groups.items()])
                x = [k + 0.06 * (i - (len(found) - 1) / 2) for k in range(len(groups))]  # equal values stay visible
                for style, what in (("-", "edit"), ("--", "paraphrase")):
                    y = [_success(scores, what) for scores in groups.values()]
                    lowest = min([lowest, *(value - 0.05 for value in y if value == value)])
                    axes.plot(x, y, style, color=colour, marker=marker, ms=5, lw=1.6, label=f"{name}, {what}")
    for column, size in enumerate(sizes):
        _title(grid[0, column], f"{size} facts at once")
        grid[0, column].set_xlabel("tokens of the prompt")
        grid[1, column].set_xlabel("tokens of the target")
    for row in grid:
        row[0].set_ylim(lowest, 1.02)
        row[0].set_ylabel("target tokens right")
    _style(*grid.flat)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=3.2)
    return figure


def by_length(scores: Sequence[LengthScore], length: str, *, bins: int = 4) -> dict[str, list[LengthScore]]:
    """Scores in at most ``bins`` groups of similar length and about equal size: ``"5 to 7" -> scores``."""
    lengths = sorted(getattr(score, length) for score in scores)
    edges = sorted({lengths[len(lengths) * i // bins] for i in range(bins)})
    groups: dict[str, list[LengthScore]] = {}
    for i, low in enumerate(edges):
        inside = [
            s
            for s in scores
            if low <= getattr(s, length) and (i + 1 == len(edges) or getattr(s, length) < edges[i + 1])
        ]
        high = max(getattr(s, length) for s in inside)
        groups[str(low) if low == high else f"{low} to {high}"] = inside
    return groups


def draw_tension(found: Mapping[str, Sequence[Tension]], names: Mapping[str, str] | None = None) -> Figure:
    """The trade-off: one edit's update by distance, and every edit's leak against the bound for linear updates.

    Args:
        found: ``method -> one result per edit``, with the same edits for every method. The linear method comes first; the
            bound uses the last one's drift. The left panel shows the first edit.
        names: ``id -> label``.
    """
    figure = Figure(figsize=(12.0, max(4.4, 0.27 * len(next(iter(found.values()))) + 2.2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    drawn = list(found.values())
    labels = [_literal((names or {}).get(result.id, result.id)) for result in drawn[0]]
    # rings, so that equal points of both methods stay visible
    looks = ({"s": 75, "facecolor": "none", "lw": 1.6}, {"s": 26, "lw": 0})
    for i, (colour, (name, results)) in enumerate(zip(COLOURS, found.items(), strict=False)):
        near, far = (tuple(zip(*points, strict=True)) for points in (results[0].paraphrases, results[0].unrelated))
        look = {"color": colour, **looks[min(i, 1)]}
        if "facecolor" in look:
            look = {"edgecolor": look.pop("color"), **look}
        left.scatter(*near, marker="D", zorder=3, label=f"{name}, paraphrases", **look)
        left.scatter(*far, s=9, color=colour, alpha=0.45, lw=0, label=f"{name}, unrelated input")
    slope, far = drawn[0][0].slope, max(distance for distance, _ in drawn[0][0].unrelated)
    reach = min(1 / slope, far) if slope else far
    left.plot(
        [0, reach], [1, 1 - slope * reach], color=INK, lw=1.2, ls="--", label="least for a linear map of this slope"
    )
    left.scatter([0], [1], marker="*", s=150, color=INK, zorder=4)
    left.annotate("the edit", (0, 1), xytext=(8, 6), textcoords="offset points", fontsize=9, color=INK)
    left.set_xlabel("distance from the edited input")
    left.set_ylabel("update / update at the edit")
    _title(left, labels[0])
    left.set_ylim(-0.04, max(1.12, left.get_ylim()[1]))
    for i, result in enumerate(drawn[-1]):
        right.add_patch(_rectangle(result.least_leak, i, "#cbd5e1"))
    right.add_patch(_rectangle(0, -9, "#cbd5e1", label="no linear map as steady on the paraphrases"))
    for colour, (name, results) in zip(COLOURS, found.items(), strict=False):
        leaks = [result.leak for result in results]
        right.scatter(leaks, range(len(labels)), s=46, color=colour, zorder=3, label=name, clip_on=False)
    right.set_yticks(range(len(labels)), labels, fontsize=8)
    right.set_ylim(len(labels) - 0.4, -0.9 - 0.2 * len(labels))  # room for the legend
    right.set_xlim(left=0)
    right.set_xlabel("update on unrelated input / update at the edit")
    _title(right, "Root mean square over unrelated input, every edit")
    _style(left, right)
    for axes in (left, right):
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="upper right")
    return figure


# ------------------------------------------------------------------------------------------ helpers


def _band(axes: Any, x: Sequence[int], rows: Sequence[Sequence[float]], colour: str, marker: str, label: str) -> None:
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    low, high = ([c[round(share * (len(c) - 1))] for c in columns] for share in (0.1, 0.9))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(x, [sum(c) / len(c) for c in columns], color=colour, marker=marker, ms=4.5, lw=1.6, label=label)


def _success(scores: Sequence[LengthScore], what: str) -> float:
    values = [s.edit for s in scores] if what == "edit" else [v for s in scores for v in s.paraphrases]
    return sum(values) / len(values) if values else float("nan")


def _rectangle(bound: float, row: float, colour: str, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, row - 0.32), bound, 0.64, color=colour, lw=0, **style)


def _style(*many: Any) -> None:
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.tick_params(colors=INK, labelsize=8.5)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
            label.set_fontsize(9.5)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK)


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def _literal(text: str) -> str:
    """A text with escaped dollar signs, which would begin a formula in matplotlib."""
    return text.replace("$", r"\$")


def _wrapped(text: str, width: int = 118) -> str:
    """A text in at most two lines."""
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width)
    rest = text[cut + 1 :]
    return text[:cut] + "\n" + (rest if len(rest) <= width else rest[: width - 1] + "…")
