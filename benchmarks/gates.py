"""How often the default gate opens, without training anything: on paraphrases, neighbours, other relations, unrelated text.

    python benchmarks/gates.py --data-dir PATH --n 50 [--layer 27] [--json FILE]

Reads the training and validation records of benchmarks/sweep.py. For each record the gate starts from the request, as before an
edit, and reads the record's probes. The table shows at the end of how many of them the subject is named, the relation fits, and the
gate is open, and how many pass other thresholds of the cosine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sweep
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import BaftConfig, BaftEditor, EditRequest
from baft_intervention.analysis.inspection import let_read
from baft_intervention.analysis.tension import edit_gate
from baft_intervention.models.tokenization import encode_prompt
from baft_intervention.runtime.adapter import Edit
from baft_intervention.runtime.representations import read_blocks
from baft_intervention.training.encoding import encode_requests
from baft_intervention.training.gate_initialisation import make_jobs
from baft_intervention.training.maps import map_tensors

PARTS = ("zsre", "counterfact", "wiki_counterfact", "wiki_recent")  # of benchmarks/sweep.py
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8)
Answer = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=50, help="records a part; default: 50")
    parser.add_argument("--layer", type=int, help="edited block; default: the library's")
    parser.add_argument("--seed", type=int, default=3, help="of the draw of records; default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    config = BaftConfig(layers=None if args.layer is None else (args.layer,))
    editor = BaftEditor.from_pretrained(args.model, config)
    asked: dict[str, list[Answer]] = defaultdict(list)
    for part in PARTS:
        for name, answers in probe_part(editor, sweep.load_part(args, part)).items():
            asked[f"{part} {name}"] += answers
    rows = {name: shares(answers) for name, answers in sorted(asked.items())}
    columns = list(next(iter(rows.values())))
    print(f"blocks {', '.join(map(str, editor.adapter.read_layers))}; share open, %\n")
    print("| probes | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:g}" for c in columns) + " |")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def probe_part(editor: BaftEditor, requests: Sequence[EditRequest]) -> dict[str, list[Answer]]:
    """``probe group -> answers``: what the gate of each record hears at the end of the record's probes."""
    adapter = editor.adapter
    editor.prepare()
    jobs = make_jobs(
        editor.model,
        editor.tokenizer,
        editor.config,
        adapter.layers,
        [[each] for each in encode_requests(editor.tokenizer, requests, editor.config)],
        shared=adapter.shared,
        bank=editor._bank(),
    )
    found: dict[str, list[Answer]] = defaultdict(list)
    for job in jobs:
        tensors = {layer: map_tensors(module) for layer, module in job.maps.items()}
        edit = Edit(job.requests[0].id, job.requests, tensors, {}, 0.0, 0, 0.0, True)
        gate = edit_gate(adapter, edit)
        threshold = float(gate.weighting.state["threshold"][0])
        probes = job.requests[0].probes
        rows = [encode_prompt(editor.tokenizer, probe.prompt) for probe in probes]
        every = [range(len(row)) for row in rows]
        blocks = read_blocks(editor.model, editor.tokenizer, rows, every, adapter.read_layers) if rows else {}
        for i, (probe, row) in enumerate(zip(probes, rows, strict=True)):
            reading = let_read(gate, adapter, row, {layer: states[i] for layer, states in blocks.items()})
            heard = zip(reading.candidates, gate.explain(reading), strict=True)
            cosine, asked, _, is_open = next(
                (own[edit.id] for candidate, own in heard if candidate.column == len(row) - 1 and edit.id in own),
                (-1.0, -1.0, False, False),
            )
            found[f"{probe.kind} {probe.group}".strip()].append(
                {"cosine": cosine, "asked": asked, "open": float(is_open), "threshold": threshold}
            )
    return found


def shares(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentages of probes; a probe that does not name the subject has ``asked`` -1."""

    def share(condition: Any) -> float:
        return round(100.0 * sum(condition(a) for a in answers) / len(answers), 1)

    row = {"n": float(len(answers)), "named": share(lambda a: a["asked"] >= 0)}
    row["relation fits"] = share(lambda a: a["cosine"] > a["threshold"])
    row["open"] = share(lambda a: a["open"] > 0)
    for threshold in THRESHOLDS:
        row[f"above {threshold:g}"] = share(lambda a, t=threshold: a["cosine"] > t)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
