"""Ten thousand facts in one adapter: what the next edit costs, and what becomes of the earlier ones.

    python benchmarks/many_edits.py --out benchmarks/results/many_edits --keep FOLDER

The stream is CounterFact: its requests (two files), then its neighbourhood prompts, each edited to the false answer of the
record that it stands in; subjects that have no edit yet come first. Edits arrive in small batches and are on the disk, in an
adapter folder, before the next one begins. After every ``--every`` edits a sample of them, spread evenly over the whole stream,
is asked again: the edit's own prompt, its paraphrases, unrelated questions, and neighbours: the edit's own sentence about somebody
of another data set whom no edit is about. CounterFact's own neighbours do not serve here: the more of them the stream has edited,
the more of the rest are paraphrases of an edit ("The mother tongue of X is", where "X speaks" is one), at 10,000 all of them.

The same command goes on where it was stopped: edits are in the folder, the curve in ``curve.jsonl``. At the end ``many_edits.md``
and ``many_edits.png`` are written. Seconds are medians over the batches of a stretch, in wall and in processor time; where others
use the machine, the second is the one to look at.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention.data import load_requests
from baft_intervention.environment import library_versions
from baft_intervention.errors import BaftError
from baft_intervention.evaluation.aggregate import aggregate
from baft_intervention.evaluation.baseline_outputs import BaselineCache, default_cache_folder
from baft_intervention.evaluation.methods import make_method
from baft_intervention.evaluation.record_metrics import record_metrics
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.loading import load_model
from baft_intervention.requests import EditRequest, Probe

FILES = ("counterfact/counterfact.json", "counterfact/counterfact-edit.json")
UNRELATED = "zsre/zsre_mend_eval.json"
STRANGERS = "knowedit/wiki_counterfact/test_cf.json"
NEIGHBOURS = 2  # a record
SHOWN = ("reliability", "generality", "locality", "unrelated")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--keep", type=Path, required=True, help="folder of the adapter, tens of kilobytes an edit")
    parser.add_argument("--edits", type=int, default=10_000, metavar="T", help="default: 10000")
    parser.add_argument("--every", type=int, default=1000, metavar="N", help="ask after so many edits; default: 1000")
    parser.add_argument("--batch", type=int, default=20, metavar="B", help="edits that arrive together; default: 20")
    parser.add_argument("--sample", type=int, default=100, metavar="N", help="records asked each time; default: 100")
    parser.add_argument("--copies", default="", metavar="T,T", help="keep a copy of the adapter as FOLDER-T at these T")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.every % args.batch or args.edits % args.every:
        parser.error(
            f"--edits {args.edits}, --every {args.every} and --batch {args.batch} must each divide the one before"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        run(args)
    except (BaftError, OSError) as error:
        print(f"many_edits.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    requests = stream(args.data_dir)[: args.edits]
    model, tokenizer = load_model(args.model)
    scorer = Scorer(model, tokenizer, cache=BaselineCache(default_cache_folder()))
    marks = range(args.every, len(requests) + 1, args.every)
    strangers = [r.subject for r in load_requests(args.data_dir / STRANGERS).requests if r.subject]
    samples = {mark: spread(requests[:mark], args.sample, strangers) for mark in marks}
    scorer.prepare(tqdm([r for sample in samples.values() for r in sample], desc="unedited model"))
    edited: Any = make_method("baft", {}).attach(model, tokenizer)
    editor = edited.editor
    editor.keep_in(args.keep)
    curve = args.out / "curve.jsonl"
    copies = {int(text) for text in args.copies.split(",") if text}
    left_out = 0
    try:
        for mark in marks:
            if asked(curve, mark):
                continue
            wall: list[float] = []
            processor: list[float] = []
            for begin in tqdm(range(mark - args.every, mark, args.batch), desc=f"edits to {mark}"):
                batch = [r for r in requests[begin : begin + args.batch] if editor.adapter.find(r.id) is None]
                if not batch:  # from before the run was stopped
                    continue
                start = time.perf_counter(), time.process_time()
                left_out += edit_all(editor, batch)
                wall.append((time.perf_counter() - start[0]) / len(batch))
                processor.append((time.process_time() - start[1]) / len(batch))
            row = {"edits": len(editor.edits), "stream": mark, "left_out": left_out} | costs(editor, args.keep)
            row |= (
                {"seconds": statistics.median(wall), "processor_seconds": statistics.median(processor)} if wall else {}
            )
            row |= ask(scorer, edited, samples[mark])
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if mark in copies:
                editor.save_pretrained(args.keep.with_name(f"{args.keep.name}-{mark}"))
        editor.close()
    finally:
        edited.restore()
    report(curve, args)


def stream(data: Path) -> list[EditRequest]:
    """CounterFact's requests, then its neighbourhood prompts as edits; no prompt twice."""
    records = [r for name in FILES for r in load_requests(data / name, unrelated=data / UNRELATED).requests]
    found = {r.prompt: r for r in reversed(records)}  # of two records of one prompt the first
    requests = [r for r in records if found[r.prompt] is r]
    templates = {r.prompt.replace(r.subject, "{}", 1) for r in requests if r.subject and r.subject in r.prompt}
    patterns = [re.compile(re.escape(t).replace(re.escape("{}"), "(.+)")) for t in sorted(templates)]
    subjects = {r.subject for r in requests}
    again: list[EditRequest] = []
    for record in records:
        for probe in record.probes:
            if probe.kind != "locality" or probe.prompt in found:
                continue
            fits = [m for m in (p.fullmatch(probe.prompt) for p in patterns) if m]
            if not fits:
                continue  # no template tells its subject
            subject = min((m.group(1) for m in fits), key=len)
            request = EditRequest(probe.prompt, record.target_new, subject=subject)
            found[probe.prompt] = request
            (again if subject in subjects else requests).append(request)
            subjects.add(subject)
    return requests + again


def spread(requests: Sequence[EditRequest], count: int, strangers: Sequence[str]) -> list[EditRequest]:
    """``count`` of the requests at even distances; their neighbours are about ``strangers`` whom no request is about."""
    edited = {r.subject for r in requests}
    strangers = [s for s in dict.fromkeys(strangers) if s not in edited]
    count = min(count, len(requests))
    chosen = [requests[i * len(requests) // count] for i in range(count)]
    return [replace(r, probes=(*neighbours(r, i, strangers), *kept(r))) for i, r in enumerate(chosen)]


def neighbours(request: EditRequest, number: int, strangers: Sequence[str]) -> Iterator[Probe]:
    """The request's sentence about the next of ``strangers``."""
    for k in range(NEIGHBOURS):
        stranger = strangers[(number * NEIGHBOURS + k) % len(strangers)]
        prompt = request.prompt.replace(request.subject or "", stranger, 1)
        yield Probe(prompt, "locality", answers=(request.target_new,), group="stranger")


def kept(request: EditRequest) -> Iterator[Probe]:
    return (p for p in request.probes if p.kind != "locality")


def edit_all(editor: Any, batch: Sequence[EditRequest]) -> int:
    """Edit; where one of the batch cannot be, the others one by one. How many were left out."""
    plain = [replace(r, probes=()) for r in batch]
    try:
        editor.edit(plain)
    except BaftError:
        missed = 0
        for request in plain:
            try:
                editor.edit(request)
            except BaftError as error:
                print(f"left out: {error}", file=sys.stderr)
                missed += 1
        return missed
    return 0


def costs(editor: Any, folder: Path) -> dict[str, float]:
    count = len(editor.edits)
    on_disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "adapter_bytes_an_edit": editor.adapter.stored_bytes() / count,
        "disk_bytes_an_edit": on_disk / count,
        "peak_memory_mib": peak,
    }


def ask(scorer: Scorer, edited: Any, sample: Sequence[EditRequest]) -> dict[str, float | None]:
    rows = []
    for begin in range(0, len(sample), 16):
        part = sample[begin : begin + 16]
        for request, scores in zip(part, scorer.score(edited, part), strict=True):
            metrics, _ = record_metrics(scorer.queries(request), scores)
            rows.append({name: metrics.get(name) for name in SHOWN})
    table = aggregate(rows)
    return {name: table[name]["mean"] if name in table else None for name in SHOWN}


def lines(curve: Path) -> Iterator[dict[str, Any]]:
    for line in curve.read_text(encoding="utf-8").splitlines() if curve.is_file() else ():
        yield json.loads(line)


def asked(curve: Path, mark: int) -> bool:
    return any(row["stream"] == mark for row in lines(curve))


def report(curve: Path, args: argparse.Namespace) -> None:
    rows = list(lines(curve))
    timed = [row for row in rows if "seconds" in row]
    head = "| edits | " + " | ".join(SHOWN) + " | s an edit | processor s | bytes an edit | MiB peak |"
    text = [head, "|" + "---:|" * (len(SHOWN) + 5)]
    for row in rows:
        cells = ["–" if row[name] is None else f"{100 * row[name]:.1f}" for name in SHOWN]
        times = [f"{row[name]:.3f}" if name in row else "–" for name in ("seconds", "processor_seconds")]
        text.append(
            f"| {row['edits']} | " + " | ".join([*cells, *times])
            + f" | {row['adapter_bytes_an_edit']:.0f} | {row['peak_memory_mib']:.0f} |"
        )  # fmt: skip
    ratio = [timed[-1][name] / timed[0][name] for name in ("seconds", "processor_seconds")]
    text.append(
        f"\nAn edit at the end against one at the start: {ratio[0]:.2f} in wall time, {ratio[1]:.2f} in processor time."
    )
    (args.out / "many_edits.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    facts = {"edits": args.edits, "batch": args.batch, "sample": args.sample, "model": args.model}
    versions = library_versions()
    (args.out / "run.json").write_text(json.dumps({**facts, "versions": versions}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))
    draw(rows, timed, args.out / "many_edits.png")


def draw(rows: Iterable[dict[str, Any]], timed: Iterable[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, timed = list(rows), list(timed)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in SHOWN:
        points = [(row["edits"], 100 * row[name]) for row in rows if row[name] is not None]
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    left.set(xlabel="edits in the adapter", ylabel="%", ylim=(0, 103), title="what a sample of all edits answers")
    left.legend(fontsize=8, loc="lower left")
    right.plot([r["edits"] for r in timed], [r["seconds"] for r in timed], marker="o", markersize=3, label="wall")
    right.plot(
        [r["edits"] for r in timed],
        [r["processor_seconds"] for r in timed],
        marker="o",
        markersize=3,
        label="processor",
    )
    right.set(xlabel="edits in the adapter", ylabel="seconds", title="the next edit", ylim=(0, None))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
