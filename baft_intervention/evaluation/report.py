"""The report of a benchmark: one table for each family of metrics, and a plot.

Reads every ``summary.json`` below a folder and writes ``report.md``, ``report.csv`` and ``report.png`` into it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .ability import ability_lines, read_abilities

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A table of related metrics.

    Args:
        title: its heading.
        about: what the metrics mean.
        columns: metric -> column heading.
        percent: show shares as percent.
    """

    title: str
    about: str
    columns: Mapping[str, str]
    percent: bool = True


FAMILIES = (
    Family(
        "Token accuracy, teacher-forced",
        "Share of target tokens that are the argmax, without leading white-space tokens; *exact*: all of them.",
        {
            "reliability": "reliability", "generality": "generality", "portability": "portability",
            "reliability_exact": "reliability, exact", "generality_exact": "generality, exact",
            "portability_exact": "portability, exact",
        },
    ),
    Family(
        "Locality",
        "Share of argmax tokens that did not change, along the data set's answer. *Locality* is near the edit (the data set's "
        "own probes: the same subject, a neighbour, another topic), *unrelated* far from it (Natural Questions).",
        {"locality": "locality", "unrelated": "unrelated"},
    ),
    Family(
        "Locality as divergence (nats)",
        "KL(unedited || edited), mean over positions; lower is better.",
        {"locality_kl": "locality", "unrelated_kl": "unrelated"},
        percent=False,
    ),
    Family(
        "Free generation",
        "Greedy text after the prompt up to the end of sequence, compared with every alias (normalised). *Sentence*: only its "
        "first sentence. *Begins*: the text begins with the answer.",
        {
            "generation_em": "exact match", "generation_em_sentence": "exact match, sentence",
            "generation_prefix": "begins", "generation_f1": "F1",
            "rephrase_generation_em": "rephrase: exact match", "rephrase_generation_em_sentence": "rephrase: sentence",
            "rephrase_generation_prefix": "rephrase: begins",
        },
    ),
    Family(
        "Probability success (ROME)",
        "Share of prompts on which the wanted answer is likelier than the other (mean log-probability per token), and by how "
        "much.",
        {
            "efficacy": "efficacy", "paraphrase": "paraphrase", "neighbourhood": "neighbourhood",
            "efficacy_magnitude": "efficacy, magnitude", "paraphrase_magnitude": "paraphrase, magnitude",
            "neighbourhood_magnitude": "neighbourhood, magnitude",
        },
    ),
    Family(
        "Sentiment and multi-hop",
        "SERAC's ConvSent score on the reworded question; MQuAKE's accuracy: cases with any of their questions right.",
        {"convsent": "ConvSent", "multi_hop": "multi-hop"},
    ),
    Family(
        "Text quality",
        "Fluency: n-gram entropy (bits) of a sampled continuation; higher is more varied; comparable within a task only. "
        "Perplexity of the target after the edit's prompt, geometric mean over records.",
        {"fluency": "fluency", "perplexity": "perplexity"},
        percent=False,
    ),
    Family(
        "Counted as EasyEdit counts",
        "The same token accuracies including leading white-space tokens.",
        {
            "reliability_easyedit": "reliability", "generality_easyedit": "generality",
            "portability_easyedit": "portability", "locality_easyedit": "locality", "unrelated_easyedit": "unrelated",
        },
    ),
)  # fmt: skip

_COSTS = {
    "seconds_per_edit": "s per edit", "seconds_per_edit_median": "median", "steps": "steps",
    "score_seconds_per_record": "s scoring", "generate_seconds_per_record": "s generating",
    "trained_parameters": "trained parameters", "adapter_bytes": "adapter bytes", "peak_memory_mib": "peak MiB",
}  # fmt: skip
_COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
    "#999999",
    "#7b3294",
    "#a6611a",
]
_MARKERS = "osD^vPX*<>"


def read_summaries(folder: str | Path) -> list[dict[str, Any]]:
    """All summaries below a folder, ordered by task, protocol, model and method.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    found = []
    for path in sorted(Path(folder).rglob("summary.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            _ = data["method"], data["task"], data["protocol"], data["metrics"], data["costs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not the summary of an evaluation: {error!r}; delete it or run that cell again"
            ) from None
        found.append(data)
    if not found:
        raise DataError(f"no summary.json below {folder}; run benchmarks/run.py --out {folder} first")
    return sorted(found, key=lambda s: (s["task"], s["protocol"], s.get("model", ""), s["method"]))


def write_report(folder: str | Path, *, command: str = "", note: str = "") -> dict[str, Path]:
    """Write ``report.md``, ``report.csv`` and ``report.png`` into ``folder``.

    Args:
        folder: folder of the summaries.
        command: the command that made the results, shown at the top.
        note: a paragraph to show below it.
    """
    folder = Path(folder)
    summaries, abilities = read_summaries(folder), ability_lines(read_abilities(folder))
    paths = {kind: folder / f"report.{kind}" for kind in ("md", "csv", "png")}
    text = markdown(summaries, command=command, note=note, plot=paths["png"].name, more=abilities)
    paths["md"].write_text(text, encoding="utf-8")
    paths["csv"].write_text(table_csv(summaries), encoding="utf-8", newline="")
    draw_plane(summaries, paths["png"])
    return paths


# --- text -------------------------------------------------------------------------------------------------------------


def markdown(
    summaries: Sequence[Summary], *, command: str = "", note: str = "", plot: str = "", more: Sequence[str] = ()
) -> str:
    """The report as Markdown; ``more`` are the lines of a further section before the costs."""
    lines = ["# Benchmark report", ""]
    if command:
        lines += ["Made with", "", "```", *command.strip().splitlines(), "```", ""]
    if note:
        lines += [note, ""]
    lines += _made_of(summaries)
    if plot:
        lines += [f"![generality against locality]({plot})", ""]
    lines += [
        "Every value is the mean over records of each record's mean, with its 95 % bootstrap interval over records, and `n` if "
        "not all records have the metric. `–`: the data set has no such probes.",
        "",
    ]
    for family in FAMILIES:
        columns = [c for c in family.columns if any(_metric(s, c) for s in summaries)]
        if columns:
            lines += [f"## {family.title}", "", family.about, ""]
            lines += _table(
                [family.columns[c] for c in columns], summaries, lambda s, f=family, c=columns: _cells(s, f, c)
            )
    lines += _groups(summaries)
    lines += _by_checkpoint(summaries)
    lines += more
    lines += ["## Cost", "", "Means over records, on the machine above.", ""]
    costs = [c for c in _COSTS if any(s["costs"].get(c) is not None for s in summaries)]
    lines += _table([_COSTS[c] for c in costs], summaries, lambda s: [_amount(s["costs"].get(c)) for c in costs])
    failed = [s for s in summaries if s.get("failed")]
    if failed:
        lines += ["## Failed edits", "", "They are scored on the model without the edit.", ""]
        lines += _table(["failed", "of"], failed, lambda s: [f"{s['failed']} ({_errors(s)})", str(s["n"])])
    return "\n".join(lines).rstrip() + "\n"


def _made_of(summaries: Sequence[Summary]) -> list[str]:
    lines = [
        "| task | data | sha256 | records | protocol | model | fingerprint | seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for s in summaries:
        run = s.get("run", {})
        rows.append(
            f"| {s['task']} | {run.get('data', '')} | `{str(run.get('data_sha256', ''))[:12]}` | {s['n']} | {s['protocol']} "
            f"| {s.get('model', '')} | `{str(run.get('fingerprint', ''))[:12]}` | {s.get('seed', '')} |"
        )
    lines += [*dict.fromkeys(rows), ""]
    machines = {json.dumps(s.get("machine", {}), sort_keys=True) for s in summaries}
    for text in sorted(machines):
        m = json.loads(text)
        if m:
            gpu = f", {m['gpu']}" if m.get("gpu") else ""
            lines += [
                f"Machine: {m.get('processor')}, {m.get('cores')} cores, {m.get('threads')} thread(s) per run{gpu}.",
                "",
            ]
    versions = {json.dumps(s.get("run", {}).get("versions", {}), sort_keys=True) for s in summaries}
    for text in sorted(versions):
        lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) + ".", ""]
    return lines


def _table(head: Sequence[str], summaries: Sequence[Summary], cells: Any) -> list[str]:
    lines = ["| task | method | " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(head)]
    several = len({s["protocol"] for s in summaries}) > 1
    for s in summaries:
        values = cells(s)
        if all(v == "–" for v in values):
            continue
        task = f"{s['task']}, {s['protocol']}" if several else s["task"]
        lines.append(f"| {task} | {s['method']} | " + " | ".join(values) + " |")
    return [*lines, ""]


def _cells(summary: Summary, family: Family, columns: Iterable[str]) -> list[str]:
    return [_cell(summary["metrics"].get(c), summary["n"], percent=family.percent) for c in columns]


def _cell(metric: Mapping[str, Any] | None, n: int, *, percent: bool) -> str:
    if not metric or metric["mean"] is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{metric['mean'] * scale:.{digits}f}"
    if metric["ci_low"] is not None:
        text += f" [{metric['ci_low'] * scale:.{digits}f}, {metric['ci_high'] * scale:.{digits}f}]"
    return text if metric["n"] == n else f"{text} (n = {metric['n']})"


def _groups(summaries: Sequence[Summary]) -> list[str]:
    names = sorted({m for s in summaries for m in s["metrics"] if m.startswith(("portability/", "locality/"))})
    several = [m for m in names if len([x for x in names if x.split("/")[0] == m.split("/")[0]]) > 1]
    if not several:
        return []
    family = Family(
        "By group", "The data sets' own groups of probes; token accuracy and token match.", {m: m for m in several}
    )
    return [
        f"## {family.title}",
        "",
        family.about,
        "",
        *_table(several, summaries, lambda s: _cells(s, family, several)),
    ]


def _by_checkpoint(summaries: Sequence[Summary]) -> list[str]:
    rows = [(s, t, table) for s in summaries for t, table in s.get("checkpoints", {}).items()]
    if not rows:
        return []
    names = [
        c
        for c in ("reliability", "generality", "locality", "unrelated", "portability")
        if any(c in t for _, _, t in rows)
    ]
    lines = ["## Along a sequence of edits", "", "All `T` records scored after `T` edits.", ""]
    lines += ["| task | method | T | " + " | ".join(names) + " |", "|---|---|---:|" + "---:|" * len(names)]
    for s, t, table in rows:
        values = [_cell(table.get(name), int(t), percent=True) for name in names]
        lines.append(f"| {s['task']} | {s['method']} | {t} | " + " | ".join(values) + " |")
    return [*lines, ""]


def _metric(summary: Summary, name: str) -> bool:
    return summary["metrics"].get(name, {}).get("mean") is not None


def _amount(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.3g}"


def _errors(summary: Summary) -> str:
    return ", ".join(f"{k}: {v}" for k, v in sorted(summary.get("errors", {}).items()))


def table_csv(summaries: Sequence[Summary]) -> str:
    """One line for each metric or cost: ``task, method, protocol, model, seed, T, metric, mean, ci_low, ci_high, n``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "method", "protocol", "model", "seed", "T", "metric", "mean", "ci_low", "ci_high", "n"])
    for s in summaries:
        head = [s["task"], s["method"], s["protocol"], s.get("model", ""), s.get("seed", "")]
        tables = {"": s["metrics"]} | s.get("checkpoints", {})
        for t, table in tables.items():
            for name, m in table.items():
                if m["mean"] is not None:
                    writer.writerow([*head, t, name, *(_short(m[k]) for k in ("mean", "ci_low", "ci_high")), m["n"]])
        for name, value in s["costs"].items():
            if value is not None:
                writer.writerow([*head, "", name, _short(value), "", "", s["n"]])
    return text.getvalue()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


# --- the plane ----------------------------------------------------------------------------------------------------------


def draw_plane(summaries: Sequence[Summary], path: str | Path) -> None:
    """Generality against locality, one point per method: a column for each task, near locality above, unrelated text below.

    Without rephrases in the data, the vertical axis is accuracy on the subject's other names, else reliability.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    keys = sorted({(s["task"], s["protocol"]) for s in summaries})
    methods = sorted({s["method"] for s in summaries})
    below = [x for x in ("locality", "unrelated") if any(_metric(s, x) for s in summaries)] or ["locality"]
    figure = Figure(figsize=(3.1 * len(keys) + 1.2, 3.0 * len(below) + 0.7), layout="constrained")
    axes = figure.subplots(len(below), len(keys), squeeze=False)
    for column, key in enumerate(keys):
        cells = [s for s in summaries if (s["task"], s["protocol"]) == key]
        vertical = next(
            (
                y
                for y in ("generality", "portability/Subject_Aliasing", "reliability")
                if any(_metric(s, y) for s in cells)
            ),
            "reliability",
        )
        for row, horizontal in enumerate(below):
            axis = axes[row][column]
            _draw_panel(axis, cells, methods, horizontal, vertical)
            if row == 0:
                title = key[0] if len({p for _, p in keys}) == 1 else f"{key[0]}\n{key[1]}"
                axis.set_title(title, fontsize=10)
    handles, labels = {}, []
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [m for m in methods if m in handles]
    figure.legend(
        [handles[m] for m in labels], labels, loc="outside lower center", ncols=min(len(labels), 6) or 1, fontsize=9
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_panel(axis: Any, cells: Sequence[Summary], methods: Sequence[str], horizontal: str, vertical: str) -> None:
    for s in cells:
        x, y = s["metrics"].get(horizontal), s["metrics"].get(vertical)
        if not x or not y or x["mean"] is None or y["mean"] is None:
            continue
        k = methods.index(s["method"])
        axis.errorbar(
            100 * x["mean"], 100 * y["mean"], xerr=_error(x), yerr=_error(y), label=s["method"], fmt=_MARKERS[k % len(_MARKERS)],
            color=_COLOURS[k % len(_COLOURS)], markersize=7, elinewidth=0.8, alpha=0.9,
        )  # fmt: skip
    if not axis.containers:
        axis.text(50, 50, "no such probes", ha="center", va="center", fontsize=8, color="#777777")
    axis.set(xlim=(-4, 104), ylim=(-4, 104))
    near = "locality, near the edit (%)" if horizontal == "locality" else "locality, unrelated text (%)"
    names = {
        "portability/Subject_Aliasing": "the subject's other names (%)",
        "reliability": "reliability (%)\n(no rephrases)",
    }
    axis.set_xlabel(near, fontsize=8)
    axis.set_ylabel(names.get(vertical, "generality (%)"), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def _error(metric: Mapping[str, Any]) -> list[list[float]] | None:
    if metric["ci_low"] is None:
        return None
    return [[100 * max(0.0, metric["mean"] - metric["ci_low"])], [100 * max(0.0, metric["ci_high"] - metric["mean"])]]
