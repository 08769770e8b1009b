"""What each part of the default is worth: the method with one thing changed at a time, on training and validation records.

    python benchmarks/ablation.py --out benchmarks/results/ablation --n 40
    python benchmarks/ablation.py --out DIR --variants "default;cosine;no relation question"
    python benchmarks/ablation.py --out DIR --stream --variants "default;cosine"

Every variant edits the same n records of each part (see benchmarks/sweep.py, which leaves out test records), one at a time. ZsRE
and CounterFact have no probes about the same subject, so each of their records gets two (``same_subject``): other relations, in
forms that the edit does not have ("The religion of S is", "S religion"). A variant's records are written one by one, and the
same command resumes a variant that was stopped. The table shows means over all records that have the metric, with 95 %
bootstrap intervals.

With --stream, each variant edits the n ZsRE records one after another in one adapter, and all are asked after the last edit. A
variant that was stopped starts again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import sweep
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention.data.unrelated import read_pool
from baft_intervention.errors import BaftError
from baft_intervention.evaluation.aggregate import aggregate
from baft_intervention.evaluation.baseline_outputs import BaselineCache, default_cache_folder
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.methods import make_method
from baft_intervention.evaluation.record_metrics import record_metrics
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.loading import load_model
from baft_intervention.requests import EditRequest, Probe
from baft_intervention.training.bank import shipped_texts

NETWORK = "weighting_options"
SMALL_BANK = "cosine, small bank"  # a quarter of the texts
QUESTIONS = "cosine, bank of Natural Questions"  # of the kind that unrelated locality is measured with
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("baft", {}),
    "loreft": ("loreft", {}),
    "constant": ("baft", {"weighting": "constant"}),
    "linear, locality loss": ("baft", {"weighting": "linear", "locality_coefficient": 1.0}),
    "mlp, locality loss": ("baft", {"weighting": "mlp", "locality_coefficient": 1.0}),
    "linear, output loss": ("baft", {"weighting": "linear", "output_coefficient": 1.0}),
    "constant, output loss": ("baft", {"weighting": "constant", "output_coefficient": 1.0}),
    "whitened": ("baft", {"weighting": "whitened", "locality_coefficient": 1.0}),
    "cosine": ("baft", {"weighting": "cosine"}),
    "no relation question": ("baft", {NETWORK: {"false_openings": 0.999}}),
    "gate 0.03": ("baft", {NETWORK: {"false_openings": 0.03}}),
    "gate 0.003": ("baft", {NETWORK: {"false_openings": 0.003}}),
    "balance loss": ("baft", {"balance_coefficient": 0.1}),
    "full stop": ("baft", {"ending": "."}),
    "end of sequence": ("baft", {"append_eos": True}),
    "identity start": ("baft", {"init": "identity"}),
    "constant rate": ("baft", {"schedule": "constant"}),
    SMALL_BANK: ("baft", {"weighting": "cosine"}),
    QUESTIONS: ("baft", {"weighting": "cosine"}),
    "augmented": ("baft", {"augmentations": 4}),
    "linear, augmented": ("baft", {"weighting": "linear", "locality_coefficient": 1.0, "augmentations": 4}),
}
# one setting over its range, the default's own value among them; drawn as plots
SWEEPS: dict[str, tuple[Any, ...]] = {
    "layers": ((15,), (20,), (24,), (27,), (28,)),
    "rank": (1, 4, 12, 32),
    "learning_rate": (5e-3, 1e-2, 2e-2, 4e-2),
    "steps": (15, 30, 60, 100),
}
DEFAULTS = {"layers": (27,), "rank": 12, "learning_rate": 2e-2, "steps": 60}  # of SmolLM2-135M


def sweep_name(setting: str, value: Any) -> str:
    if value == DEFAULTS[setting]:
        return "default"
    return f"{setting} {value[0] if isinstance(value, tuple) else format(value, 'g')}"


VARIANTS |= {sweep_name(n, v): ("baft", {n: v}) for n, values in SWEEPS.items() for v in values if v != DEFAULTS[n]}
SHOWN = ("reliability", "generality", "locality", "same_subject", "unrelated", "portability")
PARTS_SHOWN = ("zsre", "counterfact", "wiki_counterfact", "wiki_recent")
EXTRA = ("religion", "country", "place of death", "owner", "genre", "award", "currency", "population")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--variants", help=f"some of: {'; '.join(VARIANTS)} (comma-separated; names with commas quoted by ;)"
    )
    parser.add_argument("--n", type=int, default=40, help="records a part; default: 40")
    parser.add_argument("--stream", action="store_true", help="ZsRE records in one adapter, asked when all are in")
    parser.add_argument("--seed", type=int, default=5, help="of the draw of records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = (
        [n.strip() for n in args.variants.split(";" if ";" in args.variants else ",")] if args.variants else [*VARIANTS]
    )
    if unknown := [n for n in names if n not in VARIANTS]:
        parser.error(f"no variant {unknown[0]!r}; there are: {'; '.join(VARIANTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        parts = {name: load_part(args, name) for name in PARTS_SHOWN[: 1 if args.stream else None]}
        model, tokenizer = load_model(args.model)
        scorer = Scorer(model, tokenizer, cache=BaselineCache(default_cache_folder()))
        scorer.prepare([r for part in parts.values() for r in part])
        for name in names:
            (run_stream if args.stream else run_variant)(name, scorer, parts, args)
    except (BaftError, OSError) as error:
        print(f"ablation.py: error: {error}", file=sys.stderr)
        return 2
    write_table(args)
    return 0


def load_part(args: argparse.Namespace, name: str) -> list[EditRequest]:
    found = sweep.load_part(args, name)
    return [add_same_subject(r) for r in found] if name in ("zsre", "counterfact") else list(found)


def add_same_subject(request: EditRequest) -> EditRequest:
    """Two prompts about the same subject that ask something else; the unedited model's answer is what should stay."""
    if not request.subject:
        return request
    statement, bare = random.Random(request.prompt).sample(EXTRA, 2)
    texts = (f"The {statement} of {request.subject} is", f"{request.subject} {bare}")
    extra = tuple(Probe(text, "locality", group="same_subject") for text in texts)
    return dataclasses.replace(request, probes=(*request.probes, *extra))


def record_path(name: str, args: argparse.Namespace) -> Path:
    """Where a variant's records are kept."""
    return args.out / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"


def run_variant(
    name: str, scorer: Scorer, parts: Mapping[str, Sequence[EditRequest]], args: argparse.Namespace
) -> None:
    path = record_path(name, args)
    done = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    method, config = VARIANTS[name]
    work = [(part, request) for part, requests in parts.items() for request in requests]
    if len(done) >= len(work):
        return
    settings = {"config": config} if method == "baft" else config
    if name == QUESTIONS:
        settings["bank"] = questions(args, [request for _, request in work])
    if name == SMALL_BANK:
        settings["bank"] = list(shipped_texts()[::4])
    edited = make_method(method, settings).attach(scorer.model, scorer.tokenizer)
    try:
        with path.open("a", encoding="utf-8") as file:
            for part, request in tqdm(work[len(done) :], desc=name):
                edited.reset()
                cost = edited.apply([request])
                file.write(
                    json.dumps({"part": part, "steps": cost.steps} | asked(part, request, scorer, edited)) + "\n"
                )
                file.flush()
    finally:
        edited.restore()


def questions(args: argparse.Namespace, asked: Sequence[EditRequest]) -> list[str]:
    """256 Natural-Questions prompts that no record is asked."""
    known = {p.prompt for r in asked for p in r.probes}
    found = (p.prompt for p in read_pool(args.data_dir / sweep.UNRELATED) if p.prompt not in known)
    return list(itertools.islice(found, len(shipped_texts())))


def run_stream(name: str, scorer: Scorer, parts: Mapping[str, Sequence[EditRequest]], args: argparse.Namespace) -> None:
    """The variant's edits in one adapter; the records' ``seconds`` are the time of their edits."""
    path = record_path(name, args)
    if path.is_file():
        return
    method, config = VARIANTS[name]
    edited = make_method(method, {"config": config} if method == "baft" else config)
    edited, lines = edited.attach(scorer.model, scorer.tokenizer), []
    try:
        for part, requests in parts.items():
            costs = []
            for request in tqdm(requests, desc=name):
                begin = time.perf_counter()
                steps = edited.apply([request]).steps
                costs.append({"part": part, "steps": steps, "seconds": round(time.perf_counter() - begin, 3)})
            for request, cost in zip(requests, costs, strict=True):
                lines.append(json.dumps(cost | asked(part, request, scorer, edited)) + "\n")
    finally:
        edited.restore()
    path.write_text("".join(lines), encoding="utf-8")


def asked(part: str, request: EditRequest, scorer: Scorer, edited: EditedModel) -> dict[str, float | None]:
    """A record's metrics on the edited model."""
    metrics, _ = record_metrics(scorer.queries(request), scorer.score(edited, [request])[0])
    metrics["same_subject"] = metrics.get("locality/same_subject")
    if part in ("zsre", "counterfact"):
        metrics["locality"] = metrics.get("locality/neighborhood")
    return {k: v for k, v in metrics.items() if k in SHOWN or k.startswith(("locality/", "portability/"))}


def write_table(args: argparse.Namespace) -> None:
    lines, summary = [], {}
    for name in VARIANTS:
        path = record_path(name, args)
        if not path.is_file():
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        table = {"all": aggregate([_numbers(r) for r in records])}
        for part in PARTS_SHOWN:
            table[part] = aggregate([_numbers(r) for r in records if r["part"] == part])
        summary[name] = {k: {m: v[m] for m in v if m in SHOWN or "/" in m} for k, v in table.items()}
        lines.append(f"| {name} | " + " | ".join(_cell(table["all"].get(m)) for m in SHOWN) + f" | {len(records)} |")
    head = ["| variant | " + " | ".join(SHOWN) + " | n |", "|---|" + "---:|" * (len(SHOWN) + 1)]
    text = "\n".join([*head, *lines]) + "\n"
    print(text)
    for part in PARTS_SHOWN:
        print(part)
        for name, table in summary.items():
            print(
                f"  {name:24s}", {m: round(100 * v["mean"], 1) for m, v in table[part].items() if v["mean"] is not None}
            )
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    draw_sweeps(summary, args.out / "sweeps.png")
    (args.out / "ablation.json").write_text(
        json.dumps({"command": sys.argv, "table": summary}, indent=1) + "\n", encoding="utf-8"
    )


def draw_sweeps(summary: Mapping[str, Any], path: Path) -> None:
    """A panel for each setting of :data:`SWEEPS` of which every value was run."""
    shown = {n: vs for n, vs in SWEEPS.items() if all(sweep_name(n, v) in summary for v in vs)}
    if not shown:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=(3.2 * len(shown), 3.2),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, (name, values) in zip(axes[0], shown.items(), strict=True):
        labels = [str(v[0]) if isinstance(v, tuple) else format(v, "g") for v in values]
        for metric in ("reliability", "generality", "locality", "same_subject", "unrelated"):
            found = [summary[sweep_name(name, v)]["all"][metric]["mean"] for v in values]
            axis.plot(labels, [100 * x for x in found], marker="o", markersize=3, label=metric.replace("_", " "))
        axis.set(xlabel=name.replace("_", " ").replace("layers", "block"), ylim=(30, 102))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("%")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _numbers(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {k: v for k, v in record.items() if k != "part"}


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return "–"
    return f"{100 * value['mean']:.1f} [{100 * value['ci_low']:.1f}, {100 * value['ci_high']:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
